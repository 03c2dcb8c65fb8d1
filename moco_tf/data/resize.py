"""Antialiased bilinear resizing as two matrix products.

`predict`, the served graph and what converters make of that graph use this one function
(`tf.image.resize(antialias=True)` becomes an op that ONNX and OpenVINO do not know).

Axes: N images, H rows, W columns, C channels; S is an output size.
"""

import tensorflow as tf


def resize(images, resized, size=None, offset=(0, 0)):
    """Resizes to `resized` = (height, width) as Pillow's BILINEAR does, and cuts `size` out of that at `offset`.

    images: (..., H, W, C) of any numeric type, H and W may be unknown; `resized` and `offset` may be tensors.
    Returns float32 (..., *size, C); `size` is `resized` if it is not given. Pixels cut away are never computed.
    """
    size = resized if size is None else size
    images = tf.cast(images, tf.float32)
    shape = sizes(images)
    height, width, _ = shape[-3:]
    if _same((height, width), resized) and _same(resized, size):
        return images
    rows = triangle_weights(height, resized[0], size[0], offset[0])  # (S, H)
    columns = triangle_weights(width, resized[1], size[1], offset[1])  # (S, W)
    images = tf.reshape(images, [-1, *shape[-3:]])
    images = _combine_rows(rows, images)  # (N, S, W, C)
    images = _combine_rows(columns, tf.transpose(images, (0, 2, 1, 3)))  # (N, S, S, C), columns first
    images = tf.transpose(images, (0, 2, 1, 3))
    return tf.reshape(images, [*shape[:-3], *size, shape[-1]])


def triangle_weights(length, resized, size, offset=0):
    """Returns weights from `length` to `size` of `resized` pixels, from `offset` on: (size, length), rows sum to 1.

    A pixel of the result is the average under a triangle. The triangle is as wide as two pixels of the input or of the
    result, whichever are larger.
    """
    scale = tf.cast(length, tf.float32) / tf.cast(resized, tf.float32)
    centre = (tf.cast(offset + tf.range(size), tf.float32) + 0.5) * scale  # (S,)
    pixel = tf.cast(tf.range(length), tf.float32) + 0.5  # (H,)
    distance = tf.abs(pixel - centre[:, tf.newaxis]) / tf.maximum(scale, 1.0)
    weights = tf.nn.relu(1.0 - distance)
    return weights / tf.reduce_sum(weights, axis=1, keepdims=True)


def crop_weights(length, size, start, extent):
    """Returns weights from `extent` of `length` pixels, from `start` on, to `size`: (N, size, length), rows sum to 1.

    start, extent: int32 (N,). The weights are `triangle_weights` of each part alone.
    """
    start, extent = (tf.cast(each, tf.float32)[:, tf.newaxis] for each in (start, extent))
    scale = extent / size  # N x 1
    centre = (tf.range(size, dtype=tf.float32) + 0.5) * scale  # N x S
    pixel = tf.cast(tf.range(length), tf.float32) + 0.5 - start  # N x H
    distance = tf.abs(pixel[:, tf.newaxis] - centre[..., tf.newaxis]) / tf.maximum(scale, 1.0)[..., tf.newaxis]
    inside = tf.cast((pixel > 0) & (pixel < extent), tf.float32)[:, tf.newaxis]
    weights = tf.nn.relu(1.0 - distance) * inside
    return weights / tf.reduce_sum(weights, axis=-1, keepdims=True)


def sizes(tensor):
    """The shape as a list: a Python number where it is known, a scalar tensor where it is not."""
    known, running = tensor.shape.as_list(), tf.shape(tensor)
    return [running[axis] if length is None else length for axis, length in enumerate(known)]


def _combine_rows(weights, images):
    _, height, width, channels = sizes(images)
    flat = tf.reshape(images, [-1, height, width * channels])
    return tf.reshape(tf.matmul(weights, flat), [-1, weights.shape[0] or tf.shape(weights)[0], width, channels])


def _same(a, b):
    return all(isinstance(length, int) for length in (*a, *b)) and tuple(a) == tuple(b)
