"""Keeps all images of a source decoded in memory: reading many small ones anew is most of a pipeline's work."""

import numpy as np
import tensorflow as tf

from moco_tf import startup
from moco_tf.data.encoded import pixels
from moco_tf.data.pipeline import fixed, parallel_map

CHUNK = 1000  # images that are decoded before they are put in their places
ADVICE = "--views_on=device keeps all images in memory, decoded; --views_on=both and host read them one by one"


def decoded(source):
    """Returns a `Source`'s images, uint8 (R, H, W, C), by number; one that cannot be decoded has its stand-in's image.

    Raises:
      ValueError: the images are not of one size, or would take more than a third of this machine's memory.
    """
    records = source.unchecked()
    shape = pixels(next(iter(records))["image"]).shape
    gib = source.size * int(np.prod(shape)) / 2**30
    third = startup.memory() / 3 / 2**30
    if gib > third:
        raise ValueError(
            f"{source.size} images of {shape[1]} x {shape[0]} pixels take {gib:.1f} GiB, more than a third of this "
            f"machine's memory; {ADVICE}"
        )

    def of_this_shape(record):
        image = pixels(record["image"])
        same = tf.reduce_all(tf.shape(image) == shape)
        return tf.cond(same, lambda: image, lambda: tf.zeros(shape, tf.uint8)), tf.shape(image)

    images, place = np.empty((source.size, *shape), np.uint8), 0
    for chunk, shapes in fixed(parallel_map(records, of_this_shape).batch(CHUNK)).as_numpy_iterator():
        for other in shapes[(shapes != shape).any(axis=1)]:
            sizes = " and ".join(f"{width} x {height}" for height, width, _ in (shape, other))
            raise ValueError(f"the images of {source.name} are of several sizes, {sizes} pixels, say; {ADVICE}")
        images[place : place + len(chunk)] = chunk
        place += len(chunk)
    with tf.device("CPU:0"):
        return tf.constant(images)
