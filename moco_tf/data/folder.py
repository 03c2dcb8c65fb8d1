"""A folder of images as people have them: `scan` lists it, `check` makes a `Source` of what can be decoded.

The manifest remembers the verdicts, so that a second start reads only what has changed, and the order of the files,
so that a run goes on with the images that it began with. docs/data.md states the policies.
"""

import collections
import csv
import dataclasses
import functools
import os
import pathlib
import re
import stat

import numpy as np
import tensorflow as tf

from moco_tf.data import check as checking
from moco_tf.data.check import Verdict
from moco_tf.data.sources import HELD_OUT, TRAIN, Source, meant_by, split_of
from moco_tf.files import aside, printable

SUFFIXES = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".gif", ".webp")
UNREADABLE = -1  # the size of what cannot even be looked at
GONE = "no such file"
COLUMNS = ("path", "size", "mtime_ns", "problem", "format", "height", "width", "peak", "orientation")
RULES = "rules 2"  # of what is found out: a manifest made by others is not believed
EARLIER = (*COLUMNS[:7], "rules 1")  # but by a run that began with it, as far as it goes
_ENDINGS = tuple(os.fsencode(suffix) for suffix in SUFFIXES)
_ENDING = re.compile(rb"(?<=.)\.[A-Za-z0-9]{1,8}$", re.DOTALL)  # of any file's name
SHOWN = 10  # names in a line; of the rest there is a count
SHOWN_ENDINGS = 5


@dataclasses.dataclass(frozen=True, eq=False)
class Listing:
    """The image files below a folder, by path; none of them has been opened."""

    path: pathlib.Path
    classes: tuple  # the folders' names as the system has them, which need be no text
    files: list  # paths relative to `path`, with forward slashes, sorted
    sizes: np.ndarray  # (size,) bytes, or UNREADABLE
    times: np.ndarray  # (size,) modification times in nanoseconds
    besides: "Besides"  # what else is there
    given: pathlib.Path  # the folder that `path` is a split of, or is
    notes: tuple = ()  # sentences: which folders are splits, which are in none
    doubts: tuple = ()  # sentences: what may be meant otherwise

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


@dataclasses.dataclass(eq=False)
class Besides:
    """What a search for images met and did not take."""

    unread: list = dataclasses.field(default_factory=list)  # folders that cannot be opened
    endings: collections.Counter = dataclasses.field(default_factory=collections.Counter)  # of other files' names
    hidden: int = 0  # files that are called like images, but hidden
    folders: list = dataclasses.field(default_factory=list)  # all that were entered


@dataclasses.dataclass(frozen=True)
class Division:
    """Which of the folders in a folder are splits; where none is, all are classes."""

    splits: tuple = ()
    rest_trains: bool = False  # the splits are held out, and the folders beside them are the classes to train on
    doubtful: tuple = ()  # folders that are called like splits, and are classes


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
            raise ValueError(
                f"None of the {listing.size} images in {listing.path} can be decoded: {_bad_ones(self.bad)}."
            )
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


def scan(path, split=None, begun=False):
    """A `Listing` of the images at any depth of a folder; the first level of sub-folders are the classes.

    `_divide` tells which folders are splits; `split`, "train" if it is not given, names one of them, as
    `sources.meant_by` has it, or any other folder.

    begun: for a run under way, whose images `check` will find, whatever the split means by now.

    Raises:
      ValueError: no such folder, split or images, or several folders that the split can mean.
    """
    root = pathlib.Path(path).expanduser()
    if not root.exists():
        raise ValueError(f"There is no folder {path}. Give the folder that holds the images.")
    if not root.is_dir():
        raise ValueError(f"{path} is a file. Give the folder that holds the images.")
    wanted = split or TRAIN
    try:
        division = _divide(root)
        chosen = _choose(root, division, wanted, begun)
        os.scandir(chosen).close()
        left_out = division.splits if chosen == root and division.rest_trains and split_of(wanted) else ()
        folders = _classes(root, division, chosen, left_out)
        listing = _list(chosen, folders, root, left_out)
        if split_of(wanted) in HELD_OUT:  # how the folders are read is said to those who train
            return listing
        notes, doubts = _notes(division, listing, wanted), _doubts(division, listing, wanted)
        return dataclasses.replace(listing, notes=tuple(notes), doubts=tuple(doubts))
    except OSError as error:
        raise ValueError(f"{error.filename or root} cannot be read: {error.strerror}. Allow reading it.") from None


def check(listing, manifest=None, begun=False, writes=True):
    """A `Checked` listing; what the manifest knows is not read again.

    manifest: a file to believe where path, size and time are the same, and to write; None: check all.
    writes: whether to write it; of several machines that train together, one does.
    begun: the manifest is that of a run under way, whose images and their order are kept: what is gone is bad, and
    what has come since is left out.
    """
    known = _read(manifest, begun) if manifest else {}
    added = 0
    if begun and known:
        listing, added = _as_begun(listing, list(known))
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


def remarks(listing):
    """Sentences on how a folder was read: classes, splits, and what was left out."""
    found = [*classes(listing.class_names, listing.labels), *listing.notes, *listing.doubts]
    if not_read := _not_read(listing.besides):
        found.append(f"Not read: {not_read}")
    for name in listing.besides.unread:
        found.append(f"Not read: {printable(listing.path / name)}, a folder that cannot be opened.")
    return found


def classes(names, labels):
    """Sentences on how many images of a source each class has, and how many none."""
    counts = collections.Counter(labels)
    without = counts.pop(-1, 0)
    shown = _counted([(name, counts[number]) for number, name in enumerate(names)])
    found = [f"Classes: {len(names)}" + (f" ({shown})" if names else "")]
    return [*found, f"Without a label: {without}"] if without else found


def too_many_bad(bad, total, most):
    """The refusal of a set of which more than the share `most` is bad, or None."""
    if len(bad) <= most * total:
        return None
    return (
        f"at most --max_bad_fraction={most:g} of the images may be undecodable; {len(bad)} of {total} are: "
        f"{_bad_ones(bad)}. Mend or remove them, or allow more"
    )


def _bad_ones(bad):
    return _some([f"{name} ({problem})" for name, problem in bad])


def _some(names):
    return ", ".join(printable(name) for name in names[:SHOWN]) + (", ..." if len(names) > SHOWN else "")


def _counted(counts):
    """(name, count) pairs as in: cat 8, dog 4."""
    shown = ", ".join(f"{printable(name)} {count}" for name, count in counts[:SHOWN])
    return shown + (f", and {len(counts) - SHOWN} more" if len(counts) > SHOWN else "")


def _not_read(besides):
    """What files are there beside the images, as in: .tif 40, .txt 3, hidden 1."""
    others = sorted(besides.endings.items(), key=lambda pair: (-pair[1], pair[0]))
    parts = [f"{ending or 'without an ending'} {count}" for ending, count in others[:SHOWN_ENDINGS]]
    if rest := sum(count for _, count in others[SHOWN_ENDINGS:]):
        parts.append(f"other endings {rest}")
    if besides.hidden:
        parts.append(f"hidden {besides.hidden}")
    return ", ".join(parts)


def _divide(root):
    """The `Division` of a folder.

    Folders that are called as training and as held-out splits are splits where there are both. With one kind alone
    it is the names of the folders inside that tell a split from a class that is called like one.
    """
    names = _subfolders(root)
    looking = [name for name in names if split_of(name)]
    if not looking:
        return Division()
    filled = [name for name in names if _holds_images(root / name)]
    training = [name for name in filled if split_of(name) == TRAIN]
    held_out = [name for name in filled if split_of(name) in HELD_OUT]
    others = [name for name in filled if not split_of(name)]
    loose = _loose_images(root)

    def bear_names_of_others(folders):
        return any(not set(others).isdisjoint(_subfolders(root / name)) for name in folders)

    if training and held_out:
        if bear_names_of_others(held_out) and not bear_names_of_others(training):
            return Division(tuple(held_out), rest_trains=True, doubtful=tuple(training))
        return Division(tuple(looking))
    if training:
        meant = meant_by(TRAIN, training)
        divided = [name for name in (*meant, *others) if _has_class_folders(root / name)] if others else meant
        if len(meant) == 1 and divided == meant:
            return Division(tuple(looking))
        return Division(doubtful=tuple(training))
    if held_out and (others or loose):
        if bear_names_of_others(held_out) or not others:
            return Division(tuple(held_out), rest_trains=True)
        return Division(doubtful=tuple(held_out))
    return Division() if others else Division(tuple(looking))


def _choose(root, division, wanted, begun):
    """The folder that a split lies in; `root` for all of it, or for what is not held out."""
    splits, names = division.splits, _subfolders(root)
    kind = split_of(wanted)
    if kind is None and (root / wanted).is_dir():
        return root / wanted
    if wanted in names and (wanted in splits or wanted != TRAIN):
        return root / wanted
    if kind == TRAIN and division.rest_trains:
        return root
    if not splits and wanted == TRAIN:
        return root
    meant = meant_by(wanted, splits)
    if len(meant) == 1:
        return root / meant[0]
    if begun:
        return root
    if not splits:
        raise ValueError(
            f"{root} is not divided, so it has no split {wanted!r}. Put the images into {root}/train and "
            f"{root}/{wanted}, or leave the split out."
        )
    if meant:
        raise ValueError(f"{root} has {' and '.join(sorted(meant))}, and {wanted!r} can mean each. Name one of them.")
    raise ValueError(f"{root} has the splits {', '.join(splits)}, not {wanted!r}. Name one of them.")


def _classes(root, division, chosen, left_out):
    # Numbers of classes must agree between splits, even if one lacks a class.
    if chosen not in [root / name for name in division.splits] and not left_out:
        return tuple(_subfolders(chosen))
    names = {name for split in division.splits for name in _subfolders(root / split)}
    if division.rest_trains:
        names.update(set(_subfolders(root)) - set(division.splits))
    return tuple(sorted(names))


def _notes(division, listing, wanted):
    """Sentences: which folders are splits, which are in none."""
    root, splits = listing.given, division.splits
    if listing.path == root:
        if split_of(wanted) and division.rest_trains:
            yield f"Held out of {printable(root)}: {_some(splits)}; the rest is trained on"
    elif listing.path in [root / name for name in splits]:
        yield f"Splits of {printable(root)}: {_some(splits)}"
        beside = [name for name in _subfolders(root) if name not in splits or split_of(name) == TRAIN]
        folders = [root / name for name in beside if root / name != listing.path]
        counts = [(path.name, sum(1 for _ in _image_files(os.fsencode(path), Besides()))) for path in folders]
        counts = [(name, count) for name, count in [*counts, ("no folder", _loose_images(root))] if count]
        if counts:
            yield f"Left out, images in: {_counted(counts)}; --train_split=. reads all folders, as classes"


def _doubts(division, listing, wanted):
    """Sentences: what is called like a split, and is read as a class or as a part of one."""
    root = listing.given
    if listing.path == root and not split_of(wanted):
        if looking := [name for name in listing.class_names if split_of(name)]:
            yield f"Read as classes, as the split {wanted!r} asks: {_some(looking)}"
    elif listing.path == root:
        for name in division.doubtful:
            read = f"The folder {printable(name)} is read as a class, like those beside it"
            if split_of(name) == TRAIN:
                yield f"{read}; if it is the training split, give --dataset={printable(root / name)}"
            else:
                yield (
                    f"{read}, and trained on: no folder in it is called like a class; if it is held out, move the "
                    f"folders beside it into {printable(root / TRAIN)}"
                )
    folders = listing.besides.folders
    # Of the folders of a split, one called test is a class like others, but not beside one called train.
    deep = listing.path == root or not any(split_of(name) == TRAIN for name in folders)
    inside = [name for name in folders if split_of(name.rsplit("/", 1)[-1]) in HELD_OUT and ("/" in name or not deep)]
    if inside:
        parents = {os.path.dirname(name) for name in inside}
        beside = {os.path.dirname(name) for name in folders if split_of(name.rsplit("/", 1)[-1]) == TRAIN}
        way = "move them out"
        if len(parents) == 1 and parents <= beside:
            way = f"--dataset={printable(listing.path / parents.pop())} reads splits"
        yield f"Called as if held out, but inside of classes and trained on: {_some(inside)}; {way}"


def _list(path, folders, given, left_out=()):
    """The `Listing` of a folder, without the folders `left_out` in it."""
    besides = Besides()
    found = sorted(_image_files(os.fsencode(path), besides, {os.fsencode(name) for name in left_out}))
    if not found:
        others = _not_read(besides)
        others = f", but {others}" if others else ""
        raise ValueError(
            f"There are no images ({', '.join(SUFFIXES)}) in {path}{others}. Give a folder that has some."
        )
    files, sizes, times = zip(*found, strict=True)
    return Listing(path, folders, list(files), np.array(sizes, np.int64), np.array(times, np.int64), besides, given)


def _as_begun(listing, files):
    """(a listing of the `files` with which a run began, how many others there are)."""
    place = _where_begun(listing, files)
    if place != listing.path:
        begun = _list(place, tuple(_subfolders(place)), listing.given)
        new = f"a new one would read {printable(listing.path)}"
        listing = dataclasses.replace(begun, doubts=(f"The run began with {printable(place)} and keeps to it; {new}",))
    now = {file: number for number, file in enumerate(listing.files)}
    numbers = [now.get(file) for file in files]
    stats = [
        _size_and_time(listing.path / file) if n is None else (listing.sizes[n], listing.times[n])
        for n, file in zip(numbers, files, strict=True)
    ]
    added = listing.size - sum(number is not None for number in numbers)
    sizes, times = np.array(stats, np.int64).T
    return dataclasses.replace(listing, files=files, sizes=sizes, times=times), added


def _where_begun(listing, files):
    """The folder of a run's files: that of the listing, unless it has none of them and another has.

    An earlier version, or folders that came since, may have had the split mean another one.
    """
    sample = files[:: max(1, len(files) // 50)]
    looking = [listing.given / name for name in _subfolders(listing.given) if split_of(name)]
    for place in (listing.path, listing.given, *looking):
        if any(os.path.lexists(place / file) for file in sample):
            return place
    return listing.path


def _size_and_time(path):
    try:
        status = os.stat(path)
    except OSError:
        return UNREADABLE, 0
    return (status.st_size, status.st_mtime_ns) if stat.S_ISREG(status.st_mode) else (UNREADABLE, 0)


def _holds_images(path):
    return any(True for _ in _image_files(os.fsencode(path), Besides()))


def _has_class_folders(path):
    return any(_holds_images(path / name) for name in _subfolders(path))


def _loose_images(root):
    """How many images lie in a folder itself."""
    with os.scandir(root) as entries:
        return sum(_is_image(os.fsencode(entry.name)) and entry.is_file() for entry in entries)


def _is_image(name):
    return name.lower().endswith(_ENDINGS) and not name.startswith(b".")


def _subfolders(path):
    return sorted(entry.name for entry in os.scandir(path) if entry.is_dir() and not entry.name.startswith("."))


def _image_files(root, besides, left_out=()):
    """(path, size, time) of each image file below `root`, a path in bytes: names need not be text.

    Hidden files and folders are left out. Links are followed; a folder that can be reached in several ways is read
    once, at the shallowest of its paths, so that a link to a folder above ends there.

    besides: takes note of all else. left_out: names of folders in `root` itself.
    """
    status = os.stat(root)
    seen = {(status.st_dev, status.st_ino)}
    level = [b""]
    while level:
        below = []
        for folder in level:
            try:
                with os.scandir(os.path.join(root, folder)) as entries:
                    entries = list(entries)
            except OSError:
                besides.unread.append(os.fsdecode(folder))
                continue
            prefix = folder + b"/" if folder else b""
            subfolders = []
            for entry in entries:
                name = entry.name
                is_image = name.lower().endswith(_ENDINGS)
                if name.startswith(b"."):
                    besides.hidden += is_image
                    continue
                if not is_image and entry.is_file():  # without asking for its size
                    ending = _ENDING.search(name)
                    besides.endings[ending[0].lower().decode() if ending else ""] += 1
                    continue
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
                if tuple(place) not in seen and (folder or name not in left_out):
                    seen.add(tuple(place))
                    below.append(prefix + name)
                    besides.folders.append(os.fsdecode(prefix + name))
        level = below


def _read(manifest, begun):
    """{path: (size, time, Verdict)} in the order of the file; nothing if it is missing or not to be believed."""
    try:
        with open(manifest, newline="", encoding="utf-8", errors="surrogateescape") as file:
            rows = csv.reader(file)
            first = next(rows, None)
            if first == [*EARLIER] and begun:
                rows = ([*row, "", ""] for row in rows)
            elif first != [*COLUMNS, RULES]:
                return {}
            number = lambda text: int(text) if text else None  # noqa: E731
            verdict = functools.cache(
                lambda problem, format, height, width, peak, orientation: Verdict(
                    problem, format, int(height), int(width), number(peak), number(orientation)
                )
            )
            return {path: (int(size), int(time), verdict(*facts)) for path, size, time, *facts in rows}
    except (OSError, ValueError, TypeError, csv.Error):  # missing, or not as `_write` leaves it
        return {}


def _write(manifest, checked):
    listing = checked.listing
    with (
        aside(manifest) as writing,
        open(writing, "w", newline="", encoding="utf-8", errors="surrogateescape") as file,
    ):
        rows = csv.writer(file)
        rows.writerow([*COLUMNS, RULES])
        stats = zip(listing.files, listing.sizes.tolist(), listing.times.tolist(), checked.verdicts, strict=True)
        rows.writerows((path, size, time, *verdict) for path, size, time, verdict in stats)
