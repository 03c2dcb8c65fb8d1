"""A folder of images as people have them: `scan` lists it, `check` makes a `Source` of what can be decoded.

The manifest remembers the verdicts, so that a second start reads only what has changed, and the order of the files,
so that a run goes on with the images that it began with. docs/data.md states the policies.
"""

import csv
import dataclasses
import functools
import os
import pathlib
import stat

import numpy as np
import tensorflow as tf

from moco_tf import files
from moco_tf.data import check as checking
from moco_tf.data.check import Verdict
from moco_tf.data.sources import HELD_OUT, Source
from moco_tf.files import printable

SUFFIXES = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".gif", ".webp")
UNREADABLE = -1  # the size of what cannot even be looked at
GONE = "no such file"
COLUMNS = ("path", "size", "mtime_ns", "problem", "format", "height", "width")
RULES = "rules 1"  # of `encoded.verify`: a manifest made by others is not believed


@dataclasses.dataclass(frozen=True, eq=False)
class Listing:
    """The image files below a folder, by path; none of them has been opened."""

    path: pathlib.Path
    classes: tuple  # the folders' names as the system has them, which need be no text
    files: list  # paths relative to `path`, with forward slashes, sorted
    sizes: np.ndarray  # (size,) bytes, or UNREADABLE
    times: np.ndarray  # (size,) modification times in nanoseconds
    unread: tuple = ()  # folders that cannot be opened

    @property
    def size(self):
        return len(self.files)

    @property
    def class_names(self):
        """The names of the classes as text, which every file and screen takes."""
        return tuple(printable(name) for name in self.classes)

    @property
    def labels(self):
        """A list of the numbers of the files' classes, -1 for those that lie in none."""
        number = {name: label for label, name in enumerate(self.classes)}
        return [number.get(file.split("/", 1)[0], -1) if "/" in file else -1 for file in self.files]


@dataclasses.dataclass(frozen=True, eq=False)
class Checked:
    """A listing with a `Verdict` for each file, and the files that came after the run began, which are left out."""

    listing: Listing
    verdicts: list
    added: int = 0

    @property
    def bad(self):
        """(path, problem) of each file that cannot be decoded."""
        pairs = zip(self.listing.files, self.verdicts, strict=True)
        return [(file, verdict.problem) for file, verdict in pairs if verdict.problem]

    def source(self):
        """The `Source`; the next good file by path stands in for a bad one, after the last the first.

        Raises:
          ValueError: there is no good file.
        """
        listing = self.listing
        good = np.array([not verdict.problem for verdict in self.verdicts])
        numbers = np.flatnonzero(good)
        if not len(numbers):
            raise ValueError(f"None of the {listing.size} images in {listing.path} can be decoded: {_some(self.bad)}.")
        stand_ins = numbers[np.searchsorted(numbers, np.arange(listing.size)) % len(numbers)]
        root = os.fsencode(listing.path)
        with tf.device("CPU:0"):
            contents = tf.constant([os.path.join(root, os.fsencode(file)) for file in listing.files])
            labels = tf.constant(listing.labels, tf.int64)
        return Source(
            str(listing.path),
            contents,
            labels,
            listing.class_names,
            read=tf.io.read_file,
            stand_ins=None if good.all() else stand_ins,
        )


def scan(path, split=None):
    """A `Listing` of the images at any depth of a folder; the first level of sub-folders are the classes.

    Where there is a folder `train`, it and `val`, `validation` or `test` beside it are splits; `split` is "train"
    if it is not given, and the three other names stand for one another where only one is there.

    Raises:
      ValueError: no such folder, split or images.
    """
    root = pathlib.Path(path).expanduser()
    if not root.exists():
        raise ValueError(f"There is no folder {path}. Give the folder that holds the images.")
    if not root.is_dir():
        raise ValueError(f"{path} is a file. Give the folder that holds the images.")
    try:
        chosen, classes = _divide(root, split)
        os.scandir(chosen).close()
    except OSError as error:
        raise ValueError(f"{error.filename or root} cannot be read: {error.strerror}. Allow reading it.") from None
    unread = []
    found = sorted(_image_files(os.fsencode(chosen), unread))
    if not found:
        raise ValueError(f"There are no images ({', '.join(SUFFIXES)}) in {chosen}. Give a folder that has some.")
    files, sizes, times = zip(*found, strict=True)
    return Listing(chosen, classes, list(files), np.array(sizes, np.int64), np.array(times, np.int64), tuple(unread))


def check(listing, manifest=None, begun=False, writes=True):
    """A `Checked` listing; what the manifest knows is not read again.

    manifest: a file to believe where path, size and time are the same, and to write; None: check all.
    writes: whether to write it; of several machines that train together, one does.
    begun: the manifest is that of a run under way, whose images and their order are kept: what is gone is bad, and
    what has come since is left out.
    """
    known = _read(manifest) if manifest else {}
    added = 0
    if begun and known:
        now = {file: number for number, file in enumerate(listing.files)}
        numbers = [now.get(file) for file in known]
        added = listing.size - sum(number is not None for number in numbers)
        listing = dataclasses.replace(
            listing,
            files=list(known),
            sizes=np.array([UNREADABLE if n is None else listing.sizes[n] for n in numbers], np.int64),
            times=np.array([0 if n is None else listing.times[n] for n in numbers], np.int64),
        )
    verdicts, unknown = [], []
    gone, nothing = Verdict(GONE), (None, None, None)
    stats = zip(listing.files, listing.sizes.tolist(), listing.times.tolist(), strict=True)
    for number, (file, size, time) in enumerate(stats):
        known_size, known_time, verdict = known.get(file, nothing)
        if size == UNREADABLE:
            verdict = gone
        elif size != known_size or time != known_time:
            verdict = None
            unknown.append(number)
        verdicts.append(verdict)
    if unknown:
        root = os.fsencode(listing.path)
        paths = tf.data.Dataset.from_tensor_slices(
            [os.path.join(root, os.fsencode(listing.files[n])) for n in unknown]
        )
        for number, verdict in zip(unknown, checking.verdicts(paths, tf.io.read_file, len(unknown)), strict=True):
            verdicts[number] = verdict
    checked = Checked(listing, verdicts, added)
    if manifest and writes and (unknown or list(known) != listing.files):
        _write(manifest, checked)
    return checked


def too_many_bad(bad, total, most):
    """The refusal of a set of which more than the share `most` is bad, or None."""
    if len(bad) <= most * total:
        return None
    return (
        f"at most --max_bad_fraction={most:g} of the images may be undecodable; {len(bad)} of {total} are: "
        f"{_some(bad)}. Mend or remove them, or allow more"
    )


def _some(bad, count=10):
    shown = ", ".join(f"{printable(name)} ({problem})" for name, problem in bad[:count])
    return shown + (", ..." if len(bad) > count else "")


def _divide(root, split):
    splits = _splits(root)
    chosen = _choose_split(root, splits, split)
    # Numbers of classes must agree between splits, even if one lacks a class.
    sharing = [root / name for name in splits] if chosen.name in splits else [chosen]
    return chosen, tuple(sorted({name for one in sharing for name in _subfolders(one)}))


def _splits(root):
    """Names of the split folders, none if the folder is not divided."""
    found = [name for name in ("train", *HELD_OUT) if (root / name).is_dir()]
    only_splits = set(found) == set(_subfolders(root))
    return found if "train" in found or only_splits else []


def _choose_split(root, splits, split):
    if split and (root / split).is_dir():
        return root / split
    if not splits:
        if split in (None, "train"):
            return root
        raise ValueError(
            f"{root} is not divided, so it has no split {split!r}. Put the images into {root}/train and "
            f"{root}/{split}, or leave the split out."
        )
    wanted = "train" if split is None else split
    if wanted in splits:
        return root / wanted
    held_out = [name for name in splits if name != "train"]
    if wanted in HELD_OUT and len(held_out) == 1:
        return root / held_out[0]
    raise ValueError(f"{root} has the splits {', '.join(splits)}, not {wanted!r}. Name one of them.")


def _subfolders(path):
    return [entry.name for entry in os.scandir(path) if entry.is_dir() and not entry.name.startswith(".")]


def _image_files(root, unread):
    """(path, size, time) of each image file below `root`, a path in bytes: names need not be text.

    Hidden files and folders are left out. Links are followed; a folder that can be reached in several ways is read
    once, at the shallowest of its paths, so that a link to a folder above ends there.
    """
    suffixes = tuple(os.fsencode(suffix) for suffix in SUFFIXES)
    status = os.stat(root)
    seen = {(status.st_dev, status.st_ino)}
    level = [b""]
    while level:
        below = []
        for folder in level:
            try:
                with os.scandir(os.path.join(root, folder)) as entries:
                    entries = [entry for entry in entries if not entry.name.startswith(b".")]
            except OSError:
                unread.append(os.fsdecode(folder))
                continue
            prefix = folder + b"/" if folder else b""
            subfolders = []
            for entry in entries:
                name = entry.name
                is_image = name.lower().endswith(suffixes)
                if not is_image and entry.is_file():
                    continue  # without asking for its size
                try:
                    status = entry.stat()
                except OSError:  # a link to nothing
                    if is_image:
                        yield os.fsdecode(prefix + name), UNREADABLE, 0
                    continue
                if stat.S_ISDIR(status.st_mode):
                    subfolders.append((name, status.st_dev, status.st_ino))
                elif is_image and stat.S_ISREG(status.st_mode):  # reading a pipe would wait for ever
                    yield os.fsdecode(prefix + name), status.st_size, status.st_mtime_ns
            for name, *place in sorted(subfolders):
                if tuple(place) not in seen:
                    seen.add(tuple(place))
                    below.append(prefix + name)
        level = below


def _read(manifest):
    """{path: (size, time, Verdict)} in the order of the file; nothing if it is missing or not to be believed."""
    try:
        with open(manifest, newline="", encoding="utf-8", errors="surrogateescape") as file:
            rows = csv.reader(file)
            if next(rows, None) != [*COLUMNS, RULES]:
                return {}
            verdict = functools.cache(lambda *facts: Verdict(*facts[:2], int(facts[2]), int(facts[3])))
            return {
                path: (int(size), int(time), verdict(problem, format, height, width))
                for path, size, time, problem, format, height, width in rows
            }
    except (OSError, ValueError, csv.Error):  # missing, or not as `_write` leaves it
        return {}


def _write(manifest, checked):
    listing = checked.listing
    with (
        files.aside(manifest) as writing,
        open(writing, "w", newline="", encoding="utf-8", errors="surrogateescape") as file,
    ):
        rows = csv.writer(file)
        rows.writerow([*COLUMNS, RULES])
        stats = zip(listing.files, listing.sizes.tolist(), listing.times.tolist(), checked.verdicts, strict=True)
        rows.writerows((path, size, time, *verdict) for path, size, time, verdict in stats)
