"""Where records come from: the packaged images, or a folder.

A record is {"image": encoded bytes, "id": int64, "label": int64, -1 if unknown}. A source gives any record by its
number, so that the order of training is a function of (seed, position) and an interrupted run goes on by computing
where it was.
"""

import dataclasses
import functools
import os
import pathlib
from collections.abc import Callable

import numpy as np
import tensorflow as tf

CIFAR10_CLASSES = (
    "airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck",
)  # fmt: skip
EMBEDDED = pathlib.Path(__file__).parent / "embedded"
EMBEDDED_SPLITS = ("train", "test")
HELD_OUT = ("val", "validation", "test")  # folders of this name, beside one called train, are splits
SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".gif")


@dataclasses.dataclass(frozen=True, eq=False)
class Source:
    """Images by number. `contents` holds a string an image, `read` makes its encoded bytes of it, in the graph."""

    name: str
    contents: tf.Tensor  # (size,) string
    labels: tf.Tensor  # (size,) int64, -1 where unknown
    class_names: tuple = ()
    read: Callable = tf.identity

    @property
    def size(self):
        return int(self.contents.shape[0])

    def record(self, index):
        """The record of this number, as graph operations."""
        index = tf.cast(index, tf.int64)
        return {"image": self.read(self.contents[index]), "id": index, "label": self.labels[index]}

    def in_order(self, limit=None):
        """All records once, by number; or `limit` of them, evenly spread."""
        numbers = np.linspace(0, self.size - 1, min(limit or self.size, self.size)).round().astype(np.int64)
        records = tf.data.Dataset.from_tensor_slices(numbers).map(self.record, num_parallel_calls=tf.data.AUTOTUNE)
        return records.prefetch(tf.data.AUTOTUNE)

    def shuffled(self, seed, start=0, per_epoch=None, share=(0, 1, 1)):
        """Endless (epoch, record) pairs from position `start` on.

        Position p is place p % per_epoch of epoch p // per_epoch, and the order of an epoch is a permutation that
        (seed, epoch) alone determines. `per_epoch` below the size leaves out other records in every epoch.

        share: (first, count, of): takes `count` positions from the `first` on of each `of`; `start` is a multiple.
        """
        per_epoch = self.size if per_epoch is None else per_epoch
        if not 0 < per_epoch <= self.size:
            raise ValueError(f"An epoch has 1 to {self.size} records (all of {self.name}), not {per_epoch}.")

        def at(position):
            epoch, place = position // per_epoch, position % per_epoch
            key = tf.stack([tf.constant(seed, tf.int64), epoch])
            return epoch, self.record(tf.random.experimental.index_shuffle(place, key, self.size - 1))

        first, count, of = share
        taken = tf.data.Dataset.counter(start // of * count).map(lambda i: i // count * of + first + i % count)
        return taken.map(at, num_parallel_calls=tf.data.AUTOTUNE)


def embedded(split):
    """The packaged part of CIFAR-10 (see embedded/README.md): `split` is "train", 10,000 images, or "test", 2,000."""
    if split not in EMBEDDED_SPLITS:
        raise ValueError(f"The embedded data set has the splits train and test, not {split!r}.")
    contents, labels = _read_embedded(split)
    return Source(f"embedded {split}", contents, labels, CIFAR10_CLASSES)


def folder(path, split=None):
    """The images at any depth of a folder, ordered by path; the first level of sub-folders are the classes.

    Where there is a folder `train`, it and `val`, `validation` or `test` beside it are splits; `split` is "train"
    if it is not given, and the three other names stand for one another where only one is there.
    """
    root = pathlib.Path(path).expanduser()
    if not root.exists():
        raise ValueError(f"There is no folder {path}. Give the folder that holds the images.")
    if not root.is_dir():
        raise ValueError(f"{path} is a file. Give the folder that holds the images.")
    splits = _splits(root)
    chosen = _choose_split(root, splits, split)
    # Numbers of classes must agree between splits, even if one lacks a class.
    sharing = [root / name for name in splits] if chosen.name in splits else [chosen]
    class_names = sorted({name for one in sharing for name in _subfolders(one)})
    files = sorted(_image_files(chosen))
    if not files:
        raise ValueError(f"There are no images ({', '.join(SUFFIXES)}) in {chosen}. Give a folder that has some.")
    number = {name: label for label, name in enumerate(class_names)}
    labels = [number.get(file.split("/", 1)[0], -1) if "/" in file else -1 for file in files]
    with tf.device("CPU:0"):
        contents = tf.constant([str(chosen / file) for file in files])
        labels = tf.constant(labels, tf.int64)
    return Source(str(chosen), contents, labels, tuple(class_names), read=tf.io.read_file)


@functools.cache
def _read_embedded(split):
    file = EMBEDDED / f"{split}.tfrecord.gz"
    examples = list(tf.data.TFRecordDataset(str(file), compression_type="GZIP").as_numpy_iterator())
    with tf.device("CPU:0"):
        parsed = tf.io.parse_example(
            np.array(examples, object),
            {"image": tf.io.FixedLenFeature((), tf.string), "label": tf.io.FixedLenFeature((), tf.int64)},
        )
        return tf.identity(parsed["image"]), tf.identity(parsed["label"])


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


def _image_files(path):
    """Paths of the images below `path`, relative to it, with forward slashes. Hidden files and folders are not."""
    for directory, subfolders, names in os.walk(path, followlinks=True):
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        for name in names:
            if name.lower().endswith(SUFFIXES) and not name.startswith("."):
                yield pathlib.Path(directory, name).relative_to(path).as_posix()
