"""Vision Transformers as MoCo v3 uses them: fixed sin-cos positions, and a patch projection that stays random.

Dosovitskiy et al. 2020 (arXiv:2010.11929); Chen et al. 2021 (arXiv:2104.02057), sections 4.2 and 4.3. Layers and
weights bear timm's names. Axes: N batch, T tokens (the class token and one per patch), D width, h heads, H W patches.
"""

import math
from functools import partial

import keras
import numpy as np
import tensorflow as tf
from keras import layers

POSITION_BASE = 10_000.0  # of the wave lengths
LAYER_NORM_EPSILON = 1e-6


def vit(dim, depth, heads, *, image_size=224, patch_size=16, freeze_patch=True, mlp_ratio=4, channels=3):
    """Builds a functional model: images float32 (N, image_size, image_size, channels) -> features (N, dim).

    The features are the class token after the last LayerNorm.

    Args:
      dim: D, a multiple of 4 (for the positions) and of `heads`.
      depth: number of blocks of attention and MLP, each after a LayerNorm and with a shortcut around it.
      heads: attention heads.
      image_size: side of the square input in pixels, a multiple of `patch_size`.
      patch_size: side of a patch in pixels.
      freeze_patch: keep the patch projection at its initial weights: the paper's remedy for instability (section 4.2).
      mlp_ratio: hidden width of an MLP divided by D.
      channels: number of channels of the images.
    """
    if image_size is None or image_size % patch_size:
        raise ValueError(f"image_size is a multiple of patch_size; got {image_size} and {patch_size}")
    if dim % 4 or dim % heads:
        raise ValueError(f"dim is a multiple of 4 and of heads; got {dim} and {heads} heads")
    side = image_size // patch_size
    inputs = keras.Input((image_size, image_size, channels))
    x = layers.Conv2D(
        dim,
        patch_size,
        strides=patch_size,
        kernel_initializer=_uniform(channels * patch_size**2 + dim),
        trainable=not freeze_patch,
        name="patch_embed.proj",
    )(inputs)
    x = layers.Reshape((side * side, dim), name="patch_embed.flatten")(x)
    x = Tokens(side, name="tokens")(x)  # N x T x D
    for index in range(depth):
        x = block(x, heads, mlp_ratio, f"blocks.{index}")
    # LayerNorm works token by token: only the class token needs it.
    return keras.Model(inputs, layer_norm(ClassToken(name="class_token")(x), "norm"))


def block(x, heads, mlp_ratio, name):
    """Applies attention and an MLP to tokens (N, T, D), each after a LayerNorm and with a shortcut around it."""
    dim = x.shape[-1]
    y = layer_norm(x, f"{name}.norm1")
    # Q, K and V are three square matrices in one: each has its own fans.
    y = layers.Dense(3 * dim, kernel_initializer=_uniform(2 * dim), name=f"{name}.attn.qkv")(y)
    y = Attention(heads, name=f"{name}.attn.heads")(y)
    y = layers.Dense(dim, name=f"{name}.attn.proj")(y)  # Keras' default is xavier-uniform, biases 0
    x = layers.Add(name=f"{name}.add1")([x, y])
    y = layer_norm(x, f"{name}.norm2")
    y = layers.Dense(mlp_ratio * dim, name=f"{name}.mlp.fc1")(y)
    y = Gelu(name=f"{name}.mlp.act")(y)
    y = layers.Dense(dim, name=f"{name}.mlp.fc2")(y)
    return layers.Add(name=f"{name}.add2")([x, y])


def layer_norm(x, name):
    """LayerNorm over the last axis, with timm's epsilon."""
    return layers.LayerNormalization(epsilon=LAYER_NORM_EPSILON, name=name)(x)


def parts(backbone, patches):
    """Splits a ViT after it adds the positions, so that its blocks can see only some of the patches.

    Args:
      backbone: what `vit` built.
      patches: M, how many patches the second part takes beside the class token.

    Returns:
      Two functional models of the backbone's own layers: images (N, H, W, 3) -> tokens (N, T, D), and
      tokens (N, 1 + M, D) -> {"features": (N, D), "tokens": (N, 1 + M, D)}, both after the last LayerNorm.
    """
    tokens, last = backbone.get_layer("tokens").output, backbone.get_layer("class_token").input
    some = keras.Input((1 + patches, tokens.shape[-1]))
    blocks = keras.models.clone_model(
        keras.Model(tokens, last), input_tensors=some, clone_function=lambda layer: layer
    )
    norm = backbone.get_layer("norm")
    features = norm(backbone.get_layer("class_token")(blocks.output))
    return keras.Model(backbone.input, tokens), keras.Model(
        some, {"features": features, "tokens": norm(blocks.output)}
    )


def patches_kept(rows, patches, kept, seed):
    """Draws the patches that each image keeps, int32 (rows, kept): a random choice among `patches`, in no order.

    seed: two integers; the choice is a function of them.
    """
    noise = tf.random.stateless_uniform((rows, patches), seed, alg="philox")
    return tf.math.top_k(noise, kept).indices


def position_embedding(side, dim):
    """Fixed 2-D sin-cos positions of a class token and side x side patches: float64 (1, 1 + side * side, dim).

    The sine and cosine of one coordinate and the sine and cosine of the other take a quarter of the channels each, at
    dim / 4 frequencies from 1 down to almost 1 / POSITION_BASE. The class token has zeros. In the authors' weights the
    first coordinate is the patch's row and the second its column, while patches are numbered row by row.
    """
    rows, columns = np.indices((side, side)).reshape(2, -1)
    frequencies = POSITION_BASE ** -(np.arange(dim // 4) / (dim // 4))
    angles = [np.outer(place, frequencies) for place in (rows, columns)]
    patches = np.concatenate([wave(angle) for angle in angles for wave in (np.sin, np.cos)], axis=1)
    return np.concatenate([np.zeros((1, dim)), patches])[np.newaxis]


@keras.saving.register_keras_serializable("moco_tf")
class Tokens(keras.layers.Layer):
    """Puts the class token before side x side patches and adds their positions: (N, T - 1, D) -> (N, T, D)."""

    def __init__(self, side, **kwargs):
        super().__init__(**kwargs)
        self.side = side

    def build(self, input_shape):
        dim = input_shape[-1]
        self.cls_token = self.add_weight(
            name="cls_token", shape=(1, 1, dim), initializer=keras.initializers.RandomNormal(stddev=1e-6)
        )
        self.pos_embed = self.add_weight(  # a weight, as in timm, so that files hold it; never trained
            name="pos_embed",
            shape=(1, 1 + self.side**2, dim),
            initializer=lambda shape, dtype: tf.constant(position_embedding(self.side, dim), dtype),
            trainable=False,
        )

    def call(self, patches):
        tokens = tf.repeat(tf.cast(self.cls_token, patches.dtype), tf.shape(patches)[0], axis=0)
        return tf.concat([tokens, patches], axis=1) + tf.cast(self.pos_embed, patches.dtype)

    def compute_output_shape(self, input_shape):
        return (input_shape[0], 1 + self.side**2, input_shape[2])

    def get_config(self):
        return super().get_config() | {"side": self.side}


@keras.saving.register_keras_serializable("moco_tf")
class Attention(keras.layers.Layer):
    """Scaled dot-product attention over packed queries, keys and values: (N, T, 3D) -> (N, T, D).

    softmax(q k' / sqrt(D / h)) v for each head (Vaswani et al. 2017, arXiv:1706.03762). The softmax's logits stay in
    the compute dtype. In bfloat16 this halves the memory of the T x T matrices and needs no casts around fused
    kernels.
    """

    def __init__(self, heads, **kwargs):
        super().__init__(**kwargs)
        self.heads = heads

    def call(self, packed):
        tokens, width = packed.shape[1], packed.shape[2] // (3 * self.heads)
        q, k, v = tf.unstack(tf.reshape(packed, (-1, tokens, 3, self.heads, width)), axis=2)
        q, k, v = (tf.transpose(x, (0, 2, 1, 3)) for x in (q * width**-0.5, k, v))  # N x h x T x D/h
        weights = tf.nn.softmax(tf.matmul(q, k, transpose_b=True))  # N x h x T x T
        mixed = tf.transpose(tf.matmul(weights, v), (0, 2, 1, 3))
        return tf.reshape(mixed, (-1, tokens, self.heads * width))

    def compute_output_shape(self, input_shape):
        return (*input_shape[:2], input_shape[2] // 3)

    def get_config(self):
        return super().get_config() | {"heads": self.heads}


@keras.saving.register_keras_serializable("moco_tf")
class Gelu(keras.layers.Layer):
    """x times the normal distribution function at x, exactly (by erf), as PyTorch has it."""

    def call(self, x):
        return 0.5 * x * (1.0 + tf.math.erf(0.5**0.5 * x))  # tf.nn.gelu takes the root in float32, even for float64

    def compute_output_shape(self, input_shape):
        return input_shape


@keras.saving.register_keras_serializable("moco_tf")
class ClassToken(keras.layers.Layer):
    """The first token: (N, T, D) -> (N, D)."""

    def call(self, tokens):
        return tokens[:, 0]


def _uniform(fans):
    limit = math.sqrt(6 / fans)
    return keras.initializers.RandomUniform(-limit, limit)


# Each takes vit()'s keywords. Small has the paper's 12 heads, twice DeiT's; tiny is DeiT's (arXiv:2012.12877).
vit_tiny = partial(vit, 192, 12, 3)
vit_small = partial(vit, 384, 12, 12)
vit_base = partial(vit, 768, 12, 12)
