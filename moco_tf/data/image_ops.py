"""Deterministic operations on images; each matches Pillow's within the distance that `tests/goldens` states.

An image is float32 (H, W, C) with values 0..255 unless said otherwise. C is 3 for saturation, hue and greyscale, and
any number for the others. Parameters may be tensors. Where an operation takes a batch, (N, H, W, C), its parameters
are (N,), one per image. `augment.py` draws the parameters. Pillow rounds to 8 bits after each operation; this module
does not.
"""

import math

import numpy as np
import tensorflow as tf

from moco_tf.data.encoded import decode_jpeg, decode_other
from moco_tf.data.resize import crop_weights, sizes

LUMA = np.array([0.299, 0.587, 0.114], np.float32)  # ITU-R 601-2, Pillow's "L"
BLOCK = 32  # rows that are blurred at once
SHRUNK = (2, 4, 8)  # by how much libjpeg can shrink an image as it decodes it


def crops(image, choose_boxes, sides=None):
    """Cuts parts out of one image; returns them as a list.

    If only one part is cut out of a JPEG, only that part is decoded.

    image: encoded bytes (string, scalar) or pixels (H, W, C). choose_boxes: (height, width) -> a list of boxes
    (top, left, height, width). sides: the side in pixels that each part will be resized to, or None. With it, a JPEG
    is decoded at the smallest of 1, 1/2, 1/4 and 1/8 of its size at which each part still has that side.
    """

    def cut(pixels, boxes=None):
        return [
            tf.slice(pixels, (top, left, 0), (rows, columns, pixels.shape[-1]))
            for top, left, rows, columns in boxes or choose_boxes(*sizes(pixels)[:2])
        ]

    def cut_jpeg():
        height, width, _ = tf.unstack(tf.image.extract_jpeg_shape(image))
        boxes = choose_boxes(height, width)
        if sides is None:
            return cut_of_all(boxes, width)
        room = [tf.minimum(rows, columns) // side for (_, _, rows, columns), side in zip(boxes, sides, strict=True)]
        halvings = tf.reduce_sum(tf.cast(tf.reduce_min(room) >= np.array(SHRUNK), tf.int32))
        return tf.cond(halvings > 0, lambda: cut_of_shrunk(boxes, halvings), lambda: cut_of_all(boxes, width))

    def cut_of_shrunk(boxes, halvings):
        picture = tf.switch_case(halvings - 1, [lambda by=by: decode_jpeg(image, by) for by in SHRUNK])
        by = tf.bitwise.left_shift(1, halvings)
        nearest = by // 2  # for corners; sizes are rounded down, so that no part leaves the picture
        return cut(
            picture,
            [
                ((top + nearest) // by, (left + nearest) // by, rows // by, columns // by)
                for top, left, rows, columns in boxes
            ],
        )

    def cut_of_all(boxes, width):
        if len(boxes) > 1:  # the bits would be read anew for each part, which is most of the work
            return cut(decode_jpeg(image), boxes)
        ((top, left, rows, columns),) = boxes
        # The colour of a pixel is interpolated from its neighbours: without one column more on either side, the
        # columns at the edges differ from those of the decoded image.
        start, end = tf.maximum(left - 1, 0), tf.minimum(left + columns + 1, width)
        window = tf.stack([top, start, rows, end - start])
        wide = tf.image.decode_and_crop_jpeg(image, window, channels=3, dct_method="INTEGER_ACCURATE")
        return [wide[:, left - start : left - start + columns]]

    if image.dtype != tf.string:
        return cut(image)
    return tf.cond(tf.io.is_jpeg(image), cut_jpeg, lambda: cut(decode_other(image)))


def resized(image, size):
    """Resizes, antialiased bilinear, to float32 (size, size, C).

    The result is that of `resize.resize` within 2e-3, in a third of its time on a CPU. `preprocessing` keeps
    `resize.resize`, which converters understand as well.
    """
    # Where nothing shrinks, antialiasing changes nothing, and the kernel without it takes a sixth of the time.
    return tf.cond(
        tf.reduce_all(tf.shape(image)[:2] <= size),
        lambda: tf.image.resize(image, (size, size)),
        lambda: tf.image.resize(image, (size, size), antialias=True),
    )


def resized_crops(images, boxes, size):
    """Like `resized`, for a part of each image, all at once: (N, H, W, C), any dtype -> float32 (N, size, size, C).

    A GPU that multiplies matrices in TF32 rounds their factors to 10 bits, here and in the blur.
    boxes: int32 (N, 4): top, left, height, width.
    """
    top, left, rows, columns = tf.unstack(boxes, axis=1)
    number, height, width, channels = sizes(images)
    lines = tf.reshape(tf.cast(images, tf.float32), (number, height, width * channels))
    lines = tf.matmul(crop_weights(height, size, top, rows), lines)
    lines = tf.transpose(tf.reshape(lines, (number, size, width, channels)), (0, 2, 1, 3))
    lines = tf.matmul(crop_weights(width, size, left, columns), tf.reshape(lines, (number, width, size * channels)))
    return tf.transpose(tf.reshape(lines, (number, size, size, channels)), (0, 2, 1, 3))


def brightness(image, factor):
    """Changes brightness: factor 0 is black, 1 is the image."""
    return _clip(image * factor)


def contrast(image, factor):
    """Changes contrast: factor 0 is the mean grey of the image, a whole number, 1 is the image.

    Grey is the mean of the channels if they are not RGB.
    """
    return _clip(image * factor + (1.0 - factor) * _mean_grey(image))


def saturation(image, factor):
    """Changes saturation: factor 0 is the grey image, 1 is the image."""
    return _clip(_mix_channels(image, factor * np.eye(3, dtype=np.float32) + (1.0 - factor) * _TO_GREY))


def hue(image, delta):
    """Turns the colour wheel by `delta` of a turn, -0.5..0.5; also takes batches."""
    if image.shape.rank == 3:
        return tf.image.adjust_hue(image, delta)
    hue, saturation, value = tf.split(tf.image.rgb_to_hsv(image), 3, axis=-1)
    return tf.image.hsv_to_rgb(tf.concat([tf.math.floormod(hue + _each(delta), 1.0), saturation, value], axis=-1))


def brightness_contrast_or_saturation(images, which, factors):
    """Applies one of the three to each image, (N, H, W, C); `which` (N,) is its place in this function's name."""
    which, factors = _each(which), _each(factors)
    # What remains at factor 0: black, the mean grey, the grey image.
    without = tf.where(which == 0, 0.0, tf.where(which == 1, _mean_grey(images), _grey(images)))
    return _clip(images * factors + (1.0 - factors) * without)


def grayscale(image):
    """Makes three equal channels; also takes batches."""
    if image.shape.rank == 3:
        return _mix_channels(image, _TO_GREY)
    return tf.repeat(_grey(image), 3, axis=-1)


def gaussian_blur(image, sigma, largest=None):
    """Applies three extended box blurs along each axis, edges repeated: Pillow's Gaussian blur; also takes batches.

    largest: a Python number that sigma never exceeds, if known; far pixels are then left out of the sums.
    """
    turned = (1, 0, 2) if image.shape.rank == 3 else (0, 2, 1, 3)
    image = tf.transpose(_blur_columns(image, sigma, largest), turned)
    return tf.transpose(_blur_columns(image, sigma, largest), turned)


def solarize(image, threshold=128):
    """Inverts values that are not below the threshold; also takes batches."""
    return tf.where(image < threshold, image, 255.0 - image)


def flip(image):
    """Swaps left and right; also takes batches."""
    return tf.reverse(image, axis=[-2])


def _mean_grey(image):
    """(1, 1, 1) or (N, 1, 1, 1): the mean of the grey image, a whole number."""
    mean = tf.reduce_mean(tf.reduce_mean(image, axis=-3), axis=-2)  # rows first vectorises, both at once do not
    return _each(tf.floor(tf.reduce_sum(mean * _shares(image), axis=-1) + 0.5))


def _grey(images):
    """Returns a batch's grey images (N, H, W, 1), by a sum: a matrix product on GPUs rounds its factors to 10 bits."""
    return tf.reduce_sum(images * _shares(images), axis=-1, keepdims=True)


def _shares(images):
    """Returns the weight of each channel in grey, (C,)."""
    channels = images.shape[-1]
    return LUMA if channels in (3, None) else np.full(channels, 1 / channels, np.float32)


def _each(parameter):
    """Shapes numbers, (N,), one per image, to fit images (N, H, W, 3); or a scalar to fit an image (H, W, 3)."""
    return parameter[..., tf.newaxis, tf.newaxis, tf.newaxis]


_TO_GREY = np.repeat(LUMA[:, np.newaxis], 3, axis=1)  # (from, to) channel


def _mix_channels(image, matrix):
    return tf.reshape(tf.matmul(tf.reshape(image, (-1, 3)), matrix), tf.shape(image))


def _clip(image):
    return tf.clip_by_value(image, 0.0, 255.0)


def _blur_columns(image, sigma, largest):
    *batch, height, width, channels = sizes(image)
    lines = tf.reshape(image, (*batch, height, -1))
    # Three boxes reach this far. A row has the same rule as the next one only if no edge is within reach.
    reach = 3 * (int((math.sqrt(4 * largest**2 + 1) - 1) / 2) + 1) if largest else height
    if not batch and isinstance(height, int) and height % BLOCK == 0 and 2 * reach <= BLOCK < height:
        # Computes rows in blocks, each from its surroundings alone. The first block has a matrix, the last
        # another, and all between share a third. Each is a part of the matrix of two blocks.
        weights = _blur_weights(2 * BLOCK, sigma)
        half, wide, blocks = BLOCK // 2, BLOCK + 2 * reach, height // BLOCK
        between = weights[half : half + BLOCK, half - reach : half + BLOCK + reach]
        weights = tf.stack([weights[:BLOCK, :wide], *[between] * (blocks - 2), weights[BLOCK:, -wide:]])
        starts = [min(max(block * BLOCK - reach, 0), height - wide) for block in range(blocks)]
        lines = tf.matmul(weights, tf.stack([lines[start : start + wide] for start in starts]))
    else:
        lines = tf.matmul(_blur_weights(height, sigma), lines)
    return tf.reshape(lines, (*batch, height, width, channels))


def _blur_weights(length, sigma):
    """Returns (..., length, length) for sigma (...): what each pixel of a line gathers in three box blurs."""
    # The box of the wanted variance (Gwosdek et al. 2011, as Pillow): 2 * whole + 1 pixels of weight 1, then on
    # either side one of weight radius - whole.
    variance = tf.square(tf.cast(sigma, tf.float32))[..., tf.newaxis, tf.newaxis] / 3.0
    whole = tf.floor((tf.sqrt(12.0 * variance + 1.0) - 1.0) / 2.0)
    part = (2.0 * whole + 1.0) * (whole * (whole + 1.0) - 3.0 * variance)
    radius = whole + part / (6.0 * (variance - tf.square(whole + 1.0)))
    place = tf.cast(tf.range(length), tf.float32)
    distance = tf.abs(place[:, tf.newaxis] - place)
    box = tf.clip_by_value(radius + 1.0 - distance, 0.0, 1.0) / (2.0 * radius + 1.0)
    # Weight that falls over an edge goes to the pixel at the edge. A line is longer than a box, so no pixel has both
    # edges in its box.
    missing = 1.0 - tf.reduce_sum(box, axis=-1, keepdims=True)
    nearest_edge = tf.where(2.0 * place < tf.cast(length, tf.float32), 0, length - 1)
    box += missing * tf.one_hot(nearest_edge, length)
    return tf.matmul(box, tf.matmul(box, box))
