"""Defines a source of records, and the packaged images; `folder.py` and `tfds.py` make the other sources.

A record is {"image": encoded bytes, "id": int64, "label": int64, -1 if unknown}. If the source is `read_as` another
number of channels than 3, the image is uint8 (H, W, channels). A source has a `name`, a `size`, `class_names`,
`labelled`, `paths`, `only(numbers)`, `shared_with(other)`, `in_order(limit, wanted)`, `unchecked()`,
`read_as(channels)`, `cost_of_entering(place)` and `shuffled(seed, start, per_epoch, share)`. The order of training is
a function of (seed, position), so that an interrupted run goes on by computing where it was.
"""

import dataclasses
import functools
import os
import pathlib
from collections.abc import Callable

import numpy as np
import tensorflow as tf

from moco_tf.data import archive, encoded, in_memory
from moco_tf.data.pipeline import fixed, parallel_map

CIFAR10_CLASSES = (
    "airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck",
)  # fmt: skip
EMBEDDED = pathlib.Path(__file__).parent / "embedded"
AT_ONCE = 32  # images of an archive in a call of Python; the call costs several times the work on one image
BYTES_AT_ONCE = 2**26  # that such a call may read, or one image: a small archive can hold large members
WHOLE = (0, 1, 1)  # the share that takes every position
EMBEDDED_SPLITS = ("train", "test")


class Permutation:
    """The order of training: position p is place p % per_epoch of epoch p // per_epoch.

    The order of an epoch is a permutation of `size` numbers that (seed, epoch) alone determines. If `per_epoch`
    is below the size, every epoch leaves out other numbers.
    """

    def __init__(self, size, seed, per_epoch=None, name="the source"):
        self.size, self.seed = size, seed
        self.per_epoch = size if per_epoch is None else per_epoch
        if not 0 < self.per_epoch <= size:
            raise ValueError(f"An epoch has 1 to {size} records (all of {name}), not {per_epoch}.")

    def __call__(self, position):
        """(epoch, number) at a position, or at several (N,) of one epoch: int64, as graph operations."""
        epoch, place = position // self.per_epoch, position % self.per_epoch
        epoch = tf.reshape(epoch, (-1,))[0]
        key = tf.stack([tf.constant(self.seed, tf.int64), epoch])
        return epoch, tf.random.experimental.index_shuffle(place, key, self.size - 1)


@dataclasses.dataclass(frozen=True, eq=False)
class Source:
    """Images by number. `contents` holds a string per image; `read` turns it into encoded bytes, in the graph.

    If an image cannot be decoded, another stands in for it: `stand_ins[i]` is the number of the image that is taken
    for number i, and i itself if its image is good. Numbers, and so positions, do not shift.
    """

    unit = "images"  # what `size` counts

    name: str
    contents: tf.Tensor  # (size,) string
    labels: tf.Tensor  # (size,) int64, -1 where unknown
    class_names: tuple = ()
    read: Callable = tf.identity
    at_once: int = AT_ONCE  # images of archives that are read in one call
    stand_ins: np.ndarray | None = None  # (size,) int64
    orientations: np.ndarray | None = None  # (size,) int32: how each JPEG is to be turned; None: as they are stored
    channels: int = 3  # of a record's image: bytes for 3, else pixels, uint8 (H, W, channels)

    @property
    def size(self):
        return int(self.contents.shape[0])

    @property
    def labelled(self):
        """Whether any image has a label."""
        return bool(tf.reduce_any(self.labels >= 0))

    def cost_of_entering(self, place):
        """Says in a sentence what beginning at a place of an epoch costs: nothing here, as any record can be had."""

    @tf.autograph.experimental.do_not_convert  # tracing takes half as long
    def record(self, index, image=None):
        """The record of this number, as graph operations. image: its encoded bytes, if they are read already."""
        index = self._standing_in(tf.cast(index, tf.int64))
        if image is None:
            image = self.read(self.contents[index])
        if self.orientations is not None:
            image = encoded.upright(image, tf.constant(self.orientations)[index])
        if self.channels != 3:
            image = encoded.decode(image, self.channels)
        return {"image": image, "id": index, "label": self.labels[index]}

    def _standing_in(self, numbers):
        return numbers if self.stand_ins is None else tf.gather(tf.constant(self.stand_ins), numbers)

    def _records(self, numbers):
        """A dataset of numbers -> the dataset of their records, in the same order."""
        if self.read is not read_file:
            return parallel_map(numbers, self.record)
        several = parallel_map(numbers.batch(self.at_once), lambda numbers: (numbers, self._members(numbers)))
        return parallel_map(several.unbatch(), self.record)

    def _members(self, numbers):
        """The encoded bytes of the images with these numbers (N,), which may lie in archives."""
        return _read_members(tf.gather(self.contents, self._standing_in(numbers)))

    def read_as(self, channels):
        """This source with images of so many channels."""
        return self if channels == self.channels else dataclasses.replace(self, channels=channels)

    @property
    def good(self):
        """The numbers of the images that can be decoded, int64 (N,)."""
        numbers = np.arange(self.size)
        return numbers if self.stand_ins is None else numbers[self.stand_ins == numbers]

    @property
    def paths(self):
        """The images' files, string (size,), which may be members of archives; None where they are not files."""
        return self.contents if self.read in (tf.io.read_file, read_file) else None

    @functools.cached_property
    def decoded(self):
        """All images, uint8 (R, H, W, channels), which stay in memory; raises as `in_memory.decoded`."""
        return in_memory.decoded(self)

    def only(self, numbers):
        """A source of the images with these numbers; they are numbered anew."""
        with tf.device("CPU:0"):
            contents, labels = tf.gather(self.contents, numbers), tf.gather(self.labels, numbers)
        turns = None if self.orientations is None else self.orientations[numbers]
        return dataclasses.replace(self, contents=contents, labels=labels, stand_ins=None, orientations=turns)

    def with_classes(self, names):
        """This source with its labels numbered by these `names`, among which all of its own are."""
        numbers = tf.constant([names.index(name) for name in self.class_names] or [0], tf.int64)
        with tf.device("CPU:0"):
            labels = tf.where(self.labels < 0, self.labels, tf.gather(numbers, tf.maximum(self.labels, 0)))
        return dataclasses.replace(self, labels=labels, class_names=tuple(names))

    def shared_with(self, other):
        """Counts the images of another source that this one has, too, as names and paths tell."""
        if self.paths is None or other.paths is None:
            return other.size if self.name == other.name else 0
        known = set(_real_paths(self))
        return sum(path in known for path in _real_paths(other))

    def in_order(self, limit=None, wanted=None):
        """Returns all good records once, by number, or `limit`, evenly spread; keeps those `wanted`, bool (size,)."""
        numbers = self.good[evenly_spread(len(self.good), limit)]
        numbers = numbers if wanted is None else numbers[wanted[numbers]]
        return fixed(self._records(tf.data.Dataset.from_tensor_slices(numbers)))

    def unchecked(self):
        """Returns all records once, by number; a bad image has the record of its stand-in."""
        return fixed(self._records(tf.data.Dataset.range(self.size)))

    def shuffled(self, seed, start=0, per_epoch=None, share=WHOLE):
        """Endless (epoch, record) pairs from position `start` on, in the order of a `Permutation`.

        share: (first, count, of): takes `count` of each `of` positions, from the `first` on; `start` is a multiple
        of `of`.
        """
        order = Permutation(self.size, seed, per_epoch, self.name)

        @tf.autograph.experimental.do_not_convert
        def at(position):
            epoch, number = order(position)
            return epoch, self.record(number)

        first, count, of = share
        taken = tf.data.Dataset.counter(start // of * count).map(lambda i: i // count * of + first + i % count)
        if self.read is read_file:
            several = parallel_map(taken, order).batch(self.at_once)
            several = parallel_map(several, lambda epochs, numbers: (epochs, numbers, self._members(numbers)))
            return fixed(parallel_map(several.unbatch(), lambda epoch, *one: (epoch, self.record(*one))))
        return fixed(parallel_map(taken, at))

    def shuffled_numbers(self, length, seed, start=0, per_epoch=None, share=WHOLE):
        """Like `shuffled`, but gives (epoch, numbers int64 (length,)): `length` records at once, all of one epoch."""
        order = Permutation(self.size, seed, per_epoch, self.name)
        first, count, of = share

        def at(begin):
            i = begin + tf.range(length, dtype=tf.int64)
            epoch, numbers = order(i // count * of + first + i % count)
            return epoch, self._standing_in(numbers)

        return fixed(tf.data.Dataset.counter(start // of * count, length).map(at))


def numbered_alike(*sources):
    """Returns the sources with one number for each class: splits that are listed alone may lack classes."""
    names = tuple(dict.fromkeys(name for source in sources for name in source.class_names))
    return [source if source.class_names == names else source.with_classes(names) for source in sources]


def read_file(path):
    """Reads the bytes of a file, a scalar string, as `tf.io.read_file` does, also in an archive (`archive.py`)."""
    may_be_member = tf.strings.regex_full_match(path, archive.INSIDE)
    content = tf.cond(may_be_member, lambda: _read_members(path[tf.newaxis])[0], lambda: tf.io.read_file(path))
    return tf.ensure_shape(content, ())


def _read_members(paths):
    """The bytes of files, (N,) strings, which may be members of archives."""
    # Stateless, like other reading: files that nobody takes are not read.
    return tf.ensure_shape(tf.numpy_function(archive.read_all, [paths], tf.string, stateful=False), (None,))


def _real_paths(source):
    """Returns the paths of a source's files; links that lead to the source's folder are resolved."""
    paths, folder = source.paths.numpy(), os.fsencode(source.name)
    real = os.path.realpath(folder)
    if real == folder:
        return paths
    return [real + path[len(folder) :] if path.startswith(folder + b"/") else path for path in paths]


def evenly_spread(size, limit=None):
    """The numbers below `size`, or `limit` of them, evenly spread: int64 (N,)."""
    return np.linspace(0, size - 1, min(limit or size, size)).round().astype(np.int64)


def embedded(split):
    """The packaged part of CIFAR-10 (see embedded/README.md): `split` is "train", 10,000 images, or "test", 2,000."""
    if split not in EMBEDDED_SPLITS:
        raise ValueError(f"The embedded data set has the splits train and test, not {split!r}.")
    contents, labels = _read_embedded(split)
    return Source(f"embedded {split}", contents, labels, CIFAR10_CLASSES)


@functools.cache
def _read_embedded(split):
    file = EMBEDDED / f"{split}.tfrecord.gz"
    with tf.device("CPU:0"):
        examples = tf.data.TFRecordDataset(str(file), compression_type="GZIP").batch(10_000).get_single_element()
        parsed = tf.io.parse_example(
            examples,
            {"image": tf.io.FixedLenFeature((), tf.string), "label": tf.io.FixedLenFeature((), tf.int64)},
        )
        return tf.identity(parsed["image"]), tf.identity(parsed["label"])
