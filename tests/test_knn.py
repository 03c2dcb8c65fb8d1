import numpy as np
import pytest

from moco_tf.evaluate import knn


def _naive(bank, bank_labels, queries, classes, k, t):
    bank = bank / np.linalg.norm(bank, axis=1, keepdims=True)
    found = []
    for query in queries / np.linalg.norm(queries, axis=1, keepdims=True):
        cosines = bank @ query
        votes = np.zeros(classes)
        for i in np.argsort(-cosines)[:k]:
            votes[bank_labels[i]] += np.exp(cosines[i] / t)
        found.append(votes.argmax())
    return np.array(found)


def test_votes_equal_a_naive_loops_across_chunks():
    rng = np.random.default_rng(0)
    bank, queries = rng.normal(size=(300, 16)), rng.normal(size=(knn.CHUNK + 77, 16))
    labels = rng.integers(0, 5, 300)
    result = knn.predict(bank, labels, queries, classes=5, k=20, temperature=0.1)
    np.testing.assert_array_equal(result, _naive(bank, labels, queries, 5, 20, 0.1))


def test_a_bank_smaller_than_k_votes_whole():
    bank, labels = np.eye(3), np.array([0, 1, 2])
    np.testing.assert_array_equal(knn.predict(bank, labels, bank, classes=3, k=200), labels)
    assert knn.accuracy(bank, labels, bank, np.array([0, 1, 0]), classes=3) == pytest.approx(200 / 3)
