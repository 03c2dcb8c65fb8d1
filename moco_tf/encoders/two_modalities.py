"""Backbones of two modalities: each modality has its own encoder, and the features of both are joined."""

import keras

from moco_tf.encoders.color_spaces import ColorSpace
from moco_tf.encoders.heads import Halves


def of_two_colors(make, space, preprocessing):
    """A backbone of luminance and colour: normalised RGB images -> features (N, 2D).

    Args:
      make: a function of a number of channels, 1 or 2. Returns a backbone of images with so many channels -> (N, D).
      space: "lab", "ycbcr" or "ydbdr".
      preprocessing: its mean and std have normalised the images.
    """
    convert = ColorSpace(space, preprocessing.mean, preprocessing.std, name="color_space")
    return _joined(make(1), make(2), ("luminance", "color"), 3, convert)


def of_image_and_depth(make):
    """A backbone of images and their depth maps, normalised (N, S, S, 4) -> features (N, 2D).

    make: as in `of_two_colors`, of 3 channels and of 1.
    """
    return _joined(make(3), make(1), ("rgb", "depth"), 4)


def _joined(first, second, names, channels, convert=None):
    first.name, second.name = names
    inputs = keras.Input((*first.input_shape[1:3], channels))
    values = inputs if convert is None else convert(inputs)
    of_first, of_second = Halves(first.input_shape[3], name="_and_".join(names))(values)
    features = keras.layers.Concatenate(name="both")([first(of_first), second(of_second)])
    return keras.Model(inputs, features)
