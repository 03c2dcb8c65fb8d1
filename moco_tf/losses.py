"""Contrastive losses: pure functions of unit-length embeddings.

Axes: N batch, n its part on this replica, C features, K keys of the dictionary. `unit_length` brings embeddings to at
least float32, whatever the encoders' precision; the softmax is computed in their precision.
"""

from typing import NamedTuple

import tensorflow as tf


class InfoNCE(NamedTuple):
    loss: tf.Tensor  # N
    positives: tf.Tensor  # N, cosine of each query with its key
    negatives: tf.Tensor  # N x K, cosines of each query with the dictionary


def info_nce(queries, keys, dictionary, temperature):
    """InfoNCE (MoCo, equation 1): tells each query's own key from K others.

        loss_i = -log( exp(q_i . k_i / T) / (exp(q_i . k_i / T) + sum_j exp(q_i . d_j / T)) )

    Args:
      queries, keys: (N, C), of unit length; keys[i] is the positive of queries[i].
      dictionary: (K, C), of unit length: the negatives, the same for each query.
      temperature: T; 0.07 in MoCo v1, 0.2 in v2.

    With random embeddings the loss is near ln(K + 1).
    """
    positives = tf.einsum("nc,nc->n", queries, keys)
    negatives = tf.matmul(queries, dictionary, transpose_b=True)
    logits = tf.concat([positives[:, None], negatives], axis=1) / temperature  # N x (1 + K)
    first = tf.zeros_like(positives, tf.int32)  # the positive is class 0
    loss = tf.nn.sparse_softmax_cross_entropy_with_logits(labels=first, logits=logits)
    return InfoNCE(loss, positives, negatives)


class InBatch(NamedTuple):
    loss: tf.Tensor  # n
    positives: tf.Tensor  # n, cosine of each query with its key
    hardest: tf.Tensor  # n, cosine with the nearest other key
    negatives: tf.Tensor  # n, mean cosine with the other keys


def in_batch(queries, keys, labels, temperature):
    """The contrastive loss of MoCo v3 (algorithm 1, `ctr`): the negatives are the other images' keys of the batch.

        loss_i = -2T log( exp(q_i . k_label(i) / T) / sum_j exp(q_i . k_j / T) )

    Args:
      queries: (n, C), of unit length.
      keys: (N, C), of unit length: those of the global batch, N > 1.
      labels: (n,) integers: the row of `keys` that belongs to each query.
      temperature: T; 1 for ResNet-50, 0.2 for ViTs. The factor 2T keeps gradients of one size for any T.
    """
    similarities = tf.matmul(queries, keys, transpose_b=True)  # n x N
    loss = 2 * temperature * tf.nn.sparse_softmax_cross_entropy_with_logits(labels, similarities / temperature)
    positives = tf.gather(similarities, labels, batch_dims=1)
    own = tf.one_hot(labels, tf.shape(keys)[0], on_value=True, off_value=False, dtype=tf.bool)
    hardest = tf.reduce_max(
        tf.where(own, -tf.ones_like(similarities), similarities), axis=1
    )  # no cosine is less than -1
    others = tf.cast(tf.shape(keys)[0] - 1, similarities.dtype)
    return InBatch(loss, positives, hardest, (tf.reduce_sum(similarities, axis=1) - positives) / others)


def unit_length(vectors):
    """Scales each row of (N, C) to length 1, in at least float32."""
    if vectors.dtype in (tf.float16, tf.bfloat16):
        vectors = tf.cast(vectors, tf.float32)
    return tf.math.l2_normalize(vectors, axis=1)
