"""Contrastive losses: pure functions of unit-length embeddings.

Axes: N batch, C features, K keys of the dictionary. `unit_length` brings embeddings to at least float32, whatever the
encoders' precision; the softmax is computed in their precision.
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


def unit_length(vectors):
    """Scales each row of (N, C) to length 1, in at least float32."""
    if vectors.dtype in (tf.float16, tf.bfloat16):
        vectors = tf.cast(vectors, tf.float32)
    return tf.math.l2_normalize(vectors, axis=1)
