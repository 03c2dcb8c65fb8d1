"""An image as a grid of overlapping patches, each encoded by itself (CPC, arXiv:1807.03748), and their predictor.

Axes: N batch, G patches along each side, P side of a patch, D features of a patch.
"""

import keras
import tensorflow as tf
from keras import layers

BLOCKS = 5  # of the context network
CONTEXT_WIDTH = 256


def sides(image_size, grid):
    """Returns (P, step) in pixels for a grid of patches that overlap by half: P = 2 S / (G + 1).

    Raises:
      ValueError: G + 1 does not divide the image's side.
    """
    if image_size % (grid + 1):
        raise ValueError(
            f"{grid} x {grid} patches that overlap by half cut an image's side into {grid + 1} equal parts; "
            f"{image_size} pixels are no multiple"
        )
    return 2 * image_size // (grid + 1), image_size // (grid + 1)


def cut(images, grid):
    """Images (..., S, S, C) -> their patches, row by row, (..., G, G, P, P, C)."""
    side, step = sides(images.shape[-2], grid)
    places = step * tf.range(grid)[:, tf.newaxis] + tf.range(side)[tf.newaxis, :]  # G x P
    rows = tf.gather(images, places, axis=-3)  # ... x G x P x S x C
    patches = tf.gather(rows, places, axis=-2)  # ... x G x P x G x P x C
    last = patches.shape.rank
    return tf.transpose(patches, [*range(last - 5), last - 5, last - 3, last - 4, last - 2, last - 1])


def side_by_side(patches):
    """Patches (..., G, G, P, P, C) as one picture that shows them without overlap, (..., G P, G P, C)."""
    grid, side, last = patches.shape[-5], patches.shape[-3], patches.shape.rank
    swapped = tf.transpose(patches, [*range(last - 5), last - 5, last - 3, last - 4, last - 2, last - 1])
    return tf.reshape(swapped, tf.concat([tf.shape(patches)[:-5], [grid * side, grid * side, patches.shape[-1]]], 0))


def apart(pictures, grid):
    """Reverses `side_by_side`: pictures (N, G P, G Q, C) -> (N G G, P, Q, C), a picture's patches row by row."""
    height, width, channels = pictures.shape[1] // grid, pictures.shape[2] // grid, pictures.shape[3]
    patches = tf.reshape(pictures, (-1, grid, height, grid, width, channels))
    return tf.reshape(tf.transpose(patches, (0, 1, 3, 2, 4, 5)), (-1, height, width, channels))


def luma(images):
    """Returns the luma (..., 1) of RGB images (..., 3), their grey values, by the weights of ITU-R BT.601."""
    return tf.tensordot(images, tf.constant([[0.299], [0.587], [0.114]], images.dtype), 1)


@keras.saving.register_keras_serializable("moco_tf")
class GreyPatches(keras.layers.Layer):
    """Normalised RGB images (N, S, S, 3) -> the patches of their luma, (N G G, P, P, 1)."""

    def __init__(self, grid, **kwargs):
        super().__init__(**kwargs)
        self.grid = grid

    def call(self, images):
        patches = cut(luma(images), self.grid)
        return tf.reshape(patches, (-1, *patches.shape[3:]))

    def compute_output_shape(self, input_shape):
        side, _ = sides(input_shape[1], self.grid)
        return (None, side, side, 1)

    def get_config(self):
        return super().get_config() | {"grid": self.grid}


@keras.saving.register_keras_serializable("moco_tf")
class MeanOverGrid(keras.layers.Layer):
    """(N G G, D) -> (N, D)."""

    def __init__(self, grid, **kwargs):
        super().__init__(**kwargs)
        self.grid = grid

    def call(self, vectors):
        return tf.reduce_mean(tf.reshape(vectors, (-1, self.grid**2, vectors.shape[-1])), axis=1)

    def compute_output_shape(self, input_shape):
        return input_shape

    def get_config(self):
        return super().get_config() | {"grid": self.grid}


def of_patches(make, image_size, grid):
    """A backbone: normalised RGB images (N, S, S, 3) -> the mean over the grid of its patches' features, (N, D).

    make: a function of P -> the patches' encoder, a backbone of grey images (N, P, P, 1) -> (N, D), without BatchNorm,
      which would let patches see one another.
    """
    encoder = make(sides(image_size, grid)[0])
    encoder.name = "patch_encoder"
    inputs = keras.Input((image_size, image_size, 3))
    vectors = encoder(GreyPatches(grid, name="patches")(inputs))
    return keras.Model(inputs, MeanOverGrid(grid, name="mean_over_grid")(vectors))


def predictor(grid, width, dim, steps, directions=1, hidden=CONTEXT_WIDTH):
    """Returns a network that predicts the patches of a grid from above: (N, G, G, D) -> (N, G, G, steps, dim).

    At row r it predicts patches of `steps` rows further down, in the same column. It sees only the rows up to r. The
    network takes and gives a list of `directions` turned grids, each with its own weights.

    The context network is the one printed in CPC v2 (arXiv:1905.09272, appendix): residual blocks of masked
    convolutions. Linear maps follow, one for each row ahead.
    """
    inputs = [keras.Input((grid, grid, width)) for _ in range(directions)]
    outputs = []
    for turn, vectors in enumerate(inputs):
        x = vectors
        for block in range(BLOCKS):
            name = f"context{turn}.{block}"
            y = layers.Conv2D(hidden, 1, activation="relu", name=f"{name}.conv1")(x)
            y = layers.Conv2D(hidden, (1, 3), padding="same", name=f"{name}.conv2")(y)
            y = layers.ZeroPadding2D(((1, 0), (0, 0)), name=f"{name}.pad")(y)  # a row sees itself and the one above
            y = layers.Conv2D(hidden, (2, 1), activation="relu", name=f"{name}.conv3")(y)
            y = layers.Conv2D(width, 1, name=f"{name}.conv4")(y)
            x = layers.Add(name=f"{name}.add")([x, y])
        context = layers.ReLU(name=f"context{turn}.relu")(x)
        predicted = layers.Conv2D(steps * dim, 1, name=f"predict{turn}")(context)
        outputs.append(layers.Reshape((grid, grid, steps, dim), name=f"rows{turn}")(predicted))
    return keras.Model(inputs, outputs, name="predictor")
