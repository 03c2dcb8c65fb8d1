"""Lists a folder of images: tells which folders are splits and which classes, and which files are images.

`scan` lists the folder, `remarks` says how it was read, and `manifest.check_files` opens the files. An archive is read
by the same rules (`archive.py`). docs/data.md states the policies.
"""

import collections
import dataclasses
import functools
import os
import pathlib
import re
import stat

import numpy as np

from moco_tf.command import ConfigError
from moco_tf.data import archive
from moco_tf.data.splits import HELD_OUT, TRAIN, meant_by, split_of
from moco_tf.files import expanded, printable

SUFFIXES = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".gif", ".webp")
UNREADABLE = -1  # the size of a file that cannot even be looked at
UNKNOWN = -(2**63)  # a time that no file has, of a file that the system refused: it is asked anew
OF_IMAGES, ARRAYS = (1, 3), (".npy",)  # numbers of channels of image files; endings of files of any other number
APPLES = b"__MACOSX"  # a folder of hidden files that macOS puts into its zips
_ENDING = re.compile(rb"(?<=.)\.[A-Za-z0-9]{1,8}$", re.DOTALL)  # of any file's name
SHOWN = 10  # names in a line; the rest are counted
SHOWN_ENDINGS = 5


@dataclasses.dataclass(frozen=True, eq=False)
class Listing:
    """The image files below a folder, by path; none of them has been opened."""

    path: pathlib.Path
    classes: tuple  # the folders' names as the system has them, which need not be text
    files: list  # paths relative to `path`, with forward slashes, sorted
    sizes: np.ndarray  # (size,) bytes, or UNREADABLE
    times: np.ndarray  # (size,) modification times in nanoseconds
    besides: "Besides"  # other files and folders that are there
    root: pathlib.Path  # the folder that `path` is a split of, or `path` itself
    notes: tuple = ()  # sentences: which folders are splits, which are in none
    doubts: tuple = ()  # sentences: what may have another meaning
    label_of: dict | None = None  # {file: the name of its class, or ""}, if that is not the file's first folder
    called: str | os.PathLike = ""  # the user's name for it, if that is not `path`
    channels: int = 3  # how many channels the images are read with

    @property
    def size(self):
        return len(self.files)

    @functools.cached_property
    def archived(self):
        """Whether any of the files may lie in an archive."""
        return archive.may_hold(self.path) or any(map(archive.may_hold, self.files if self.label_of else ()))

    @property
    def title(self):
        """What it is called on the screen."""
        return printable(self.called or self.path)

    @property
    def class_names(self):
        """The names of the classes as text, which every file and screen takes."""
        return tuple(printable(name) for name in self.classes)

    @property
    def labels(self):
        """A list of the numbers of the files' classes, -1 for those that lie in none."""
        number = {name: label for label, name in enumerate(self.classes)}
        if self.label_of is not None:
            return [number.get(self.label_of.get(file), -1) for file in self.files]
        return [number.get(file.split("/", 1)[0], -1) if "/" in file else -1 for file in self.files]


@dataclasses.dataclass(eq=False)
class Besides:
    """The files and folders that a search for files met and did not take."""

    unread: list = dataclasses.field(default_factory=list)  # folders that cannot be opened
    endings: collections.Counter = dataclasses.field(default_factory=collections.Counter)  # of other files' names
    hidden: int = 0  # hidden files whose names have the endings
    folders: list = dataclasses.field(default_factory=list)  # all that were entered


@dataclasses.dataclass(frozen=True)
class Division:
    """Which folders in a folder are splits; if none is, all are classes."""

    splits: tuple = ()
    rest_trains: bool = False  # the splits are held out, and the folders beside them are the classes to train on
    doubtful: tuple = ()  # folders that are called like splits but are classes


def suffixes(channels):
    """Returns the endings, in small letters, of the names of files with images of so many channels."""
    return SUFFIXES if channels in OF_IMAGES else ARRAYS


def scan(path, split=None, begun=False, channels=3):
    """A `Listing` of the images at any depth of a folder; the first level of sub-folders are the classes.

    `_divide` tells which folders are splits. `split`, "train" if it is not given, names one of them, by the rules of
    `splits.meant_by`, or any other folder.

    begun: whether a run is under way; `check_files` will find its images, whatever the split means by now.
    channels: how many channels the images are read with.

    Raises:
      ValueError: there is no such folder, split or image, or the split can mean several folders.
    """
    root = expanded(path)
    if not archive.exists(root):
        raise ValueError(f"There is no folder {path}. Give the folder that holds the images.")
    if not archive.is_dir(root):
        raise ValueError(
            archive.refusal(root) or f"{path} is a file. Give the folder, or the .zip or .tar, that holds the images."
        )
    wanted = split or TRAIN
    try:
        division = _divide(root, channels)
        chosen = _choose(root, division, wanted, begun)
        archive.entries(chosen)
        left_out = division.splits if chosen == root and division.rest_trains and split_of(wanted) else ()
        folders = _class_folders(root, division, chosen, left_out)
        listing = list_images(chosen, folders, root, left_out, channels)
        if split_of(wanted) in HELD_OUT:  # only those who train are told how the folders are read
            return listing
        notes, doubts = _notes(division, listing, wanted), _doubts(division, listing, wanted)
        return dataclasses.replace(listing, notes=(*archive.remarks(root), *notes), doubts=tuple(doubts))
    except OSError as error:
        raise ValueError(f"{error.filename or root} cannot be read: {error.strerror}. Allow reading it.") from None


def split_names(root):
    """The splits of a folder, as `scan` takes them."""
    division = _divide(root)
    return division.splits if division.splits and not division.rest_trains else (TRAIN, *division.splits)


def remarks(listing):
    """Returns sentences on how a folder was read: classes, splits, and what was left out."""
    sentences = [*class_counts(listing.class_names, listing.labels), *listing.notes, *listing.doubts]
    if others := not_read(listing.besides):
        sentences.append(f"Not read: {others}")
    for name in listing.besides.unread:
        sentences.append(f"Not read: {printable(listing.path / name)}, a folder that cannot be opened.")
    return sentences


def class_counts(names, labels):
    """Returns sentences on how many images each class of a source has, and how many images have no label."""
    counts = collections.Counter(labels)
    without = counts.pop(-1, 0)
    shown = counted([(name, counts[number]) for number, name in enumerate(names)])
    sentences = [f"Classes: {len(names)}" + (f" ({shown})" if names else "")]
    return [*sentences, f"Without a label: {without}"] if without else sentences


def some(names):
    return ", ".join(printable(name) for name in names[:SHOWN]) + (", ..." if len(names) > SHOWN else "")


def counted(counts):
    """Writes (name, count) pairs as in: cat 8, dog 4."""
    shown = ", ".join(f"{printable(name)} {count}" for name, count in counts[:SHOWN])
    return shown + (f", and {len(counts) - SHOWN} more" if len(counts) > SHOWN else "")


def not_read(besides):
    """Says which other files are there, as in: .tif 40, .txt 3, hidden 1."""
    others = sorted(besides.endings.items(), key=lambda pair: (-pair[1], pair[0]))
    parts = [f"{ending or 'without an ending'} {count}" for ending, count in others[:SHOWN_ENDINGS]]
    if rest := sum(count for _, count in others[SHOWN_ENDINGS:]):
        parts.append(f"other endings {rest}")
    if besides.hidden:
        parts.append(f"hidden {besides.hidden}")
    return ", ".join(parts)


def _divide(root, channels=3):
    """The `Division` of a folder.

    If some folders are called like training splits and some like held-out splits, they are splits. If there is only
    one kind, the names of the folders inside tell a split from a class that is called like one.
    """
    names = subfolders(root)
    looking = [name for name in names if split_of(name)]
    if not looking:
        return Division()
    filled = [name for name in names if _holds_images(root / name, channels)]
    training = [name for name in filled if split_of(name) == TRAIN]
    held_out = [name for name in filled if split_of(name) in HELD_OUT]
    others = [name for name in filled if not split_of(name)]
    loose = _loose_images(root, channels)

    def bear_names_of_others(folders):
        return any(not set(others).isdisjoint(subfolders(root / name)) for name in folders)

    if training and held_out:
        if bear_names_of_others(held_out) and not bear_names_of_others(training):
            return Division(tuple(held_out), rest_trains=True, doubtful=tuple(training))
        return Division(tuple(looking))
    if training:
        meant = meant_by(TRAIN, training)
        divided = (
            [name for name in (*meant, *others) if _has_class_folders(root / name, channels)] if others else meant
        )
        if len(meant) == 1 and divided == meant:
            return Division(tuple(looking))
        return Division(doubtful=tuple(training))
    if held_out and (others or loose):
        if bear_names_of_others(held_out) or not others:
            return Division(tuple(held_out), rest_trains=True)
        return Division(doubtful=tuple(held_out))
    return Division() if others else Division(tuple(looking))


def _choose(root, division, wanted, begun):
    """Returns the folder of a split; it is `root` for all of it, or for the folders that are not held out."""
    splits, names = division.splits, subfolders(root)
    kind = split_of(wanted)
    if kind is None and archive.is_dir(root / wanted):
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
        divided = "" if kind == TRAIN else f"put the images into {root}/train and {root}/{wanted}, or "
        way = f"{divided}leave the split out"
        raise ValueError(f"{root} is not divided, so it has no split {wanted!r}. {way[0].upper()}{way[1:]}.")
    if meant:
        raise ValueError(f"{root} has {' and '.join(sorted(meant))}, and {wanted!r} can mean each. Name one of them.")
    raise ValueError(f"{root} has the splits {', '.join(splits)}, not {wanted!r}. Name one of them.")


def _class_folders(root, division, chosen, left_out):
    # Class numbers must agree between splits, even if one split lacks a class.
    if chosen not in [root / name for name in division.splits] and not left_out:
        return tuple(subfolders(chosen))
    names = {name for split in division.splits for name in _subfolders_if_readable(root / split)}
    if division.rest_trains:
        names.update(set(subfolders(root)) - set(division.splits))
    return tuple(sorted(names))


def _notes(division, listing, wanted):
    """Yields sentences: which folders are splits, and which are in none."""
    root, splits = listing.root, division.splits
    if listing.path == root:
        if split_of(wanted) and division.rest_trains:
            yield f"Held out of {printable(root)}: {some(splits)}; the rest is trained on"
    elif listing.path in [root / name for name in splits]:
        yield f"Splits of {printable(root)}: {some(splits)}"
        beside = [name for name in subfolders(root) if name not in splits or split_of(name) == TRAIN]
        folders = [root / name for name in beside if root / name != listing.path]
        channels = listing.channels
        counts = [(path.name, sum(1 for _ in _image_files(path, channels))) for path in folders]
        counts = [(name, count) for name, count in [*counts, ("no folder", _loose_images(root, channels))] if count]
        if counts:
            yield f"Left out, images in: {counted(counts)}; --train_split=. reads all folders, as classes"


def _doubts(division, listing, wanted):
    """Yields sentences: which folders are called like a split, but read as a class or as a part of one."""
    root = listing.root
    if listing.path == root and not split_of(wanted):
        if looking := [name for name in listing.class_names if split_of(name)]:
            yield f"Read as classes, as the split {wanted!r} asks: {some(looking)}"
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
    # In a split, a folder called test is a class like others, unless one called train is beside it.
    deep = listing.path == root or not any(split_of(name) == TRAIN for name in folders)
    inside = [name for name in folders if split_of(name.rsplit("/", 1)[-1]) in HELD_OUT and ("/" in name or not deep)]
    if inside:
        parents = {os.path.dirname(name) for name in inside}
        beside = {os.path.dirname(name) for name in folders if split_of(name.rsplit("/", 1)[-1]) == TRAIN}
        way = "move them out"
        if len(parents) == 1 and parents <= beside:
            way = f"--dataset={printable(listing.path / parents.pop())} reads splits"
        yield f"Called as if held out, but inside of classes and trained on: {some(inside)}; {way}"
    elif len(listing.classes) == 1 and len(folders) > 1 and all("/" in file for file in listing.files):
        name = printable(listing.path / listing.classes[0])
        yield f"All lies in one folder, which is read as the only class; --dataset={name} reads the folders in it"


def list_images(path, folders, root, left_out=(), channels=3):
    """The `Listing` of a folder, without the folders `left_out` in it."""
    besides = Besides()
    images = sorted(_image_files(path, channels, besides, {os.fsencode(name) for name in left_out}))
    if not images:
        others = not_read(besides)
        others = f", but {others}" if others else ""
        raise ValueError(
            f"There are no images ({', '.join(suffixes(channels))}) in {path}{others}. Give a folder that has some."
        )
    files, sizes, times = zip(*images, strict=True)
    sizes, times = np.array(sizes, np.int64), np.array(times, np.int64)
    return Listing(path, folders, list(files), sizes, times, besides, root, channels=channels)


def size_and_time(path):
    """Returns (bytes, modification time in ns) of a file; `UNREADABLE` and 0 for anything else, such as a pipe."""
    try:
        status = archive.stat(path)
    except (OSError, ValueError):  # ValueError: a path with a zero byte, or into a damaged archive
        return UNREADABLE, 0
    return (status.st_size, archive.time_of(status)) if stat.S_ISREG(status.st_mode) else (UNREADABLE, 0)


def divided(listing, numbers, size):
    """Yields listings of the files with these numbers, at most `size` files each."""
    for first in range(0, len(numbers), size):
        some = list(numbers[first : first + size])
        files, sizes, times = [listing.files[n] for n in some], listing.sizes[some], listing.times[some]
        yield dataclasses.replace(listing, files=files, sizes=sizes, times=times)


def require_places(name, source, output):
    """Checks the flags --`name` and --output of a command that reads one folder and writes another.

    Raises:
      ConfigError: one of them is missing or not a folder, or one lies in the other.
    """
    if not source or not output:
        raise ConfigError(f"give --{name}=DIR and --output=DIR: see --help")
    if not os.path.isdir(source):
        what = "a file" if os.path.exists(source) else "not there"
        raise ConfigError(f"--{name} names the folder that holds the {name}; {printable(source)} is {what}")
    if os.path.lexists(output) and not os.path.isdir(output):
        raise ConfigError(f"--output names a folder; {printable(output)} is none: give another")
    real, target = pathlib.Path(source).resolve(), pathlib.Path(output).resolve()
    if real == target or real in target.parents or target in real.parents:
        raise ConfigError(
            f"--{name} and --output lie apart, so that neither holds the other; got {printable(source)} and "
            f"{printable(output)}: give another --output"
        )


def _holds_images(path, channels):
    return any(True for _ in _image_files(path, channels))


def _has_class_folders(path, channels):
    return any(_holds_images(path / name, channels) for name in _subfolders_if_readable(path))


def _loose_images(root, channels):
    """How many images lie in a folder itself."""
    entries = archive.entries(root)
    return sum(_is_image(os.fsencode(entry.name), channels) and _holds(entry.is_file) for entry in entries)


def _is_image(name, channels):
    return name.lower().endswith(_endings(channels)) and not _is_hidden(name)


def _is_hidden(name):
    return name.startswith(b".") or name == APPLES


def _endings(channels):
    return tuple(os.fsencode(suffix) for suffix in suffixes(channels))


def subfolders(path):
    entries = archive.entries(path)
    return sorted(entry.name for entry in entries if _holds(entry.is_dir) and not _is_hidden(os.fsencode(entry.name)))


def _subfolders_if_readable(path):
    try:
        return subfolders(path)
    except PermissionError:
        return []


def _holds(question):
    """Returns what an entry answers (`entry.is_dir`); False for a link in a circle, or to where nobody may look."""
    try:
        return question()
    except OSError:
        return False


def _image_files(path, channels, besides=None, left_out=()):
    return files_called(_endings(channels), os.fsencode(path), besides or Besides(), left_out)


def files_called(endings, root, besides, left_out=()):
    """Yields (path, size, time) of each file below `root` whose name has one of `endings`.

    `endings` and `root` are bytes, since names need not be text. Hidden files and folders are left out. Links are
    followed. A folder that can be reached in several ways is read once, at the shallowest of its paths, so that the
    search ends at a link to a folder above.

    besides: takes note of everything else. left_out: names of folders in `root` itself.
    """
    status = archive.stat(root)
    seen = {(status.st_dev, status.st_ino)}
    level = [b""]
    while level:
        below = []
        for folder in level:
            try:
                entries = archive.entries(os.path.join(root, folder))
            except OSError:
                besides.unread.append(os.fsdecode(folder))
                continue
            prefix = folder + b"/" if folder else b""
            subfolders = []
            for entry in entries:
                name = entry.name
                is_wanted = name.lower().endswith(endings)
                if _is_hidden(name):
                    besides.hidden += is_wanted
                    continue
                if not is_wanted and _holds(entry.is_file):  # without asking for its size
                    ending = _ENDING.search(name)
                    besides.endings[ending[0].lower().decode() if ending else ""] += 1
                    continue
                try:
                    status = entry.stat()
                except OSError:  # a link to nothing
                    if is_wanted:
                        yield os.fsdecode(prefix + name), UNREADABLE, 0
                    continue
                if stat.S_ISDIR(status.st_mode):
                    if not status.st_ino:  # Windows' entries do not know it
                        status = archive.stat(os.path.join(root, prefix + name))
                    subfolders.append((name, status.st_dev, status.st_ino))
                elif is_wanted and stat.S_ISREG(status.st_mode):  # reading a pipe would wait for ever
                    yield os.fsdecode(prefix + name), status.st_size, archive.time_of(status)
            for name, *place in sorted(subfolders):
                if tuple(place) not in seen and (folder or name not in left_out):
                    seen.add(tuple(place))
                    below.append(prefix + name)
                    besides.folders.append(os.fsdecode(prefix + name))
        level = below
