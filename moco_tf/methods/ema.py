"""The momentum encoder's arithmetic (MoCo, section 3.2, equation 2)."""

import math

import keras
import tensorflow as tf

from moco_tf.methods.keras_internals import layers_of


def copy_weights(source, target):
    """Sets every weight of `target`, statistics included, to that of `source`, a model of the same build."""
    for a, b in zip(source.weights, target.weights, strict=True):
        b.assign(a)
    derive_state(target)


def derive_state(model):
    """Recomputes what layers derive from their weights, after the weights were set by hand.

    For example, Normalization computes with its mean and variance in another shape than it keeps them in. When Keras
    loads a file, layers derive these values in `load_own_variables`: here they load their own weights.
    """
    for layer in layers_of(model):
        if type(layer).load_own_variables is not keras.layers.Layer.load_own_variables:
            own = {}
            layer.save_own_variables(own)
            layer.load_own_variables(own)


def ema_update(source, target, momentum):
    """target <- momentum * target + (1 - momentum) * source, for parameters only.

    BatchNorm's running statistics are not parameters: each encoder keeps its own. The step is written as a
    difference so that equal weights stay equal to the last bit.
    """
    parameters = [(a, b) for a, b in zip(source.weights, target.weights, strict=True) if a.trainable]
    rates = {dtype: tf.cast(1.0 - momentum, dtype) for dtype in dict.fromkeys(b.dtype for _, b in parameters)}
    for a, b in parameters:
        # b -= (1 - momentum) * (b - a), without a tensor for the product.
        tf.raw_ops.ResourceApplyGradientDescent(var=b.value.handle, alpha=rates[b.dtype], delta=b.value - a.value)


def rise_steps(config, options, source):
    """Returns the number of steps in which a run's momentum rises to 1; None: it is constant."""
    if options.momentum_schedule == "constant":
        return None
    return config.epochs * (source.size // config.batch_size)


def cosine_momentum(base, step, steps):
    """Momentum at a step: from `base` up to 1 along a half cosine over `steps` (MoCo v3, section 4.1).

    Without `steps` it stays `base`.
    """
    if steps is None:
        return tf.constant(base, tf.float64)
    progress = tf.minimum(tf.cast(step, tf.float64) / steps, 1.0)
    return 1.0 - (1.0 - base) * (1.0 + tf.cos(math.pi * progress)) / 2.0
