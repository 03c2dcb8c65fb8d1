import keras
import numpy as np
import pytest
import tensorflow as tf

import moco_tf


def test_sgd_equals_pytorchs_rule_when_the_rate_changes():
    start, rates = np.array([1.0, -2.0, 3.0]), [0.5, 0.5, 0.05, 0.05]
    gradients = np.random.default_rng(0).normal(size=(4, 3))
    w, v = start.copy(), np.zeros(3)
    variable = keras.Variable(start, dtype="float64")
    optimizer = moco_tf.SGD(0.5, momentum=0.9, weight_decay=0.1)
    for rate, gradient in zip(rates, gradients, strict=True):
        v = 0.9 * v + (gradient + 0.1 * w)
        w = w - np.float32(rate) * v
        optimizer.learning_rate = rate
        optimizer.apply([tf.constant(gradient)], [variable])
        np.testing.assert_allclose(variable.numpy(), w, rtol=1e-12)


def test_sgd_survives_serialisation():
    config = keras.optimizers.serialize(moco_tf.SGD(0.3, momentum=0.8, weight_decay=1e-3))
    again = keras.optimizers.deserialize(config)
    assert (float(again.learning_rate), again.momentum, again.coupled_weight_decay) == (
        pytest.approx(0.3),
        0.8,
        1e-3,
    )
