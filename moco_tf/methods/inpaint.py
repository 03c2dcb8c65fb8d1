"""Inpainting: what was in the missing regions? (Pathak et al. 2016, arXiv:1604.07379)

Axes: n images of this replica, S side.
"""

import keras
import tensorflow as tf

from moco_tf import encoders
from moco_tf.methods.reconstruction import Reconstruction

COARSE = 4  # values along each side of the noise whose highest parts are the regions


def model(config, options, inputs, source):
    """The `Inpaint` of a run."""
    return Inpaint(
        encoders.of_config(config),
        missing=options.missing,
        bn_groups=options.bn_groups,
        preprocessing=inputs,
        seed=config.seed,
    )


@keras.saving.register_keras_serializable("moco_tf")
class Inpaint(Reconstruction):
    """The loss is the mean squared difference where the image is missing. See `Reconstruction`.

    Args:
      missing: share of an image's pixels that are missing; the data's mean replaces them.
    """

    def __init__(self, backbone, missing=0.25, **settings):
        super().__init__(backbone, **settings)
        self.missing = missing

    def corrupted(self, images, draw):
        hole = regions(draw((COARSE, COARSE, 1)), images.shape[1], self.missing)
        return images * tf.cast(1 - hole, images.dtype), hole

    def loss_of(self, predicted, images, hole):
        squares = hole * tf.reduce_mean((predicted - images) ** 2, axis=3, keepdims=True)
        return tf.reduce_sum(squares, axis=(1, 2, 3)) / tf.reduce_sum(hole, axis=(1, 2, 3))

    def get_config(self):
        return super().get_config() | {"missing": self.missing}


def regions(noise, side, share):
    """Returns masks (n, side, side, 1), 1 where smooth noise is highest, at the same number of pixels of each image.

    noise: (n, c, c, 1); it is enlarged.
    """
    heights = tf.image.resize(noise, (side, side))
    flat = tf.reshape(heights, (-1, side * side))
    count = min(max(1, round(share * side * side)), side * side - 1)
    ranks = tf.argsort(tf.argsort(flat, direction="DESCENDING", stable=True))  # no two are equal, as heights may be
    return tf.reshape(tf.cast(ranks < count, noise.dtype), (-1, side, side, 1))
