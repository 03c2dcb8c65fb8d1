"""A small Transformer for texts, whose dropout is a function of a given seed.

Axes: N batch, L words, D width.
"""

import contextlib

import keras
import tensorflow as tf
from keras import layers

from moco_tf import replicas

START = 0.02  # standard deviation of the initial weights, as in BERT
START_OF_WORDS = 0.05


def transformer(inputs, width=128, depth=2, heads=4, dropout=0.1):
    """A backbone of texts: words int32 (N, L), 0 where there is none -> features (N, D), the mean over the words.

    It has pre-norm blocks (Xiong et al. 2020, arXiv:2002.04745) of attention and a hidden layer of 4 D. Dropout
    follows the word vectors and both parts of a block, but not the attention weights.

    Args:
      inputs: the `Words` that it takes.
      depth: number of blocks. With 0, the features are the mean of the words' vectors alone, whatever their order.
    """
    words = keras.Input((inputs.length,), dtype="int32", name="words")
    initial = keras.initializers.RandomNormal(stddev=START_OF_WORDS)
    x = layers.Embedding(inputs.hash_buckets, width, embeddings_initializer=initial, name="word_vectors")(words)
    if depth:
        x = Positions(name="positions")(x)
    x = Dropout(dropout, 0, name="dropout")(x)
    for block in range(depth):
        name = f"block{block}"
        y = layers.LayerNormalization(epsilon=1e-6, name=f"{name}.norm1")(x)
        y = SelfAttention(heads, name=f"{name}.attention")([y, words])
        x = layers.Add(name=f"{name}.add1")([x, Dropout(dropout, 2 * block + 1, name=f"{name}.dropout1")(y)])
        y = layers.LayerNormalization(epsilon=1e-6, name=f"{name}.norm2")(x)
        y = _dense(4 * width, f"{name}.hidden", activation="gelu")(y)
        y = _dense(width, f"{name}.output")(y)
        x = layers.Add(name=f"{name}.add2")([x, Dropout(dropout, 2 * block + 2, name=f"{name}.dropout2")(y)])
    if depth:
        x = layers.LayerNormalization(epsilon=1e-6, name="last_norm")(x)
    return keras.Model(words, MeanOverWords(name="mean_over_words")([x, words]), name="transformer")


def _dense(units, name, **settings):
    return layers.Dense(units, kernel_initializer=keras.initializers.RandomNormal(stddev=START), name=name, **settings)


@keras.saving.register_keras_serializable("moco_tf")
class Positions(keras.layers.Layer):
    """Adds a learnt vector for each place: (N, L, D) -> (N, L, D)."""

    def build(self, shape):
        initial = keras.initializers.RandomNormal(stddev=START)
        self.vectors = self.add_weight(name="vectors", shape=shape[1:], initializer=initial)

    def call(self, x):
        return x + self.vectors


@keras.saving.register_keras_serializable("moco_tf")
class SelfAttention(keras.layers.Layer):
    """Attention over the words that are present: [(N, L, D), words (N, L)] -> (N, L, D)."""

    def __init__(self, heads, **kwargs):
        super().__init__(**kwargs)
        self.heads = heads

    def build(self, shapes):
        width = shapes[0][-1]
        initial = keras.initializers.RandomNormal(stddev=START)
        self.attention = layers.MultiHeadAttention(
            self.heads, width // self.heads, kernel_initializer=initial, dtype=self.dtype_policy, name="attention"
        )
        self.attention.build(shapes[0], shapes[0])

    def call(self, x_and_words):
        x, words = x_and_words
        return self.attention(x, x, attention_mask=(words > 0)[:, tf.newaxis, :])

    def compute_output_shape(self, shapes):
        return shapes[0]

    def get_config(self):
        return super().get_config() | {"heads": self.heads}


@keras.saving.register_keras_serializable("moco_tf")
class MeanOverWords(keras.layers.Layer):
    """[(N, L, D), words (N, L)] -> (N, D): the mean over the words that are present, 0 if there are none."""

    def call(self, x_and_words):
        x, words = x_and_words
        there = tf.cast(words > 0, x.dtype)[..., tf.newaxis]
        return tf.math.divide_no_nan(tf.reduce_sum(x * there, axis=1), tf.reduce_sum(there, axis=1))

    def compute_output_shape(self, shapes):
        return (shapes[0][0], shapes[0][2])


@keras.saving.register_keras_serializable("moco_tf")
class Dropout(keras.layers.Layer):
    """Zeroes a share `rate` of its input in training, and scales the rest up. A seed says which values become zero.

    The layer draws the mask of the global batch, and each replica takes its own rows. So several replicas do what one
    does.

    Args:
      number: tells the Dropouts of a network apart.

    Attributes:
      draw_from: while a model trains (`drawing_from`), a function without arguments that returns a seed, int64 (2,);
        otherwise None.
    """

    def __init__(self, rate, number, **kwargs):
        super().__init__(**kwargs)
        if not 0 <= rate < 1:
            raise ValueError(f"dropout is a share, from 0 to less than 1, not {rate}")
        self.rate = rate
        self.number = number
        self.draw_from = None

    def call(self, x, training=False):
        if not training or not self.rate:
            return x
        if self.draw_from is None:
            raise ValueError(
                "this Dropout draws from what it is told, within moco_tf.encoders.text.drawing_from(layers, seed), as "
                "SimCSE does; elsewhere call the network with training=False"
            )
        seed = tf.random.experimental.stateless_fold_in(self.draw_from(), self.number)
        drawn = replicas.draw(tf.random.stateless_uniform, tf.shape(x)[0], x.shape[1:], seed)
        return tf.where(drawn >= self.rate, x / (1 - self.rate), tf.zeros_like(x))

    def get_config(self):
        return super().get_config() | {"rate": self.rate, "number": self.number}


@contextlib.contextmanager
def drawing_from(layers_of_network, seed):
    """While open, makes all `Dropout`s among some layers draw from what a function `seed` returns, int64 (2,)."""
    dropouts = [layer for layer in layers_of_network if isinstance(layer, Dropout)]
    for layer in dropouts:
        layer.draw_from = seed
    try:
        yield
    finally:
        for layer in dropouts:
            layer.draw_from = None
