"""A source of things with several pictures each: frames of a clip, shots of an object."""

import dataclasses
import os
import re

import numpy as np
import tensorflow as tf

from moco_tf.data.sources import Source
from moco_tf.files import printable


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Things(Source):
    """Things by number. A record is {"files": string (F,), the thing's pictures in order; "id", "label"}.

    `contents` holds the things' names.
    """

    unit = "things"

    files: tf.Tensor  # string (all pictures,), thing by thing
    starts: np.ndarray  # (size + 1,) int64: where each thing's pictures begin, and the end

    def only(self, numbers):
        """A source of the things with these numbers; they are numbered anew."""
        pictures = [np.arange(self.starts[number], self.starts[number + 1]) for number in numbers]
        with tf.device("CPU:0"):
            files = tf.gather(self.files, np.concatenate(pictures))
        starts = np.cumsum([0, *map(len, pictures)])
        return dataclasses.replace(super().only(numbers), files=files, starts=starts)

    @property
    def counts(self):
        """How many pictures each thing has, int64 (size,)."""
        return np.diff(self.starts)

    @tf.autograph.experimental.do_not_convert
    def record(self, index):
        """The record of this number, as graph operations."""
        index = tf.cast(index, tf.int64)
        begin, end = tf.unstack(tf.gather(self.starts, [index, index + 1]))
        return {"files": self.files[begin:end], "id": index, "label": self.labels[index]}


def of_images(source):
    """The `Things` of a folder's images: each sub-folder that holds images is one, its good images are its pictures.

    Pictures are in the order of their names, with numbers by value: frame 9 comes before frame 10. A thing has the
    label of its pictures.

    Raises:
      ValueError: the images are not files, or none lies in a sub-folder.
    """
    if source.orientations is not None:
        raise ValueError("--exif does not turn pictures of things; moco_tf.data.convert writes them upright")
    if source.paths is None:
        raise ValueError(f"things are the sub-folders of a folder of images, --dataset=DIR; {source.name} has none")
    root = os.fsencode(source.name)
    paths, labels = source.paths.numpy(), source.labels.numpy()
    pictures = {}
    for number in source.good.tolist():
        folder, file = os.path.split(os.path.relpath(paths[number], root))
        if folder:
            pictures.setdefault(folder, []).append((_natural(file), number))
    if not pictures:
        raise ValueError(f"things are sub-folders with pictures of one thing each; {printable(root)} has none")
    names = sorted(pictures, key=_natural)
    numbers = [[number for _, number in sorted(pictures[name])] for name in names]
    with tf.device("CPU:0"):
        return Things(
            name=source.name,
            contents=tf.constant(names),
            labels=tf.constant([labels[of_thing[0]] for of_thing in numbers], tf.int64),
            class_names=source.class_names,
            files=tf.constant([paths[number] for of_thing in numbers for number in of_thing]),
            starts=np.cumsum([0, *map(len, numbers)]),
        )


def _natural(name):
    """A key that sorts names as people number them."""
    return [(int(part), b"") if part.isdigit() else (-1, part) for part in re.split(rb"(\d+)", name)]
