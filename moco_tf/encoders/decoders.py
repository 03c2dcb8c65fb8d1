"""Decoders: an encoder's output -> pixels. They serve pre-training alone, and are thrown away after it.

Axes: N batch, h side of a ResNet's maps, L patches of an image, M visible ones, D width of the encoder, W of the
decoder, P side of a patch.
"""

import keras
import tensorflow as tf
from keras import layers

from moco_tf.encoders import vit
from moco_tf.encoders.batch_norm import BatchNorm

NARROWEST = 8  # channels of maps
HEAD_WIDTH = 32  # of an attention head: MAE has 16 heads in 512 channels


def of_maps(shape, size, channels):
    """A functional model of a ResNet's maps (N, h, h, D) -> pictures (N, size, size, channels).

    Each doubling of the side repeats the nearest value; a 3x3 convolution with BN and ReLU then halves the channels.
    One more convolution ends the decoder.

    Args:
      shape: (h, h, D).
      size: h times a power of two.
      channels: number of channels of the pictures.

    Raises:
      ValueError: repeated doubling of h does not give `size`.
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
    full = keras.config.dtype_policy().variable_dtype  # in 16 bits many of colorize's classes would tie
    last = layers.Conv2D(channels, 3, padding="same", dtype=full, name="picture")
    return keras.Model(inputs, last(x), name="decoder")


def of_tokens(dim, patches, side, patch_size, depth, width, channels=3):
    """MAE's light decoder, a ViT with mask tokens in place of the hidden patches (arXiv:2111.06377, section 3).

    It is a functional model of [tokens of the class and of some patches (N, 1 + M, D), after the encoder's last
    LayerNorm; the numbers of those patches (N, M)] -> pixels of all patches (N, L, P P channels).

    Args:
      dim: D.
      patches: M.
      side: number of patches along each side of an image; its square is L.
      patch_size: P.
      depth: number of blocks; 8 in the paper.
      width: W, a multiple of 32, the width of an attention head; 512 in the paper.
      channels: number of channels of the images.
    """
    if width < 1 or width % HEAD_WIDTH:
        raise ValueError(f"a decoder's width is a multiple of {HEAD_WIDTH}, which each head has; got {width}")
    tokens, kept = keras.Input((1 + patches, dim)), keras.Input((patches,), dtype="int32")
    x = layers.Dense(width, name="embed")(tokens)
    x = MaskTokens(side, name="tokens")([x, kept])  # N x (1 + L) x W
    for index in range(depth):
        x = vit.block(x, width // HEAD_WIDTH, 4, f"blocks.{index}")
    x = WithoutClassToken(name="patches")(vit.layer_norm(x, "norm"))  # N x L x W
    return keras.Model([tokens, kept], layers.Dense(channels * patch_size**2, name="pixels")(x), name="decoder")


def places(kept, patches):
    """Returns each patch's place among the kept ones, int32 (N, L), and whether it is hidden, bool (N, L).

    A hidden patch has place 0. kept: the numbers of the kept patches, (N, M).
    """
    equal = tf.range(patches)[tf.newaxis, :, tf.newaxis] == tf.cast(kept, tf.int32)[:, tf.newaxis, :]  # N x L x M
    return tf.argmax(tf.cast(equal, tf.int32), axis=2, output_type=tf.int32), ~tf.reduce_any(equal, axis=2)


@keras.saving.register_keras_serializable("moco_tf")
class MaskTokens(keras.layers.Layer):
    """Puts tokens back in their patches' places and a learned token in each hidden place, and adds positions.

    [(N, 1 + M, W), kept (N, M)] -> (N, 1 + L, W). The positions are fixed, as the encoder's are, for this width.
    """

    def __init__(self, side, **kwargs):
        super().__init__(**kwargs)
        self.side = side

    def build(self, input_shape):
        width = input_shape[0][-1]
        self.mask_token = self.add_weight(
            name="mask_token", shape=(1, 1, width), initializer=keras.initializers.RandomNormal(stddev=0.02)
        )
        self.pos_embed = self.add_weight(  # a weight, as in the encoder; never trained
            name="pos_embed",
            shape=(1, 1 + self.side**2, width),
            initializer=lambda shape, dtype: tf.constant(vit.position_embedding(self.side, width), dtype),
            trainable=False,
        )

    def call(self, inputs):
        tokens, kept = inputs
        where, hidden = places(kept, self.side**2)
        visible = tf.gather(tokens[:, 1:], where, axis=1, batch_dims=1)  # N x L x W
        patches = tf.where(hidden[..., tf.newaxis], tf.cast(self.mask_token, tokens.dtype), visible)
        return tf.concat([tokens[:, :1], patches], axis=1) + tf.cast(self.pos_embed, tokens.dtype)

    def compute_output_shape(self, input_shape):
        return (input_shape[0][0], 1 + self.side**2, input_shape[0][2])

    def get_config(self):
        return super().get_config() | {"side": self.side}


@keras.saving.register_keras_serializable("moco_tf")
class WithoutClassToken(keras.layers.Layer):
    """All but the first token: (N, T, D) -> (N, T - 1, D)."""

    def call(self, tokens):
        return tokens[:, 1:]

    def compute_output_shape(self, input_shape):
        return (input_shape[0], input_shape[1] - 1, input_shape[2])
