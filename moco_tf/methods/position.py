"""Relative position: where does a tile stand beside the middle one? (Doersch, Gupta and Efros 2015, arXiv:1505.05192)

Axes: n images of this replica, D features of a tile.
"""

import keras
import tensorflow as tf

from moco_tf import encoders
from moco_tf.encoders import patch_grid
from moco_tf.methods.backbones import of_one_output
from moco_tf.methods.classification import Classification
from moco_tf.methods.flags import TILES

NEIGHBORS = (0, 1, 2, 3, 5, 6, 7, 8)  # of tile 4, the middle one, row by row


def model(config, options, inputs, source):
    """The `Position` of a run; tiles and whole images go through one backbone."""
    settings = {"bn_groups": options.bn_groups, "preprocessing": inputs, "seed": config.seed}
    return Position(encoders.of_config(config, any_size=True), hidden_dim=config.hidden_dim or None, **settings)


def tiles_of(batch):
    """The tiles (n, 9, s, s, 3) of a batch's views, which show them side by side."""
    (pictures,) = batch["views"]
    tiles = patch_grid.apart(pictures, TILES)
    return tf.reshape(tiles, (-1, TILES**2, *tiles.shape[1:]))


@keras.saving.register_keras_serializable("moco_tf")
class Position(Classification):
    """A batch is (pictures,) of 3 x 3 tiles side by side; the questions are all pairs of the middle tile and another.

    See `Classification`. hidden_dim: width of the layer before the answer, which the paper has too; None: as wide as
    a pair of features.
    """

    def __init__(self, backbone, hidden_dim=None, **settings):
        super().__init__(
            backbone,
            answers=len(NEIGHBORS),
            asked=2,
            hidden_dim=hidden_dim or 2 * of_one_output(backbone).output_shape[-1],
            **settings,
        )

    def pictures(self, batch):
        """The tiles, (n, 9, s, s, 3)."""
        return tiles_of(batch)

    def questions(self, features, batch, training):
        """Pairs (n, 8, 2D) of the middle tile and a neighbour, and which neighbour it is."""
        others = tf.gather(features, NEIGHBORS, axis=1)
        middle = tf.repeat(features[:, 4:5], len(NEIGHBORS), axis=1)
        places = tf.tile(tf.range(len(NEIGHBORS))[tf.newaxis], (tf.shape(features)[0], 1))
        return tf.concat([middle, others], axis=2), places
