"""Says which shapes, dtypes and values image arrays may have, as `views` and `predict` take them."""

import numpy as np
import tensorflow as tf

from moco_tf.data.pipeline import fixed

LOOKED_AT = 64  # images whose range stands for the range of all


def image_of(*element):
    """Returns the image of a dataset's element: a record, (image, label, ...) or an image; batches work alike."""
    image = element[0]
    if isinstance(image, dict):
        if "image" not in image:
            raise ValueError(f'A record holds its image under "image"; this one has {sorted(image)}.')
        image = image["image"]
    return image


def as_array(images):
    """Stacks a list or tuple of images of one size into one array; returns anything else as it is."""
    if not isinstance(images, (list, tuple)):
        return images
    sizes = sorted({np.shape(image) for image in images})
    if len(sizes) != 1:
        raise ValueError(
            f"A list of images is an array of one shape; these have {', '.join(map(str, sizes[:3])) or 'none'}"
            f"{', ...' if len(sizes) > 3 else ''}. Resize them, or take a tf.data.Dataset of them."
        )
    return np.stack([np.asarray(image) for image in images])


def rgb(images):
    """Returns (..., H, W, 3) for a tensor (..., H, W, 3) or a grey one (..., H, W, 1)."""
    channels = images.shape[-1]
    if channels == 3:
        return images
    if channels not in (1, None):
        raise ValueError(f"Images have 3 channels, or 1 if they are grey: (N, H, W, 3), not {tuple(images.shape)}.")
    if channels is None:  # one graph for colour and grey
        images = tf.repeat(images, tf.where(tf.shape(images)[-1] == 1, 3, 1), axis=-1)
        return tf.ensure_shape(images, (*images.shape[:-1], 3))
    return tf.repeat(images, 3, axis=-1)


def shown(images):
    """Returns images (..., C) as people see them, (..., 3): three channels stay, others become their grey mean."""
    if images.shape[-1] == 3:
        return images
    return tf.repeat(tf.reduce_mean(tf.cast(images, tf.float32), axis=-1, keepdims=True), 3, axis=-1)


def of_eight_bits(images):
    """Returns the tensor; fails if integers of another dtype than uint8 have values that 8 bits cannot hold."""
    if images.dtype == tf.uint8 or not images.dtype.is_integer:
        return images
    low, high = tf.reduce_min(images), tf.reduce_max(images)
    fits = tf.debugging.Assert((low >= 0) & (high <= 255), ["images have values from 0 to 255; these have", low, high])
    with tf.control_dependencies([fits]):
        return tf.identity(images)


def check_array(images):
    """Refuses an array of images (N, ...) whose values cannot be 0..255: all images would look alike."""
    if _has_range(dtype := tf.as_dtype(images.dtype)):
        first = np.asarray(images if dtype.is_integer else images[:LOOKED_AT])
        if first.size:
            check_range(first.min(), first.max(), len(first))


def check_dataset(dataset):
    """Checks, like `check_array`, the first images of a dataset of images or batches, as `image_of` finds them."""
    if not _has_range(dataset.element_spec.dtype):
        return
    images = dataset.unbatch() if dataset.element_spec.shape.rank == 4 else dataset
    lows, highs = [], []
    for image in fixed(images.take(LOOKED_AT)).as_numpy_iterator():
        lows.append(image.min())
        highs.append(image.max())
    if lows:
        check_range(min(lows), max(highs), len(lows))


def check_range(low, high, count):
    """Refuses a range of `count` images, given as NumPy scalars, that is plainly not 0..255.

    Images of one value tell nothing. Filters may leave something below 0 or above 255.
    """
    rounds = low.dtype.kind in "iu"
    if rounds:
        wrong, remedy = low < 0 or high > 255, "bring them to 8 bits, from 16 by images // 257"
    elif low < 0:
        wrong, remedy = high <= 1 or -low > high / 2, "undo their normalisation, from -1..1 by (images + 1) * 127.5"
    elif high > 2 * 255:
        wrong, remedy = True, "bring them to 8 bits, from 16 by images / 257"
    else:
        wrong, remedy = low < high <= 1, "multiply them by 255, or leave Rescaling(1 / 255) out"
    if wrong or not (rounds or np.isfinite([low, high]).all()):
        raise ValueError(
            f"Images have values from 0 to 255; the first {count} have {low:g} to {high:g} ({low.dtype}): {remedy}."
        )


def _has_range(dtype):
    """Whether values of this dtype can have another range than 0..255."""
    return dtype != tf.uint8 and (dtype.is_integer or dtype.is_floating or dtype.is_bool)
