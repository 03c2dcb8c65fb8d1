"""A part: a folder on disk with a line and a vector for each image. An index holds one part, merged from others.

images.csv has a line for each encoded image. vectors.npy has a row for each such line, float16 of unit length.
broken.csv has the images that cannot be decoded. Paths are relative to the folder of images and keep their bytes.
Axes: N images, D numbers of a vector.
"""

import csv
import dataclasses
import os
from pathlib import Path
from typing import NamedTuple

import numpy as np

from moco_tf import files
from moco_tf.command import ConfigError
from moco_tf.data.folder import UNKNOWN
from moco_tf.files import printable

BLOCK = 8192  # vectors in memory at a time


class Image(NamedTuple):
    """A line of images.csv. brightness, contrast: mean and standard deviation of the view's grey values, 0 to 255."""

    path: str
    size: int  # bytes
    mtime_ns: int
    height: int
    width: int
    brightness: float
    contrast: float


class Broken(NamedTuple):
    """A line of broken.csv."""

    path: str
    size: int
    mtime_ns: int
    problem: str


@dataclasses.dataclass(frozen=True, eq=False)
class Part:
    """images, broken: lists of `Image` and `Broken`, sorted by path; vectors: float16 (N, D), on disk."""

    images: list
    broken: list
    vectors: np.ndarray

    def known(self):
        """Returns {path: (size, mtime_ns)} of all files, including broken files."""
        return {file.path: (file.size, file.mtime_ns) for file in (*self.images, *self.broken)}


def write(folder, images, broken, blocks, width):
    """Writes a part into an empty folder that exists.

    Args:
      blocks: arrays (n, D) of vectors, together one row for each of `images`; width: D.
    """
    folder = Path(folder)
    files.write_csv(folder / "images.csv", Image._fields, images)
    files.write_csv(folder / "broken.csv", Broken._fields, broken)
    with open(folder / "vectors.npy", "wb") as file:
        about = {"descr": "<f2", "fortran_order": False, "shape": (len(images), width)}
        np.lib.format.write_array_header_1_0(file, about)
        for block in blocks:
            file.write(np.ascontiguousarray(block, "<f2").tobytes())


def read(folder):
    """Returns the `Part` in a folder.

    Raises:
      ConfigError: a file is missing or differs from what `write` makes.
    """
    folder = Path(folder)
    images, broken = _read_rows(folder / "images.csv", Image), _read_rows(folder / "broken.csv", Broken)
    try:
        rows = vectors(folder)
        fits = rows.dtype == np.float16 and rows.ndim == 2 and len(rows) == len(images)
    except (FileNotFoundError, ValueError, EOFError):  # another error, such as too many open files, is the system's
        fits = False
    if not fits:
        raise damaged(folder / "vectors.npy")
    return Part(images, broken, rows)


class Closed:
    """The vectors of the part in a folder, opened for each access: many parts would need too many open files."""

    def __init__(self, folder):
        self.folder, self.shape = folder, vectors(folder).shape

    def __getitem__(self, rows):
        return vectors(self.folder)[rows]


def vectors(folder):
    """Returns the vectors of the part in a folder, which stay on disk."""
    return np.load(Path(folder) / "vectors.npy", mmap_mode="r")


def damaged(path):
    """Returns the error for a file of an index that is missing or damaged."""
    return ConfigError(
        f"{printable(path)} is missing or damaged: move the folder {printable(path.parent.parent)} away, and build "
        "the index anew"
    )


def merged(parts, wanted=None):
    """Merges parts; returns (images, broken, blocks of the images' vectors), sorted by path, as `write` takes them.

    parts: if several parts have a file, the last part counts.
    wanted: {path: (size, mtime_ns)}: leaves out files not in it, or with another size or time; None: takes all files.
    """
    good, broken = {}, {}
    for number, part in enumerate(parts):
        for row, image in enumerate(part.images):
            good[image.path] = (number, row)
            broken.pop(image.path, None)
        for file in part.broken:
            broken[file.path] = file
            good.pop(file.path, None)

    def is_wanted(file):
        stat = wanted and wanted.get(file.path)
        return wanted is None or stat == (file.size, file.mtime_ns) or (stat and file.mtime_ns == UNKNOWN)

    places = [(number, row) for _, (number, row) in sorted(good.items()) if is_wanted(parts[number].images[row])]
    images = [parts[number].images[row] for number, row in places]
    return images, [file for _, file in sorted(broken.items()) if is_wanted(file)], _gathered(parts, places)


def _gathered(parts, places):
    """Yields blocks of the vectors at (number of the part, row)."""
    for first in range(0, len(places), BLOCK):
        numbers, rows = np.array(places[first : first + BLOCK]).T
        block = np.empty((len(rows), parts[numbers[0]].vectors.shape[1]), np.float16)
        for number in np.unique(numbers):
            block[numbers == number] = parts[number].vectors[rows[numbers == number]]
        yield block


def _read_rows(path, kind):
    types = [kind.__annotations__[name] for name in kind._fields]
    try:
        with open(path, newline="", encoding="utf-8", errors="surrogateescape") as file:
            rows = csv.reader(file)
            if next(rows, None) != list(kind._fields):
                raise ValueError
            found = [kind(*(of(value) for of, value in zip(types, row, strict=True))) for row in rows]
        if any(os.path.isabs(row.path) or ".." in Path(row.path).parts for row in found):
            raise ValueError  # they would lead out of the folder of images
        return found
    except (FileNotFoundError, ValueError, csv.Error):
        raise damaged(path) from None
