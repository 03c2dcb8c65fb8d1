"""Weighted k-nearest-neighbour classification of features, the monitor of self-supervised training.

The rule is instance discrimination's (Wu et al. 2018, arXiv:1805.01978, section 3.4) with the CIFAR-10 demo's
k = 200 and t = 0.1. Axes: N queries, B bank, C features, L classes, k neighbours.
"""

import numpy as np
import tensorflow as tf

K, TEMPERATURE = 200, 0.1
CHUNK = 512  # queries at a time: the similarities held are CHUNK x B, never N x B


def predict(bank, bank_labels, queries, classes, k=K, temperature=TEMPERATURE):
    """Labels of queries by a vote of their nearest bank features, each weighing exp(cosine / t).

    Args:
      bank: (B, C) features; queries: (N, C) features. Neither needs unit length.
      bank_labels: (B,) integers in [0, classes).
      k: neighbours that vote; all of the bank if it holds fewer.

    Returns:
      (N,) int64 NumPy array.
    """
    bank = tf.math.l2_normalize(tf.cast(bank, tf.float32), axis=1)
    bank_labels = tf.cast(bank_labels, tf.int32)
    k = min(k, bank.shape[0])
    votes = [
        _vote(bank, bank_labels, tf.cast(queries[i : i + CHUNK], tf.float32), classes, k, temperature)
        for i in range(0, len(queries), CHUNK)
    ]
    return np.concatenate([v.numpy() for v in votes])


def accuracy(bank, bank_labels, queries, labels, classes, k=K, temperature=TEMPERATURE):
    """Top-1 accuracy in percent of `predict` against labels (N,)."""
    return 100.0 * float(np.mean(predict(bank, bank_labels, queries, classes, k, temperature) == labels))


@tf.function(reduce_retracing=True)
def _vote(bank, bank_labels, queries, classes, k, temperature):
    queries = tf.math.l2_normalize(queries, axis=1)
    cosines, nearest = tf.math.top_k(tf.matmul(queries, bank, transpose_b=True), k)  # N x k
    weights = tf.exp(cosines / temperature)
    count = tf.shape(queries)[0]
    ballots = tf.range(count)[:, None] * classes + tf.gather(bank_labels, nearest)  # N x k: places in N x L, flat
    votes = tf.math.unsorted_segment_sum(weights, ballots, count * classes)
    return tf.argmax(tf.reshape(votes, (count, classes)), axis=1)
