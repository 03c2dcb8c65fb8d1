"""Colour spaces that separate luminance from colour, CMC's two modalities, and a layer that converts to them.

The conversions are those of scikit-image, from sRGB in [0, 1]. The result is then scaled by the mean and half-range of
each channel. For Lab and YCbCr these are CMC's numbers (github.com/HobbitLong/CMC); for YDbDr they follow from the
ranges themselves.
"""

import keras
import numpy as np
import tensorflow as tf

TO_XYZ = np.array([[0.412453, 0.357580, 0.180423], [0.212671, 0.715160, 0.072169], [0.019334, 0.119193, 0.950227]])
D65 = np.array([0.95047, 1.0, 1.08883])  # the white point
TO_YCBCR = np.array([[65.481, 128.553, 24.966], [-37.797, -74.203, 112.0], [112.0, -93.786, -18.214]])
TO_YDBDR = np.array([[0.299, 0.587, 0.114], [-0.45, -0.883, 1.333], [-1.333, 1.116, 0.217]])


def lab(rgb):
    """Converts sRGB (..., 3) in [0, 1] to CIE 1976 L*a*b* under D65: L in [0, 100], a and b around 0."""
    linear = tf.where(rgb > 0.04045, ((tf.maximum(rgb, 0.04045) + 0.055) / 1.055) ** 2.4, rgb / 12.92)
    xyz = _times(linear, TO_XYZ / D65[:, np.newaxis])
    f = tf.where(xyz > 0.008856, tf.maximum(xyz, 0.008856) ** (1 / 3), 7.787 * xyz + 16 / 116)
    x, y, z = tf.unstack(f, axis=-1)
    return tf.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], axis=-1)


def ycbcr(rgb):
    """Converts sRGB (..., 3) in [0, 1] to Y in [16, 235], Cb and Cr in [16, 240] (ITU-R BT.601)."""
    return _times(rgb, TO_YCBCR) + tf.constant([16.0, 128.0, 128.0], rgb.dtype)


def ydbdr(rgb):
    """Converts sRGB (..., 3) in [0, 1] to Y in [0, 1], Db and Dr in [-1.333, 1.333]."""
    return _times(rgb, TO_YDBDR)


SPACES = {  # conversion, mean and half-range of each channel
    "lab": (lab, (50.0, 6.025, -6.6895), (50.0, 92.208, 101.1675)),
    "ycbcr": (ycbcr, (116.151, 121.080, 132.342), (109.5, 111.855, 111.964)),
    "ydbdr": (ydbdr, (0.5, 0.0, 0.0), (0.5, 1.333, 1.333)),
}


@keras.saving.register_keras_serializable("moco_tf")
class ColorSpace(keras.layers.Layer):
    """Converts normalised RGB images (N, H, W, 3) to a space of `SPACES`, and scales them.

    mean, std: the mean and standard deviation that normalised the images, of values in [0, 1].
    """

    def __init__(self, space, mean, std, **kwargs):
        super().__init__(autocast=False, **kwargs)  # otherwise Keras rounds to the compute dtype first
        self.space = space
        self.mean = tuple(mean)
        self.std = tuple(std)

    def call(self, images):
        convert, center, half_range = SPACES[self.space]
        rgb = tf.cast(images, tf.float32) * tf.constant(self.std) + tf.constant(self.mean)
        scaled = (convert(tf.clip_by_value(rgb, 0.0, 1.0)) - tf.constant(center)) / tf.constant(half_range)
        return tf.cast(scaled, self.compute_dtype)

    def get_config(self):
        return super().get_config() | {"space": self.space, "mean": self.mean, "std": self.std}


def of_lab(lab):
    """Converts CIE L*a*b* to sRGB (..., 3), clipped to [0, 1]: the inverse of `lab`."""
    luminance, a, b = tf.unstack(lab, axis=-1)
    y = (luminance + 16) / 116
    f = tf.stack([y + a / 500, y, y - b / 200], axis=-1)
    xyz = tf.where(f > 0.206893, f**3, (f - 16 / 116) / 7.787)
    linear = tf.clip_by_value(_times(xyz, np.linalg.inv(TO_XYZ / D65[:, np.newaxis])), 0.0, 1.0)
    return tf.where(linear > 0.0031308, 1.055 * tf.maximum(linear, 0.0031308) ** (1 / 2.4) - 0.055, 12.92 * linear)


def luminance(inputs, preprocessing):
    """Returns the luminance (N, H, W, 1) of a functional model's input, normalised RGB images (N, H, W, 3)."""
    converted = ColorSpace("lab", preprocessing.mean, preprocessing.std, name="color_space")(inputs)
    return FirstChannel(name="luminance")(converted)


@keras.saving.register_keras_serializable("moco_tf")
class FirstChannel(keras.layers.Layer):
    """(..., C) -> (..., 1)."""

    def call(self, values):
        return values[..., :1]

    def compute_output_shape(self, input_shape):
        return (*input_shape[:-1], 1)


def _times(values, matrix):
    return tf.tensordot(values, tf.constant(matrix.T, values.dtype), 1)
