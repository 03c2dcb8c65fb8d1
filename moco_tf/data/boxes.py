"""Images with boxes: COCO's files, Pascal VOC's folders, or a data set of TFDS.

A record is that of `sources.py` with three more fields. "boxes", float32 (n, 4), has left, top, right, bottom in
pixels of the image as it is stored; a stream has "relative_boxes", fractions of height and width, instead. "classes"
is int64 (n,). "crowds", bool (n,), marks what is neither learnt nor counted: COCO's crowds and VOC's difficult
objects.
"""

import collections
import dataclasses
import logging
import os

import numpy as np
import tensorflow as tf

from moco_tf.command import ConfigError
from moco_tf.data import annotated, coco, tfds, voc
from moco_tf.data.sources import Source
from moco_tf.files import expanded, printable

log = logging.getLogger("moco_tf")
LEAST_SIDE = 1e-3  # pixels: a thinner box is empty


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Boxed(Source):
    """Images by number, each with any number of boxes."""

    boxes: tf.RaggedTensor  # float32 (size, None, 4)
    classes: tf.RaggedTensor  # int64 (size, None)
    crowds: tf.RaggedTensor  # bool (size, None)

    def only(self, numbers):
        """A source of the images with these numbers; they are numbered anew."""
        with tf.device("CPU:0"):
            ragged = {name: tf.gather(getattr(self, name), numbers) for name in ("boxes", "classes", "crowds")}
        return dataclasses.replace(super().only(numbers), **ragged)

    def with_classes(self, names):
        """Returns the same images with their classes numbered as in `names`, which has all of the classes."""
        numbers = tf.constant([names.index(name) for name in self.class_names], tf.int64)
        classes = self.classes.with_flat_values(tf.gather(numbers, self.classes.flat_values))
        return dataclasses.replace(self, class_names=tuple(names), classes=classes)

    @tf.autograph.experimental.do_not_convert
    def record(self, index):
        """The record of this number, as graph operations."""
        record = super().record(index)
        number = record["id"]
        return record | {
            "boxes": self.boxes[number],
            "classes": self.classes[number],
            "crowds": self.crowds[number],
        }


def find(dataset, data_dir, split, max_bad_fraction, remembered=None):
    """Finds the source of images with boxes that --dataset and a split name; says what it holds.

    Args:
      dataset: a folder with COCO's annotation files or Pascal VOC's folders, or a set of TFDS with boxes. In VOC,
        "VOC2007/trainval+VOC2012/trainval" is a split of the folder VOCdevkit.
      data_dir: as `dataset.find` has it.
      remembered: a file that remembers which images can be decoded.

    Raises:
      ConfigError: there is no such data set, or its annotations cannot be used as they are.
    """
    root = expanded(data_dir, dataset)
    try:
        if root.exists() and not tfds.is_prepared(root):
            source = _of_folder(root, split, max_bad_fraction, remembered)
        else:
            source = tfds.find(dataset, data_dir, split, max_bad_fraction, _of_objects)
    except ValueError as error:
        raise ConfigError(f"--dataset={printable(dataset)}: {error}") from None
    return source


def _of_folder(root, split, max_bad_fraction, remembered):
    parts = annotated.parts(split)
    if file := coco.file_of(root, split):
        paths, sizes, *annotations, names = coco.read(file, root, split)
    elif any(voc.is_at(root, part) for part, _ in parts):
        paths, sizes, *annotations, names = voc.boxes(root, parts)
    else:
        wanted = ", ".join(name.format(split) for name in coco.FILES)
        raise ValueError(
            f"boxes come from COCO's annotation file of the split {split!r} ({wanted}) or from Pascal VOC's folders "
            f"({voc.IMAGES}, {voc.ANNOTATIONS}, {voc.SETS}); {printable(str(root))} has neither"
        )
    if not paths or not names:
        raise ValueError(
            f"the split {split!r} names {len(paths)} images and {len(names)} classes; a detector needs both"
        )
    log.info(f"{printable(str(root))}, {split}: {len(paths)} images")
    checked = annotated.check(root, paths, remembered, max_bad_fraction)
    boxes, classes, crowds = ([values[number] for number in checked.good] for values in annotations)
    paths = [paths[number] for number in checked.good]
    _check_sizes(np.array(sizes)[checked.good], checked.sizes, paths)
    boxes, kept = repaired(boxes, checked.sizes, paths)
    classes, crowds = ([of[k] for of, k in zip(values, kept, strict=True)] for values in (classes, crowds))
    _say(boxes, classes, crowds, names)
    with tf.device("CPU:0"):
        contents = tf.constant([os.path.join(os.fsencode(root), os.fsencode(path)) for path in paths])
        return Boxed(
            printable(str(root)) + f" {split}",
            contents,
            tf.fill((len(paths),), tf.constant(-1, tf.int64)),
            names,
            tf.io.read_file,
            boxes=_ragged(boxes, np.float32, (4,)),
            classes=_ragged(classes, np.int64),
            crowds=_ragged(crowds, bool),
        )


def in_pixels(record, size):
    """Returns a record's boxes in pixels, float32 (n, 4), and which of them have an area, bool (n,).

    size: height and width of the image. Only the boxes that have an area are returned.
    """
    boxes = record.get("boxes")
    if boxes is None:
        boxes = record["relative_boxes"] * tf.cast(tf.gather(size, [1, 0, 1, 0]), tf.float32)
    kept = tf.reduce_all(boxes[:, 2:] - boxes[:, :2] > LEAST_SIDE, axis=1)
    return tf.boolean_mask(boxes, kept), kept


def repaired(boxes, sizes, names):
    """Cuts boxes to their images; returns (list of (m, 4), list of bool (n,): which boxes are left); says how many.

    The part of a box over the image's edge is cut off. A box that then has no area is left out.

    Args:
      boxes: a list of float64 (n, 4), left, top, right, bottom.
      sizes: heights and widths of the images, (N, 2).
      names: the images' names, for messages.

    Raises:
      ValueError: a coordinate is not finite.
    """
    counts = collections.Counter()
    inside, with_area = [], []
    for of_image, (height, width), name in zip(boxes, sizes, names, strict=True):
        if not np.isfinite(of_image).all():
            raise ValueError(f"boxes are finite numbers; one of {printable(name)} is {of_image.tolist()}")
        clipped = np.clip(of_image, 0, np.array([width, height, width, height]))
        kept = (clipped[:, 2:] - clipped[:, :2] > LEAST_SIDE).all(axis=1)
        counts["empty"] += int((~kept).sum())
        counts["over"] += int((np.abs(clipped - of_image) > LEAST_SIDE).any(axis=1)[kept].sum())
        inside.append(clipped[kept])
        with_area.append(kept)
    if counts["over"]:
        log.warning(f"  Cut off at the image's edge: {counts['over']} boxes that stand over it")
    if counts["empty"]:
        log.warning(f"  Left out: {counts['empty']} boxes without area inside their image")
    return inside, with_area


def _check_sizes(said, found, names):
    """Refuses images whose sizes, (N, 2), differ from the annotations' (0: not given): boxes would lie elsewhere."""
    wrong = np.flatnonzero((said != found).any(axis=1) & (said > 0).all(axis=1))
    if len(wrong):
        first = wrong[0]
        here, there = ("{1} x {0}".format(*size) for size in (found[first], said[first]))
        turned = (
            "; it is turned, as EXIF may say of it, which is not applied"
            if here.split()[::-1] == there.split()
            else ""
        )
        raise ValueError(
            f"boxes are those of images as they are stored; {len(wrong)} have other sizes than annotations say, "
            f"the first {printable(names[first])} {here} pixels, not {there}{turned}"
        )


def _say(boxes, classes, crowds, names):
    of_class = np.bincount(np.concatenate([*classes, [0]]).astype(int), minlength=len(names))
    of_class[0] -= 1
    empty = sum(not len(one) for one in boxes)
    ignored = int(sum(one.sum() for one in crowds))
    shown = ", ".join(f"{name} {count}" for name, count in list(zip(names, of_class, strict=True))[:10])
    log.info(
        f"  Boxes: {of_class.sum()} of {len(names)} classes ({shown}{', ...' if len(names) > 10 else ''})"
        + (f", {ignored} of them crowds or difficult, neither learnt nor counted" if ignored else "")
        + (f"; images without a box, kept as background: {empty}" if empty else "")
    )


def _ragged(values, dtype, inner=()):
    flat = np.concatenate([np.zeros((0, *inner)), *values]).astype(dtype)
    return tf.RaggedTensor.from_row_lengths(flat, [len(one) for one in values])


def _of_objects(tfds, features, name):
    """Returns what `tfds.find` takes for a set with boxes: (features to read, the classes, example -> fields)."""
    for objects, feature in features.items():
        inner = getattr(feature, "feature", None)
        if not isinstance(feature, tfds.features.Sequence) or not hasattr(inner, "items"):
            continue
        box = [key for key, one in inner.items() if isinstance(one, tfds.features.BBoxFeature)]
        label = [key for key, one in inner.items() if isinstance(one, tfds.features.ClassLabel)]
        label = ["label"] if "label" in label else label
        if len(box) == 1 and len(label) == 1:
            crowd = [key for key in ("is_crowd", "is_difficult") if key in inner]
            wanted = {objects: dict.fromkeys((*box, *label, *crowd), True)}
            return wanted, tuple(inner[label[0]].names), _objects_in(objects, box[0], label[0], crowd)
    raise ValueError(
        f"boxes of a TFDS set are a sequence with a BBoxFeature and a ClassLabel; {name} has {', '.join(features)}"
    )


def _objects_in(objects, box, label, crowd):
    def fields(example):
        found = example[objects]  # the image may turn out to be bad: its size is asked later
        boxes = tf.gather(tf.clip_by_value(found[box], 0.0, 1.0), [1, 0, 3, 2], axis=1)
        classes = tf.cast(found[label], tf.int64)
        crowds = tf.cast(found[crowd[0]], tf.bool) if crowd else tf.zeros_like(classes, tf.bool)
        return {"relative_boxes": boxes, "classes": classes, "crowds": crowds}

    return fields
