"""Fast-MoCo: a query view is cut into four parts, and each pair of parts is a query.

Ci et al. 2022, "Fast-MoCo: Boost Momentum-based Contrastive Learning with Combinatorial Patches" (arXiv:2207.08220):
divide, encode, combine. Keys are encoded from whole views. This module uses `MoCo`'s queue and heads; the paper
uses MoCo v3's.

Axes: n images of this replica, D features, C length of the projection.
"""

import itertools

import keras
import numpy as np
import tensorflow as tf

from moco_tf import encoders
from moco_tf.encoders import heads, patch_grid
from moco_tf.methods import batch_norms
from moco_tf.methods.losses import unit_length
from moco_tf.methods.moco import MoCo, settings

PARTS = 2  # along each side
TOGETHER = 2  # parts that make a query
PAIRS = list(itertools.combinations(range(PARTS**2), TOGETHER))
MEANS = np.array([[(part in pair) / TOGETHER for part in range(PARTS**2)] for pair in PAIRS])  # 6 x 4


def model(config, options, inputs, source):
    """The `CombinedPatches` of a run."""
    return CombinedPatches(encoders.of_config(config, any_size=True), **settings(config, options, inputs, source))


@keras.saving.register_keras_serializable("moco_tf")
class CombinedPatches(MoCo):
    """`MoCo` whose queries are made of parts of a view: six per view; the loss is the mean over them.

    The arguments are those of `MoCo`. The backbone takes images of any size; views have even sides.
    """

    def __init__(self, backbone, **kwargs):
        super().__init__(backbone, **kwargs)
        project = heads.projection(self.query_encoder)
        self.project = lambda *args, **kwargs: project(*args, **kwargs)  # its layers are the query encoder's

    def _queries(self, images, training):
        """Returns six embeddings (n, C): of the mean features of each pair of the four parts, encoded separately."""
        parts = patch_grid.apart(images, PARTS)  # 4n x H/2 x W/2 x 3
        features = self.query_encoder(parts, training=training)["features"]
        width = features.shape[-1]
        features = tf.reshape(features, (-1, PARTS**2, width))  # n x 4 x D
        pairs = tf.reshape(tf.matmul(tf.cast(MEANS, features.dtype), features), (-1, width))  # 6n x D
        queries = unit_length(self.project(pairs, training=training))
        return tf.unstack(tf.reshape(queries, (-1, len(MEANS), self.dim)), axis=1)

    def finish(self, batch, context, terms):
        """Sets BatchNorm's running statistics to those of whole views, which only the key encoder sees."""
        super().finish(batch, context, terms)
        own, of_keys = map(batch_norms.running_statistics, (self.query_encoder, self.key_encoder))
        for variable, other in zip(own, of_keys, strict=True):
            variable.assign(other.value)
