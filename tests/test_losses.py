import math

import numpy as np
import pytest
import tensorflow as tf

from moco_tf.losses import info_nce, unit_length


def _unit(*shape, seed=0):
    x = np.random.default_rng(seed).normal(size=shape)
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def test_info_nce_equals_a_naive_loop():
    queries, keys, dictionary, t = _unit(5, 8), _unit(5, 8, seed=1), _unit(7, 8, seed=2), 0.2
    result = info_nce(*map(tf.constant, (queries, keys, dictionary)), t)
    for i in range(5):
        positive = math.exp(queries[i] @ keys[i] / t)
        negatives = sum(math.exp(queries[i] @ d / t) for d in dictionary)
        assert float(result.loss[i]) == pytest.approx(-math.log(positive / (positive + negatives)), rel=1e-12)
    np.testing.assert_allclose(result.positives, (queries * keys).sum(1), rtol=1e-12)
    np.testing.assert_allclose(result.negatives, queries @ dictionary.T, rtol=1e-12)


def test_identical_features_give_log_k_plus_one():
    same = tf.ones((3, 4)) / 2.0
    np.testing.assert_allclose(info_nce(same, same, tf.ones((10, 4)) / 2.0, 0.07).loss, math.log(11), rtol=1e-6)


def test_small_temperatures_do_not_overflow():
    loss = info_nce(*(tf.constant(_unit(n, 8, seed=n), tf.float32) for n in (4, 4, 9)), 1e-3).loss
    assert np.isfinite(loss).all()


def test_unit_length_is_at_least_float32():
    assert unit_length(tf.ones((2, 3), tf.bfloat16)).dtype == tf.float32
    assert unit_length(tf.ones((2, 3), tf.float64)).dtype == tf.float64
    np.testing.assert_allclose(tf.norm(unit_length(tf.constant([[3.0, 4.0]])), axis=1), 1.0, rtol=1e-6)
