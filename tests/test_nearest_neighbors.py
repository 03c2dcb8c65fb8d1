import numpy as np
import pytest

from moco_tf.evaluate import nearest_neighbors


def _naive(bank, bank_labels, queries, classes, k, t):
    bank = bank / np.linalg.norm(bank, axis=1, keepdims=True)
    found = []
    for query in queries / np.linalg.norm(queries, axis=1, keepdims=True):
        cosines = bank @ query
        votes = np.zeros(classes)
        for i in np.argsort(-cosines)[:k]:
            votes[bank_labels[i]] += np.exp(cosines[i] / t)
        found.append(votes)
    return np.array(found)


@pytest.mark.parametrize("k", [1, 20, 200])
def test_votes_equal_a_naive_loops_across_chunks_of_queries_and_of_the_bank(monkeypatch, k):
    monkeypatch.setattr(nearest_neighbors, "CHUNK", 32)
    monkeypatch.setattr(nearest_neighbors, "ROWS", 70)
    rng = np.random.default_rng(k)
    bank, queries = rng.normal(size=(300, 16)), rng.normal(size=(109, 16))
    labels = rng.integers(0, 50, 300)
    votes = _naive(bank, labels, queries, 50, k, 0.1)
    np.testing.assert_array_equal(nearest_neighbors.predict(bank, labels, queries, 50, k, 0.1), votes.argmax(axis=1))
    cosines, numbers = nearest_neighbors.nearest(bank, queries, k)
    ranked = nearest_neighbors.rank(cosines, labels[numbers], 50)
    best = np.argsort(-votes, axis=1)[:, :5]
    np.testing.assert_array_equal(ranked, np.where(np.take_along_axis(votes, best, 1) > 0, best, -1))


def test_of_equally_near_rows_the_first_is_taken(monkeypatch):
    monkeypatch.setattr(nearest_neighbors, "ROWS", 3)
    bank = np.array([[0, 1], [1, 0], [2, 0], [3, 0], [1, 0], [0, 1]])
    np.testing.assert_array_equal(nearest_neighbors.nearest(bank, np.array([[5, 0]]), 3)[1], [[1, 2, 3]])


def test_no_more_similarities_are_held_than_a_chunk_of_queries_and_rows_has(monkeypatch):
    monkeypatch.setattr(nearest_neighbors, "CHUNK", 8)
    monkeypatch.setattr(nearest_neighbors, "ROWS", 16)
    shapes, nearest_rows = [], nearest_neighbors._nearest_rows

    def watched(queries, rows, scales, k):
        shapes.append((len(queries), len(rows)))
        return nearest_rows(queries, rows, scales, k)

    monkeypatch.setattr(nearest_neighbors, "_nearest_rows", watched)
    nearest_neighbors.nearest(np.eye(40), np.eye(40)[:20], 5)
    assert max(shapes) == (8, 16) and len(shapes) == 9


def test_a_bank_smaller_than_k_votes_whole():
    bank, labels = np.eye(3), np.array([0, 1, 2])
    np.testing.assert_array_equal(nearest_neighbors.predict(bank, labels, bank, classes=3, k=200), labels)
    assert nearest_neighbors.accuracy(bank, labels, bank, np.array([0, 1, 0]), classes=3) == pytest.approx(200 / 3)


def test_ten_thousand_classes_are_ranked_in_parts():
    labels = np.arange(10_000)
    ranked = nearest_neighbors.rank(np.ones((3000, 1), np.float32), labels[:3000, None], classes=10_000)
    np.testing.assert_array_equal(ranked[:, 0], labels[:3000])
    assert (ranked[:, 1:] == -1).all()


def test_the_least_temperature_counts_votes_without_overflow():
    cosines, labels = np.float32([[0.97, 0.96, 0.95]]), np.array([[1, 0, 0]])
    assert nearest_neighbors.rank(cosines, labels, 2, 0.01)[0].tolist() == [1, 0]  # e^97 > e^96 + e^95
    cosines = np.full((1, 3), np.float32(0.97))
    assert nearest_neighbors.rank(cosines, labels, 2, 0.01)[0].tolist() == [0, 1]


def test_features_that_are_no_finite_numbers_are_refused():
    bank = np.ones((4, 2))
    bank[2, 1] = np.nan
    with pytest.raises(ValueError, match="1 of the 4 bank have not"):
        nearest_neighbors.nearest(bank, np.ones((1, 2)), 1)
