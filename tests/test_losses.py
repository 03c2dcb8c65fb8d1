import math

import numpy as np
import pytest
import tensorflow as tf

from moco_tf.methods.losses import batch_info_nce, info_nce, log_normalizer, nce, unit_length


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
    np.testing.assert_allclose(result.hardest, (queries @ dictionary.T).max(1), rtol=1e-12)
    np.testing.assert_allclose(result.negatives, (queries @ dictionary.T).mean(1), rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("size", [1, 4096, 4097, 10_000])
@pytest.mark.parametrize("jit_compile", [False, True])
def test_info_nce_in_blocks_has_the_softmaxs_loss_and_gradient(size, jit_compile):
    queries, keys, dictionary = (tf.constant(_unit(n, 8, seed=n)) for n in (6, 6, size))
    weights = tf.linspace(0.1, 2.0, 6)  # each query's own, as another loss might have
    weights = tf.cast(weights, tf.float64)

    @tf.function(jit_compile=jit_compile)
    def found():
        with tf.GradientTape() as tape:
            tape.watch([queries, keys])
            loss = info_nce(queries, keys, dictionary, 0.05).loss
        return loss, *tape.gradient(loss, [queries, keys], weights)

    with tf.GradientTape() as tape:
        tape.watch([queries, keys])
        logits = tf.concat([tf.reduce_sum(queries * keys, 1, True), queries @ tf.transpose(dictionary)], 1) / 0.05
        expected = tf.nn.sparse_softmax_cross_entropy_with_logits(tf.zeros(6, tf.int32), logits)
    for ours, theirs in zip(found(), [expected, *tape.gradient(expected, [queries, keys], weights)], strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-10, atol=1e-13)


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


def test_in_batch_info_nce_and_nt_xent_equal_naive_loops():
    q, k, t = _unit(4, 8), _unit(4, 8, seed=1), 0.3
    found = batch_info_nce(tf.constant(q[1:3]), tf.constant(k), tf.constant([1, 2]), t)
    for i in (1, 2):
        weights = [math.exp(q[i] @ key / t) for key in k]
        assert float(found.loss[i - 1]) == pytest.approx(-math.log(weights[i] / sum(weights)), rel=1e-12)
    z = np.concatenate([q, k])  # 2N views; the partner of i is i +- N
    rows, partners = np.array([0, 5, 7]), np.array([4, 1, 3])
    found = batch_info_nce(*map(tf.constant, (z[rows], z, partners)), t, itself=tf.constant(rows))
    for place, (i, j) in enumerate(zip(rows, partners, strict=True)):
        weights = {m: math.exp(z[i] @ z[m] / t) for m in range(8) if m != i}
        others = [z[i] @ z[m] for m in range(8) if m not in (i, j)]
        assert float(found.loss[place]) == pytest.approx(-math.log(weights[j] / sum(weights.values())), rel=1e-12)
        assert float(found.hardest[place]) == pytest.approx(max(others))
        assert float(found.negatives[place]) == pytest.approx(np.mean(others))


def test_nce_and_its_normaliser_equal_naive_loops():
    queries, keys, noise, t, records, log_z = _unit(5, 8), _unit(5, 8, seed=1), _unit(7, 8, seed=2), 0.2, 40, 3.5
    result = nce(*map(tf.constant, (queries, keys, noise)), t, log_z, records)

    def h(query, key):
        p = math.exp(query @ key / t) / math.exp(log_z)
        return p / (p + 7 / records)

    for i in range(5):
        expected = -math.log(h(queries[i], keys[i])) - sum(math.log(1 - h(queries[i], d)) for d in noise)
        assert float(result.loss[i]) == pytest.approx(expected, rel=1e-12)
    np.testing.assert_allclose(result.hardest, (queries @ noise.T).max(1), rtol=1e-12)
    np.testing.assert_allclose(result.negatives, (queries @ noise.T).mean(1), rtol=1e-12)
    z = records * np.mean([math.exp(q @ d / t) for q in queries for d in noise])
    found = log_normalizer(tf.constant(queries), tf.constant(noise), t, records)
    assert float(found) == pytest.approx(math.log(z), rel=1e-12)


def test_nce_takes_extreme_logits():
    loss = nce(*(tf.constant(_unit(n, 8, seed=n), tf.float32) for n in (4, 4, 9)), 1e-3, 5.0, 100).loss
    assert np.isfinite(loss).all()


def test_nces_gradient_nears_that_of_the_full_softmax_as_noise_grows():
    records, t = 50, 0.5
    query, bank = tf.constant(_unit(1, 6)), tf.constant(_unit(records, 6, seed=1))

    def gradient(loss):
        with tf.GradientTape() as tape:
            tape.watch(query)
            value = loss(tf.math.l2_normalize(query, axis=1))
        return tape.gradient(value, query).numpy()

    def softmax(q):
        return tf.nn.sparse_softmax_cross_entropy_with_logits([7], tf.matmul(q, bank, transpose_b=True) / t)

    log_z = float(tf.reduce_logsumexp(tf.matmul(query, bank, transpose_b=True) / t))
    full, distances = gradient(softmax), []
    for count in (10, 100, 1000, 10_000):
        noise = np.random.default_rng(3).integers(records, size=(30, count))
        found = [gradient(lambda q, n=n: nce(q, bank[7:8], tf.gather(bank, n), t, log_z, records).loss) for n in noise]
        distances.append(np.mean([np.linalg.norm(g - full) for g in found]) / np.linalg.norm(full))
    assert distances == sorted(distances, reverse=True)
    assert distances[0] > 0.3 and distances[-1] < 0.05, distances
