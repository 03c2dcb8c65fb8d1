"""Puts images with boxes or masks on a square canvas: scaled, moved and mirrored at random, or as they are judged.

A view is a function of (record, seed). Axes: H W a record's image, S side of the canvas, n boxes. The mean colour,
zero after normalisation, fills the part of the canvas that an image does not cover.
"""

import dataclasses
import itertools

import numpy as np
import tensorflow as tf

from moco_tf.data.boxes import in_pixels as boxes_in_pixels
from moco_tf.data.encoded import decode
from moco_tf.data.inputs.image import Preprocessing
from moco_tf.data.masks import IGNORED
from moco_tf.data.masks import decode as decode_mask
from moco_tf.data.pipeline import PREFETCH, fixed, parallel_map

NOTHING = -1  # in place of a box: its coordinates and class
CROWD = -2  # in place of a class: keras-cv's mark for a box that is neither an object nor background
LEAST_VISIBLE = 1.0  # pixels: a box of which the canvas shows a shorter side is no object


@dataclasses.dataclass(frozen=True)
class Canvas:
    """Places images on a square of `size` pixels.

    enlarge: scale every image so that its longer side fills the canvas (detection); else shrink only the images that
    are larger than the canvas (segmentation, where images are judged at their own size).
    scales: in training, multiply that scale by a random factor between these two.
    """

    preprocessing: Preprocessing  # mean and std
    size: int
    enlarge: bool
    scales: tuple = (1.0, 1.0)

    def place(self, height, width, seed=None):
        """Chooses the place of an image of H x W pixels on the canvas; seed int64 (2,): at random.

        Returns:
          (size int32 (2,) of the scaled image, offset int32 (2,) of the part that the canvas shows, mirrored bool).
        """
        extent = tf.cast(tf.stack([height, width]), tf.float32)
        scale = tf.cast(self.size, tf.float32) / tf.reduce_max(extent)
        scale = scale if self.enlarge else tf.minimum(scale, 1.0)
        if seed is None:
            scaled = self._rounded(extent * scale)
            return scaled, tf.zeros(2, tf.int32), tf.constant(False)
        of_scale, *of_offset, of_mirror = tf.unstack(tf.random.stateless_uniform((4,), seed, alg="philox"))
        low, high = self.scales
        scaled = self._rounded(extent * scale * (low + (high - low) * of_scale))
        room = tf.cast(tf.maximum(scaled - self.size, 0) + 1, tf.float32)
        return scaled, tf.cast(tf.stack(of_offset) * room, tf.int32), of_mirror < 0.5

    def _rounded(self, extent):
        return tf.maximum(tf.cast(tf.round(extent), tf.int32), 1)

    def image(self, image, place):
        """uint8 (H, W, 3) -> normalised float32 (S, S, 3)."""
        scaled, offset, mirrored = place
        resized = tf.cond(
            tf.reduce_all(scaled == tf.shape(image)[:2]),
            lambda: tf.cast(image, tf.float32),
            lambda: tf.image.resize(image, scaled, antialias=True),
        )
        return self._laid(self.preprocessing.normalize(resized), offset, mirrored, 0.0)

    def mask(self, mask, place):
        """uint8 (H, W, 1) -> uint8 (S, S, 1), `IGNORED` where there is no image."""
        scaled, offset, mirrored = place
        return self._laid(tf.image.resize(mask, scaled, "nearest"), offset, mirrored, IGNORED)

    def shown(self, image):
        """A normalised image on the canvas -> uint8 (S, S, 3)."""
        return np.clip(np.round(self.preprocessing.denormalize(image)), 0, 255).astype(np.uint8)

    def _laid(self, image, offset, mirrored, filling):
        image = tf.cond(mirrored, lambda: image[:, ::-1], lambda: image)
        image = image[offset[0] : offset[0] + self.size, offset[1] : offset[1] + self.size]
        missing = self.size - tf.shape(image)[:2]
        padded = tf.pad(image, [[0, missing[0]], [0, missing[1]], [0, 0]], constant_values=filling)
        return tf.ensure_shape(padded, (self.size, self.size, image.shape[-1]))

    def boxes(self, boxes, place, extent):
        """(n, 4) in pixels of the image, of H x W = `extent` -> (n, 4) on the canvas, and bool (n,): still visible."""
        scaled, offset, mirrored = (tf.cast(value, tf.float32) for value in place)
        down, across = tf.unstack(scaled / tf.cast(tf.stack(extent), tf.float32))
        left, top, right, bottom = tf.unstack(boxes * tf.stack([across, down, across, down]), axis=1)
        left, right = (
            mirrored * (scaled[1] - right) + (1 - mirrored) * left,
            mirrored * (scaled[1] - left) + (1 - mirrored) * right,
        )
        moved = tf.stack([left - offset[1], top - offset[0], right - offset[1], bottom - offset[0]], axis=1)
        moved = tf.clip_by_value(moved, 0.0, float(self.size))
        return moved, tf.reduce_all(moved[:, 2:] - moved[:, :2] >= LEAST_VISIBLE, axis=1)


@tf.autograph.experimental.do_not_convert
def boxed(canvas, record, seed=None):
    """Returns a detector's view of a record, a dict.

    "image" (S, S, 3); "boxes" float32 (n + 1, 4) on the canvas and "classes" int64 (n + 1,), `CROWD` for crowds; the
    last box and class are `NOTHING`. With seed None, also the entries for judging: "id"; "true_boxes" (n, 4) in pixels
    of the image, "true_classes" int64 (n,), "crowds" bool (n,); "size" int32 (2,), height and width of the image; and
    "scaled" int32 (2,), its height and width on the canvas.
    """
    image = decode(record["image"])
    size = tf.shape(image)[:2]
    place = canvas.place(*tf.unstack(size), seed)
    true_boxes, kept = boxes_in_pixels(record, size)
    true_classes, crowds = (tf.boolean_mask(record[name], kept) for name in ("classes", "crowds"))
    boxes, there = canvas.boxes(true_boxes, place, tf.unstack(size))
    classes = tf.where(crowds, tf.constant(CROWD, tf.int64), true_classes)
    filler = tf.fill((1, 4), float(NOTHING))
    view = {
        "image": canvas.image(image, place),
        "boxes": tf.concat([tf.boolean_mask(boxes, there), filler], axis=0),
        "classes": tf.concat([tf.boolean_mask(classes, there), [NOTHING]], axis=0),
    }
    if seed is None:
        view |= {"id": record["id"], "true_boxes": true_boxes, "true_classes": true_classes, "crowds": crowds}
        view |= {"size": size, "scaled": place[0]}
    return view


def to_image(boxes, size, scaled):
    """Converts boxes (..., m, 4) on the canvas to pixels of the image, and cuts them off at its edges.

    size, scaled: (..., 2), height and width of the image, and its height and width on the canvas.
    """
    size, scaled = tf.cast(size, tf.float32), tf.cast(scaled, tf.float32)
    edges = tf.gather(size, [1, 0, 1, 0], axis=-1)[..., tf.newaxis, :]
    factors = tf.gather(size / scaled, [1, 0, 1, 0], axis=-1)[..., tf.newaxis, :]
    return tf.clip_by_value(boxes * factors, 0.0, edges)


@tf.autograph.experimental.do_not_convert
def masked(canvas, record, seed=None):
    """Returns a segmenter's view of a record, a dict: "image" (S, S, 3), "mask" uint8 (S, S, 1).

    With seed None, also "id", "true_mask", the original mask, uint8 (H, W, 1), and "scaled", int32 (2,): the size of
    the image on the canvas. Raises if a mask has another size than its image.
    """
    image, mask = decode(record["image"]), decode_mask(record["mask"])
    same = tf.debugging.Assert(
        tf.reduce_all(tf.shape(image)[:2] == tf.shape(mask)[:2]),
        ["a mask has another size than its image, record", record["id"]],
    )
    with tf.control_dependencies([same]):
        mask = tf.identity(mask)
    place = canvas.place(*tf.unstack(tf.shape(image)[:2]), seed)
    view = {"image": canvas.image(image, place), "mask": canvas.mask(mask, place)}
    if seed is None:
        view |= {"id": record["id"], "true_mask": mask, "scaled": place[0]}
    return view


def batches(source, view, batch_size, seed, step):
    """Yields endless batches of `view(record, seed)` from number `step` on; pads boxes with `NOTHING` to the longest.

    As in pre-training, a view is a function of (seed, epoch, record). An epoch is the whole batches of the source in a
    new order.
    """
    per_epoch = source.size // batch_size * batch_size
    records = source.shuffled(seed, step * batch_size, per_epoch)

    def of_record(epoch, record):
        return view(record, tf.stack([seed * 2**32 + epoch, record["id"]]))

    views = parallel_map(records, of_record)
    filler = {name: tf.constant(NOTHING, spec.dtype) if spec.dtype != tf.uint8 else None
              for name, spec in views.element_spec.items()}  # fmt: skip
    shapes = {name: spec.shape for name, spec in views.element_spec.items()}
    return fixed(views.padded_batch(batch_size, shapes, filler, drop_remainder=True).prefetch(PREFETCH))


def in_order(source, view):
    """Yields `view(record)` of each good record once, one by one."""
    return fixed(parallel_map(source.in_order(), view).prefetch(PREFETCH))


def groups(iterator, size):
    """Yields lists of up to `size` items of an iterator."""
    while group := list(itertools.islice(iterator, size)):
        yield group
