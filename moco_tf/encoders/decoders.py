"""Decoders: what encoders made of an image -> pictures. They are thrown away when training ends."""

import keras
from keras import layers

from moco_tf.encoders.batch_norm import BatchNorm

NARROWEST = 8  # channels


def of_maps(shape, size, channels):
    """A functional model of a ResNet's maps (N, h, h, D) -> pictures (N, size, size, channels).

    At each doubling of the side the nearest value is repeated, and a 3x3 convolution with BN and ReLU halves the
    channels; one more convolution ends it.

    Args:
      shape: (h, h, D).
      size: h times a power of two.
      channels: of the pictures.

    Raises:
      ValueError: h cannot be doubled to `size`.
    """
    side, _, width = shape
    doublings = (size // side).bit_length() - 1
    if side << doublings != size:
        raise ValueError(f"the encoder's maps of {side} pixels are doubled to an image's size, which {size} is not")
    inputs = x = keras.Input(shape)
    for place in range(doublings):
        width = max(width // 2, NARROWEST)
        x = layers.UpSampling2D(2, name=f"up{place}.repeat")(x)
        x = layers.Conv2D(width, 3, padding="same", use_bias=False, name=f"up{place}.conv")(x)
        x = layers.ReLU(name=f"up{place}.relu")(BatchNorm(name=f"up{place}.bn")(x))
    return keras.Model(inputs, layers.Conv2D(channels, 3, padding="same", name="picture")(x), name="decoder")
