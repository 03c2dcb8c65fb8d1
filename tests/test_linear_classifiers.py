import keras
import numpy as np
import pytest
import tensorflow as tf

from moco_tf.encoders.batch_norm import BatchNorm
from moco_tf.evaluate import linear_classifiers
from moco_tf.optimizers import SGD


def _blobs(count, seed, classes=8, width=24, spread=1.3):
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(classes, width))
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, count)
    features = centres[labels] + spread * rng.normal(size=(count, width))
    return np.maximum(features, 0).astype(np.float32), labels  # as features after a ReLU


def test_each_of_many_heads_learns_as_the_projects_sgd_teaches_one_alone():
    features, labels = _blobs(96, 1)
    rates = [0.3, 30.0]
    heads = linear_classifiers.LinearClassifiers(24, 8, rates, seed=5)
    start = heads.folded()
    factors = [1.0, 0.1]
    list(linear_classifiers.fit(heads, features, labels, 40, factors, seed=2))
    kernel, bias = heads.folded()
    for place, rate in enumerate(rates):
        dense = keras.layers.Dense(8)
        dense.build((None, 24))
        dense.set_weights([start[0][:, place], start[1][place]])
        factor = tf.Variable(1.0)
        optimizer = SGD(lambda rate=rate, factor=factor: rate * factor.value(), momentum=0.9)
        optimizer.build(dense.trainable_variables)
        for epoch, value in enumerate(factors):
            factor.assign(value)
            order = np.random.default_rng((2, epoch)).permutation(96)
            for some in np.split(order, [40, 80]):
                with tf.GradientTape() as tape:
                    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)(
                        labels[some], dense(features[some])
                    )
                variables = dense.trainable_variables
                optimizer.apply(tape.gradient(loss, variables), variables)
        scale = np.abs(dense.kernel.numpy()).max()
        np.testing.assert_allclose(kernel[:, place], dense.kernel.numpy(), atol=1e-4 * scale)
        np.testing.assert_allclose(bias[place], dense.bias.numpy(), atol=1e-4 * scale)


def test_heads_start_at_normal_weights_of_a_hundredth_and_zero_biases():
    kernel, bias = linear_classifiers.LinearClassifiers(400, 50, [1.0, 2.0], seed=3).folded()
    assert kernel.std() == pytest.approx(0.01, rel=0.02) and abs(kernel.mean()) < 1e-4
    np.testing.assert_array_equal(kernel[:, 0], kernel[:, 1])
    assert not bias.any()


def test_a_folded_batch_norm_gives_the_logits_of_norm_and_classifier():
    features, labels = _blobs(200, 1)
    heads = linear_classifiers.LinearClassifiers(24, 8, [0.1], batch_norm=True)
    list(linear_classifiers.fit(heads, features + 3, labels, 50, [1.0] * 5))
    assert isinstance(heads.norm, BatchNorm) and not heads.norm.trainable_variables
    kernel, bias = heads.folded()
    expected = tf.tensordot(heads.norm(features, training=False), heads.kernel, 1) + heads.bias
    np.testing.assert_allclose(np.tensordot(features, kernel, 1) + bias, expected, atol=1e-4)


def test_the_probe_is_within_a_point_of_scikit_learns_logistic_regression():
    sklearn = pytest.importorskip("sklearn.linear_model")
    features, labels = _blobs(3000, 1)
    test_features, test_labels = _blobs(3000, 2)
    rates = [10**n for n in (-2, -1.5, -1, -0.5, 0, 0.5, 1, 1.5)]
    factors = [0.5 * (1 + np.cos(np.pi * epoch / 40)) for epoch in range(40)]
    held_out = linear_classifiers.search(features, labels, 8, rates, 128, factors)
    heads = linear_classifiers.LinearClassifiers(24, 8, [rates[int(held_out.argmax())]])
    list(linear_classifiers.fit(heads, features, labels, 128, factors))
    kernel, bias = (part[..., 0, :] for part in heads.folded())
    ours = 100 * (linear_classifiers.rank(test_features, kernel, bias)[:, 0] == test_labels).mean()
    reference = sklearn.LogisticRegression(max_iter=2000).fit(features, labels)
    theirs = 100 * reference.score(test_features, test_labels)
    assert 60 < theirs < 95  # a task in which there is something to lose
    assert ours == pytest.approx(theirs, abs=1)


def test_the_search_judges_on_images_that_it_did_not_learn_from_and_does_not_depend_on_company():
    rng = np.random.default_rng(0)
    features, labels = rng.normal(size=(400, 300)).astype(np.float32), rng.integers(0, 10, 400)  # nothing to learn
    found = linear_classifiers.search(features, labels, 10, [0.1, 1.0], 64, [1.0] * 10, held_out=0.5)
    assert (found < 20).all()  # learnt by heart, it would be 100
    alone = linear_classifiers.search(features, labels, 10, [1.0], 64, [1.0] * 10, held_out=0.5)
    assert alone[0] == pytest.approx(found[1], abs=1)
