"""Finds which images of a folder can be decoded: `check_files` makes a `Checked`, which gives a `Source`.

The manifest remembers the verdicts, so that a second start reads only files that have changed. It also remembers the
order of the files, so that a run goes on with the images that it began with.
"""

import csv
import dataclasses
import functools
import os

import numpy as np
import tensorflow as tf

from moco_tf.data import archive
from moco_tf.data import check as checking
from moco_tf.data.check import Verdict
from moco_tf.data.errors import of_the_system
from moco_tf.data.folder import OF_IMAGES, UNKNOWN, UNREADABLE, Listing, list_images, size_and_time, some, subfolders
from moco_tf.data.sources import AT_ONCE, BYTES_AT_ONCE, Source, read_file
from moco_tf.data.splits import split_of
from moco_tf.files import printable, write_csv

GONE = "no such file"
COLUMNS = ("path", "size", "mtime_ns", "problem", "format", "height", "width", "peak", "orientation")
RULES = "rules 2"  # of the checks: a manifest made by other rules is not believed
EARLIER = (*COLUMNS[:7], "rules 1")  # except by a run that began with it, as far as it goes


@dataclasses.dataclass(frozen=True, eq=False)
class Checked:
    """A listing with a `Verdict` for each file, and the number of files left out, as they came after the run began."""

    listing: Listing
    verdicts: list
    added: int = 0

    @property
    def bad(self):
        """(path, problem) of each file that cannot be decoded."""
        pairs = zip(self.listing.files, self.verdicts, strict=True)
        return [(file, verdict.problem) for file, verdict in pairs if verdict.problem]

    def source(self, exif=False):
        """Returns the `Source`; the next good file by path stands in for a bad one, and the first after the last.

        exif: whether images are turned as EXIF says.

        Raises:
          ValueError: there is no good file.
        """
        listing = self.listing
        good = np.array([not verdict.problem for verdict in self.verdicts])
        numbers = np.flatnonzero(good)
        if not len(numbers):
            raise ValueError(
                f"None of the {listing.size} images in {listing.title} can be decoded: {_bad_ones(self.bad)}."
            )
        stand_ins = numbers[np.searchsorted(numbers, np.arange(listing.size)) % len(numbers)]
        turns = np.array([verdict.orientation or 1 for verdict in self.verdicts], np.int32)
        root = os.fsencode(listing.path)
        with tf.device("CPU:0"):
            contents = tf.constant([os.path.join(root, os.fsencode(file)) for file in listing.files])
            labels = tf.constant(listing.labels, tf.int64)
        return Source(
            str(listing.path),
            contents,
            labels,
            listing.class_names,
            read=_reader(listing),
            at_once=int(np.clip(BYTES_AT_ONCE // max(listing.sizes.max(initial=1), 1), 1, AT_ONCE)),
            stand_ins=None if good.all() else stand_ins,
            orientations=turns if exif and (turns > 1).any() else None,
        )


def check_files(listing, manifest=None, begun=False, writes=True):
    """Returns a `Checked` listing; files that the manifest knows are not read again.

    manifest: a file to believe where path, size and time are the same, and to write; None: check all.
    writes: whether to write the manifest; if several machines train together, one does.
    begun: whether the manifest is that of a run under way. Its images and their order are kept: images that are gone
    are bad, and images that have come since are left out.
    """
    known = _read(manifest, begun, _rules(listing)) if manifest else {}
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
        of_unknown = checking.verdicts(paths, _reader(listing), len(unknown), listing.channels)
        for number, verdict in zip(unknown, of_unknown, strict=True):
            verdicts[number] = verdict
    checked = Checked(listing, verdicts, added)
    if manifest and writes and (unknown or list(known) != listing.files):
        _write(manifest, checked)
    return checked


def too_many_bad(bad, total, most):
    """Returns the refusal of a set if more than the fraction `most` of it is bad, else None."""
    if len(bad) <= most * total:
        return None
    return (
        f"at most --max_bad_fraction={most:g} of the images may be undecodable; {len(bad)} of {total} are: "
        f"{_bad_ones(bad)}. Mend or remove them, or allow more"
    )


def _reader(listing):
    # `read_file` takes members of archives as well, through Python.
    return read_file if listing.archived else tf.io.read_file


def _bad_ones(bad):
    return some([f"{name} ({problem})" for name, problem in bad])


def _as_begun(listing, files):
    """(a listing of the `files` with which a run began, how many others there are)."""
    place = _where_begun(listing, files)
    if place != listing.path:
        begun = list_images(place, tuple(subfolders(place)), listing.root, channels=listing.channels)
        new = f"a new one would read {printable(listing.path)}"
        listing = dataclasses.replace(begun, doubts=(f"The run began with {printable(place)} and keeps to it; {new}",))
    now = {file: number for number, file in enumerate(listing.files)}
    numbers = [now.get(file) for file in files]
    stats = [
        size_and_time(listing.path / file) if n is None else (listing.sizes[n], listing.times[n])
        for n, file in zip(numbers, files, strict=True)
    ]
    added = listing.size - sum(number is not None for number in numbers)
    sizes, times = np.array(stats, np.int64).T
    return dataclasses.replace(listing, files=files, sizes=sizes, times=times), added


def _where_begun(listing, files):
    """Returns the folder of a run's files: that of the listing, unless another folder has more of them.

    In an earlier version, or before new folders came, the split may have meant another folder.
    """
    if listing.label_of is not None:  # a list of files, or several folders
        return listing.path
    sample = files[:: max(1, len(files) // 50)]
    looking = [listing.root / name for name in subfolders(listing.root) if split_of(name)]
    places = (listing.path, listing.root, *looking)
    return max(places, key=lambda place: sum(archive.exists(place / file) for file in sample))  # the first of the best


def _rules(listing):
    """Names the checks of a listing's files; arrays are also checked for their number of channels."""
    return RULES if listing.channels in OF_IMAGES else f"{RULES}, {listing.channels} channels"


def _read(manifest, begun, rules):
    """{path: (size, time, Verdict)} in the order of the manifest; empty if it is missing or not to be believed."""
    try:
        with open(manifest, newline="", encoding="utf-8", errors="surrogateescape") as file:
            rows = csv.reader(file)
            first = next(rows, None)
            if first == [*EARLIER] and begun:
                rows = ([*row, "", ""] for row in rows)
            elif first != [*COLUMNS, rules]:
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
    stats = zip(listing.files, listing.sizes.tolist(), listing.times.tolist(), checked.verdicts, strict=True)
    # What the system refused once, such as a file without the right to read it, is asked anew at the next start.
    rows = (
        (path, size, UNKNOWN if of_the_system(verdict.problem) else time, *verdict)
        for path, size, time, verdict in stats
    )
    write_csv(manifest, [*COLUMNS, _rules(listing)], rows)
