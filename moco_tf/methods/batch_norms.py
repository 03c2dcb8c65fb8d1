"""The BatchNorm layers of a whole model: their running statistics, and normalising over all replicas.

`encoders/batch_norm.py` has the layer; `shuffle_bn.py` sets the layers' groups.
"""

import contextlib

import keras
import tensorflow as tf

from moco_tf.encoders.batch_norm import BatchNorm
from moco_tf.methods.keras_internals import layers_of


def layers(encoder):
    """The BatchNorm layers of a model at any depth, this package's and Keras' own."""
    return [
        layer
        for layer in [encoder, *layers_of(encoder)]
        if isinstance(layer, (BatchNorm, keras.layers.BatchNormalization))
    ]


def running_statistics(encoder):
    """The variables in which BatchNorm keeps its running means and variances."""
    return [v for layer in layers(encoder) for v in (layer.moving_mean, layer.moving_variance)]


@contextlib.contextmanager
def statistics_kept(encoder):
    """Restores the running statistics on exit, after encoding in training mode."""
    variables = running_statistics(encoder)
    before = [tf.identity(variable.value) for variable in variables]
    yield
    for variable, value in zip(variables, before, strict=True):
        variable.assign(value)


def synchronize(model):
    """Lets each BatchNorm normalise the batches of all replicas together."""
    for layer in layers(model):
        layer.synchronized = True
