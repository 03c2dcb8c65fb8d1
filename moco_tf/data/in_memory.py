"""The pictures of a source, decoded, all in memory: for many small ones, reading them is most of a pipeline's work."""

import functools

import numpy as np
import tensorflow as tf

from moco_tf.data.image_ops import decoded
from moco_tf.data.pipeline import parallel_map

LARGEST = 8 * 2**30  # bytes


@functools.lru_cache(maxsize=1)  # a run asks for them each time that it builds its batches
def pictures(source):
    """uint8 (R, H, W, 3) of a `Source`, by number; a number that cannot be decoded has its stand-in's picture.

    Raises:
      ValueError: they are not of one size, or more than 8 GiB.
    """
    advice = "--views_on=device keeps all images in memory, decoded: --views_on=both or host reads them one by one"
    images = parallel_map(source.unchecked(), lambda record: decoded(record["image"]))
    shape = next(iter(images)).shape
    if (size := source.size * int(np.prod(shape))) > LARGEST:
        raise ValueError(
            f"{source.size} images of {shape[1]} x {shape[0]} pixels take {size / 2**30:.1f} GiB; {advice}"
        )
    with tf.device("CPU:0"):
        try:
            return images.batch(source.size).get_single_element()
        except tf.errors.InvalidArgumentError:
            other = next(image.shape for image in images if image.shape != shape)
    sizes = " and ".join(f"{width} x {height}" for height, width, _ in (shape, other))
    raise ValueError(f"the images of {source.name} are not of one size, but of {sizes} pixels, say; {advice}")
