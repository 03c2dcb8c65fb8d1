"""Weighted k-nearest-neighbour classification of features, the monitor of self-supervised training.

The rule comes from instance discrimination (Wu et al. 2018, arXiv:1805.01978, section 3.4), with k = 200 and t = 0.1
as in the CIFAR-10 demo. Axes: N queries, B bank, C features, L classes, k neighbours.
"""

import numpy as np
import tensorflow as tf

K, TEMPERATURE = 200, 0.1
CHUNK = 2048  # queries at a time
ROWS = 16_384  # of the bank at a time: memory holds CHUNK x ROWS similarities, never N x B


def predict(bank, bank_labels, queries, classes, k=K, temperature=TEMPERATURE):
    """Predicts labels of queries by a vote of their nearest bank features, each with the weight exp(cosine / t).

    Args:
      bank: (B, C) features; queries: (N, C) features. Neither needs unit length.
      bank_labels: (B,) integers in [0, classes).
      k: neighbours that vote; the whole bank if it holds fewer.

    Returns:
      (N,) int64 NumPy array.
    """
    cosines, numbers = nearest(bank, queries, k)
    return rank(cosines, np.asarray(bank_labels)[numbers], classes, temperature, places=1)[:, 0]


def accuracy(bank, bank_labels, queries, labels, classes, k=K, temperature=TEMPERATURE):
    """Returns the top-1 accuracy in percent of `predict` against labels (N,)."""
    return 100.0 * float(np.mean(predict(bank, bank_labels, queries, classes, k, temperature) == labels))


def nearest(bank, queries, k):
    """Finds the k rows of a bank nearest to each query by cosine, the nearest first; of equal rows the first one.

    Beside its arguments the function holds CHUNK x ROWS similarities and one number per row: no second bank.

    Args:
      bank: (B, C) features; queries: (N, C) features. Neither needs unit length.

    Returns:
      NumPy arrays (N, min(k, B)): cosines float32, row numbers int32.

    Raises:
      ValueError: a feature is not finite.
    """
    k = min(k, len(bank))
    scales = _inverse_lengths(bank, "bank")
    query_scales = _inverse_lengths(queries, "queries")
    cosines, numbers = np.empty((len(queries), k), np.float32), np.empty((len(queries), k), np.int32)
    for first in range(0, len(queries), CHUNK):
        part = slice(first, first + CHUNK)
        some = tf.cast(queries[part], tf.float32) * query_scales[part, None]
        best = None
        for start in range(0, len(bank), ROWS):
            rows = tf.cast(bank[start : start + ROWS], tf.float32)
            more, places = _nearest_rows(some, rows, scales[start : start + ROWS], k)
            of_block = (more, places + start)
            best = of_block if best is None else _nearer(*best, *of_block, k)
        cosines[part], numbers[part] = best
    return cosines, numbers


def rank(cosines, labels, classes, temperature=TEMPERATURE, places=5):
    """Ranks classes by the votes of neighbours, most votes first.

    Args:
      cosines: (N, k) of the neighbours; labels: (N, k) of the neighbours, integers in [0, classes).

    Returns:
      (N, min(places, classes)) int64 NumPy array, -1 where no other class has a vote.
    """
    at_once = max(1, 2**24 // classes)  # memory holds the votes of a part of the N x L
    parts = [slice(first, first + at_once) for first in range(0, len(cosines), at_once)]
    ranked = [_rank(cosines[part], labels[part], classes, temperature, min(places, classes)) for part in parts]
    return np.concatenate([r.numpy() for r in ranked])


def _inverse_lengths(features, name):
    """Returns 1 / length of each row, float32 (N,), such that a row of zeros stays zeros."""
    lengths = np.empty(len(features), np.float32)
    for start in range(0, len(features), ROWS):
        rows = np.asarray(features[start : start + ROWS], np.float32)
        lengths[start : start + ROWS] = np.sqrt(np.einsum("ij,ij->i", rows, rows))
    bad = np.flatnonzero(~np.isfinite(lengths))
    if len(bad):
        raise ValueError(f"features have finite numbers; {len(bad)} of the {len(features)} {name} have not")
    return 1 / np.maximum(lengths, 1e-6)


@tf.function(reduce_retracing=True)
def _nearest_rows(queries, rows, scales, k):
    return tf.math.top_k(tf.matmul(queries, rows, transpose_b=True) * scales, tf.minimum(k, tf.shape(rows)[0]))


@tf.function(reduce_retracing=True)
def _nearer(cosines, numbers, more_cosines, more_numbers, k):
    cosines, numbers = tf.concat([cosines, more_cosines], 1), tf.concat([numbers, more_numbers], 1)
    cosines, places = tf.math.top_k(cosines, tf.minimum(k, tf.shape(cosines)[1]))
    return cosines, tf.gather(numbers, places, batch_dims=1)


@tf.function(reduce_retracing=True)
def _rank(cosines, labels, classes, temperature, places):
    weights = tf.exp(tf.cast(cosines, tf.float64) / temperature)  # in float32 exp(1 / 0.01) is infinite
    count = tf.shape(cosines)[0]
    ballots = tf.range(count)[:, None] * classes + tf.cast(labels, tf.int32)  # N x k: places in N x L, flat
    votes = tf.reshape(tf.math.unsorted_segment_sum(weights, ballots, count * classes), (count, classes))
    most, ranked = tf.math.top_k(votes, places)
    return tf.cast(tf.where(most > 0, ranked, -1), tf.int64)
