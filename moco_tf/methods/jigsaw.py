"""Jigsaw: in which of P orders are nine tiles of an image? (Noroozi and Favaro 2016, arXiv:1603.09246)

Axes: n images of this replica, N of the global batch, D features of a tile, P orders.
"""

import functools
import itertools

import keras
import numpy as np
import tensorflow as tf

from moco_tf import encoders, replicas
from moco_tf.methods.backbones import of_one_output
from moco_tf.methods.classification import Classification
from moco_tf.methods.flags import TILES
from moco_tf.methods.position import tiles_of


def model(config, options, inputs, source):
    """The `Jigsaw` of a run; tiles and whole images go through one backbone."""
    settings = {"bn_groups": options.bn_groups, "preprocessing": inputs, "seed": config.seed}
    return Jigsaw(
        encoders.of_config(config, any_size=True),
        permutations=options.permutations,
        hidden_dim=config.hidden_dim or None,
        **settings,
    )


@keras.saving.register_keras_serializable("moco_tf")
class Jigsaw(Classification):
    """A batch is (pictures,) of 3 x 3 tiles side by side; each step draws a new order for each picture.

    The encoded tiles are put in that order, which is the same as encoding them in that order. See `Classification`.

    Args:
      permutations: P.
    """

    def __init__(self, backbone, permutations=100, hidden_dim=None, **settings):
        super().__init__(
            backbone,
            answers=permutations,
            asked=TILES**2,
            hidden_dim=hidden_dim or 2 * of_one_output(backbone).output_shape[-1],
            **settings,
        )
        self.permutations = permutations

    @property
    def orders(self):
        """int32 (P, 9); only training looks for them, which takes seconds."""
        return far_apart(TILES**2, self.permutations, self.seed)

    def pictures(self, batch):
        """The tiles, (n, 9, s, s, 3)."""
        return tiles_of(batch)

    def questions(self, features, batch, training):
        """Returns the tiles' features in an order, (n, 1, 9D), and the order's number among the P."""
        seed = (self.seed, self.drawing_step(training))
        kinds = {"minval": 0, "maxval": self.permutations, "dtype": tf.int32}
        drawn = replicas.draw(tf.random.stateless_uniform, tf.shape(features)[0], (), seed, **kinds)  # n
        ordered = tf.gather(features, tf.gather(self.orders, drawn), axis=1, batch_dims=1)  # n x 9 x D
        return tf.reshape(ordered, (-1, 1, TILES**2 * features.shape[-1])), drawn[:, tf.newaxis]

    def get_config(self):
        return super().get_config() | {"permutations": self.permutations}


@functools.cache
def far_apart(length, number, seed=0):
    """Returns `number` orders of 0 .. length - 1, int32 (number, length), as far apart as a greedy choice makes them.

    The distance is the Hamming distance: in how many places two orders differ. The next order is the one whose nearest
    chosen order is the furthest. Among equals, it is the one that is furthest from all chosen orders on average; then
    the first by number. seed: selects the first order.
    """
    places = np.array(list(itertools.permutations(range(length))), np.uint8).T.copy()  # length x length!
    chosen = [seed % places.shape[1]]
    nearest, total = np.full(places.shape[1], length, np.uint8), np.zeros(places.shape[1], np.int32)
    while len(chosen) < number:
        distances = sum((place != place[chosen[-1]]).view(np.uint8) for place in places)
        nearest, total = np.minimum(nearest, distances), total + distances
        chosen.append(int(np.argmax(np.where(nearest == nearest.max(), total, -1))))
    return places[:, chosen].T.astype(np.int32)
