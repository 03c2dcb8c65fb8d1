"""Rotation: by which of four quarter turns was an image turned? (Gidaris et al. 2018, arXiv:1803.07728)"""

import keras
import tensorflow as tf

from moco_tf import encoders
from moco_tf.methods.classification import Classification

TURNS = 4


def model(config, options, inputs, source):
    """The `Rotation` of a run."""
    settings = {"bn_groups": options.bn_groups, "preprocessing": inputs, "seed": config.seed}
    return Rotation(encoders.of_config(config), **settings)


@keras.saving.register_keras_serializable("moco_tf")
class Rotation(Classification):
    """A batch is (images,); a step uses all four turns of each image (arXiv:1901.09005). See `Classification`."""

    def __init__(self, backbone, **settings):
        super().__init__(backbone, answers=TURNS, **settings)

    def pictures(self, batch):
        """The images in all turns, (n, 4, S, S, 3): their pixels are moved and never mixed."""
        (images,) = batch["views"]
        return tf.stack([tf.image.rot90(images, turn) for turn in range(TURNS)], axis=1)

    def questions(self, features, batch, training):
        turns = tf.tile(tf.range(TURNS)[tf.newaxis], (tf.shape(features)[0], 1))
        return features, turns
