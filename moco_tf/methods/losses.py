"""Contrastive losses: pure functions of unit-length embeddings.

Axes: N batch, n its part on this replica, C features, K keys of the dictionary. `unit_length` brings embeddings to at
least float32, whatever the encoders' precision; the softmax is computed in their precision.
"""

from typing import NamedTuple

import tensorflow as tf

from moco_tf.methods.dictionary import look_up

BLOCK = 4096  # keys of the dictionary at a time: the similarities held are N x BLOCK, never N x K


class Contrast(NamedTuple):
    loss: tf.Tensor  # n
    positives: tf.Tensor  # n, cosine of each query with its key
    hardest: tf.Tensor  # n, cosine with the nearest negative
    negatives: tf.Tensor  # n, mean cosine with the negatives


def info_nce(queries, keys, dictionary, temperature):
    """InfoNCE (MoCo, equation 1): tells each query's own key from K others.

        loss_i = -log( exp(q_i . k_i / T) / (exp(q_i . k_i / T) + sum_j exp(q_i . d_j / T)) )

    Args:
      queries, keys: (N, C), of unit length; keys[i] is the positive of queries[i].
      dictionary: (K, C), of unit length: the negatives, the same for each query. No gradient reaches them. Of a
        variable no copy is made.
      temperature: T; 0.07 in MoCo v1, 0.2 in v2.

    With random embeddings the loss is near ln(K + 1).
    """
    positives = tf.einsum("nc,nc->n", queries, keys)
    log_sum, hardest, negatives = _log_sum_exp(queries, dictionary, temperature)
    loss = tf.nn.softplus(log_sum - positives / temperature)
    return Contrast(loss, positives, hardest, negatives)


def _log_sum_exp(queries, dictionary, temperature):
    """log sum_j exp(q_i . d_j / T), and the largest and the mean of q_i . d_j, (N,) each, in one pass over the d_j.

    That pass also sums up the gradient, sum_j softmax_ij d_j / T, so that nothing of size K is kept for it or computed
    twice. Sums are relative to the largest similarity so far, as in online softmax (arXiv:1805.02867).
    """
    size, width = dictionary.shape

    def look_at(first, count, hardest, total, weighted, keys):
        block = look_up(dictionary, first + tf.range(count))
        similarities = tf.matmul(queries, block, transpose_b=True)  # N x BLOCK
        largest = tf.maximum(hardest, tf.reduce_max(similarities, axis=1))
        before = tf.exp((hardest - largest) / temperature)
        weights = tf.exp((similarities - largest[:, None]) / temperature)
        total = total * before + tf.reduce_sum(weights, axis=1)
        weighted = weighted * before[:, None] + tf.matmul(weights, block)
        return largest, total, weighted, keys + tf.reduce_sum(block, axis=0)

    @tf.custom_gradient
    def scan(queries):
        nothing = tf.zeros_like(queries[:, 0])
        found = nothing - 2, nothing, tf.zeros_like(queries), tf.zeros(width, queries.dtype)  # cosines are >= -1
        whole, rest = size // BLOCK, size % BLOCK

        def look_at_block(number, *found):
            return number + 1, *look_at(number * BLOCK, BLOCK, *found)

        if whole:
            _, *found = tf.while_loop(lambda i, *_: i < whole, look_at_block, (0, *found), parallel_iterations=1)
        if rest:
            found = look_at(whole * BLOCK, rest, *found)
        hardest, total, weighted, keys = found

        def gradient(of_log_sum, *_):
            return (of_log_sum / (temperature * total))[:, None] * weighted

        mean = tf.linalg.matvec(queries, keys / size)
        return (hardest / temperature + tf.math.log(total), hardest, mean), gradient

    return scan(queries)


def nce(queries, keys, noise, temperature, log_z, records):
    """Noise-contrastive estimation (Wu et al. 2018, arXiv:1805.01978, section 3.2): tells the own key from noise.

        h(x) = p(x) / (p(x) + K / R),  p(x) = exp(q_i . x / T) / Z
        loss_i = -log h(k_i) - sum_j log(1 - h(d_j))

    A softmax over all R records costs as much as there are records. p stands for it with a constant Z, and K keys
    drawn from all R alike, the noise, for its sum. With more noise the gradient nears that of the softmax.

    Args:
      queries, keys: (N, C), of unit length; keys[i] is the positive of queries[i].
      noise: (K, C), of unit length: keys drawn uniformly, with replacement, from all records.
      temperature: T; 0.07 in the source.
      log_z: log Z, see `log_normalizer`.
      records: R.

    Returns:
      A `Contrast`; its negatives are the noise.
    """
    positives = tf.einsum("nc,nc->n", queries, keys)
    negatives = tf.matmul(queries, noise, transpose_b=True)
    count = tf.cast(tf.shape(noise)[0], positives.dtype)
    shift = log_z + tf.math.log(count / records)
    # With x = log(p R / K), h is the logistic function of x, and -log h = softplus(-x), -log(1 - h) = softplus(x).
    loss = tf.nn.softplus(shift - positives / temperature)
    loss += tf.reduce_sum(tf.nn.softplus(negatives / temperature - shift), axis=1)
    return Contrast(loss, positives, tf.reduce_max(negatives, axis=1), tf.reduce_mean(negatives, axis=1))


def log_normalizer(queries, noise, temperature, records):
    """log Z of `nce`, estimated as in its source: Z ~ R / (N K) sum_ij exp(q_i . d_j / T)."""
    logits = tf.matmul(queries, noise, transpose_b=True) / temperature
    count = tf.cast(tf.size(logits), logits.dtype)
    return tf.reduce_logsumexp(logits) - tf.math.log(count) + tf.math.log(tf.cast(records, logits.dtype))


def in_batch(queries, keys, labels, temperature):
    """The contrastive loss of MoCo v3 (algorithm 1, `ctr`): the negatives are the other images' keys of the batch.

        loss_i = -2T log( exp(q_i . k_label(i) / T) / sum_j exp(q_i . k_j / T) )

    Args:
      queries: (n, C), of unit length.
      keys: (N, C), of unit length: those of the global batch, N > 1.
      labels: (n,) integers: the row of `keys` that belongs to each query.
      temperature: T; 1 for ResNet-50, 0.2 for ViTs. The factor 2T keeps gradients of one size for any T.
    """
    contrast = batch_info_nce(queries, keys, labels, temperature)
    return contrast._replace(loss=2 * temperature * contrast.loss)


def batch_info_nce(queries, keys, labels, temperature, itself=None):
    """InfoNCE with the negatives of the batch (MoCo, section 3.2, "end-to-end"); NT-Xent (SimCLR) with `itself`.

        loss_i = -log( exp(q_i . k_label(i) / T) / sum_j exp(q_i . k_j / T) ),  j != itself(i)

    Args:
      queries, keys, labels, temperature: as for `in_batch`.
      itself: (n,) integers: the row of `keys` that is the query, and so no candidate. SimCLR (arXiv:2002.05709,
        equation 1) has the 2N views of N images look for their partners among one another.
    """

    def rows(places):
        return tf.one_hot(places, tf.shape(keys)[0], on_value=True, off_value=False, dtype=tf.bool)  # n x N

    similarities = tf.matmul(queries, keys, transpose_b=True)  # n x N
    excluded = rows(labels)
    logits = similarities / temperature
    if itself is not None:
        logits = tf.where(rows(itself), logits.dtype.min, logits)
        excluded |= rows(itself)
    loss = tf.nn.sparse_softmax_cross_entropy_with_logits(labels, logits)
    positives = tf.gather(similarities, labels, batch_dims=1)
    hardest = tf.reduce_max(tf.where(excluded, -tf.ones_like(similarities), similarities), axis=1)  # cosines are >= -1
    others = tf.where(excluded, tf.zeros_like(similarities), similarities)
    count = tf.reduce_sum(tf.cast(~excluded, similarities.dtype), axis=1)
    return Contrast(loss, positives, hardest, tf.math.divide_no_nan(tf.reduce_sum(others, axis=1), count))


def unit_length(vectors):
    """Scales each row of (N, C) to length 1, in at least float32."""
    if vectors.dtype in (tf.float16, tf.bfloat16):
        vectors = tf.cast(vectors, tf.float32)
    return tf.math.l2_normalize(vectors, axis=1)
