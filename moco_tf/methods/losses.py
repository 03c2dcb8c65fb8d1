"""Contrastive losses: pure functions of unit-length embeddings.

Axes: N batch, n its part on this replica, C features, P keys of a query, K keys of the dictionary. `unit_length`
brings embeddings to at least float32, whatever the encoders' precision. The softmax is computed in the embeddings'
precision.
"""

import math
from typing import NamedTuple

import tensorflow as tf

from moco_tf.methods.dictionary import look_up

BLOCK = 4096  # keys of the dictionary at a time: the similarities held are N x BLOCK, never N x K


class Contrast(NamedTuple):
    """The terms of a contrastive loss, one value per query."""

    loss: tf.Tensor  # n
    positives: tf.Tensor  # n, cosine of each query with its key; with several keys their mean
    hardest: tf.Tensor  # n, cosine with the nearest negative
    negatives: tf.Tensor  # n, mean cosine with the negatives
    top1: tf.Tensor  # n, share of its keys that are nearer than all negatives
    queries: tf.Tensor  # n x C

    @classmethod
    def of(cls, queries, loss, positives, hardest, negatives):
        """positives: (n,), or (n, P) where a query has several keys."""
        if positives.shape.rank == 1:
            return cls(loss, positives, hardest, negatives, tf.cast(positives > hardest, loss.dtype), queries)
        top1 = tf.reduce_mean(tf.cast(positives > hardest[:, None], loss.dtype), axis=1)
        return cls(loss, tf.reduce_mean(positives, axis=1), hardest, negatives, top1, queries)


def together(contrasts, times):
    """Joins the `Contrast`s of several queries of the same images; its mean loss is their mean loss times `times`."""
    if len(contrasts) == 1:
        return contrasts[0]
    rows = Contrast(*(tf.concat(values, axis=0) for values in zip(*contrasts, strict=True)))
    return rows._replace(loss=times * rows.loss)


def info_nce(queries, keys, dictionary, temperature, own=None):
    """InfoNCE (MoCo, equation 1): tells each query's own key from K others.

        loss_i = -log( exp(q_i . k_i / T) / (exp(q_i . k_i / T) + sum_j exp(q_i . d_j / T)) )

    The loss of a query with P keys is the mean over the keys. The denominator of a key has this key and the
    dictionary, but not the other keys. The codes of rho-MoCo (arXiv:2104.14558) and VINCE (arXiv:2003.07990) do the
    same.

    Args:
      queries: (N, C), of unit length.
      keys: (N, C) or (N, P, C), of unit length; keys[i] is the positive of queries[i], or has its positives.
      dictionary: (K, C), of unit length: the negatives, the same for each query. No gradient reaches them. A variable
        is not copied.
      temperature: T; 0.07 in MoCo v1, 0.2 in v2.
      own: ((N,), (K,)) integers: the thing that each query and each row of the dictionary belongs to. Rows of the
        query's own thing are not negatives; -1 equals nothing.

    With random embeddings the loss is near ln(K + 1).
    """
    if keys.shape.rank == 2:
        positives = tf.einsum("nc,nc->n", queries, keys)
        log_sum, hardest, negatives, _ = _log_sum_exp(queries, dictionary, temperature, own)
        loss = tf.nn.softplus(log_sum - positives / temperature)
    else:
        cosines = [tf.einsum("nc,nc->n", queries, key) for key in tf.unstack(keys, axis=1)]
        positives = tf.stack(cosines, axis=1)  # N x P
        log_sum, hardest, negatives, _ = _log_sum_exp(queries, dictionary, temperature, own)
        loss = tf.reduce_mean(tf.nn.softplus(log_sum[:, None] - positives / temperature), axis=1)
    return Contrast.of(queries, loss, positives, hardest, negatives)


def of_groups(form, queries, keys, others, same, different, dictionary, temperature, own, from_dictionary):
    """A contrast whose positives are all P_i keys of the query's own thing, and whose negatives are all other keys.

    With s_p = q_i . p / T over the positives p, and S_i the sum of exp(q_i . d / T) over the negatives d, the loss of
    a query is

        infonce     mean_p -log( exp(s_p) / (exp(s_p) + S_i) ): each positive beside the negatives alone
        supcon      mean_p -log( exp(s_p) / (sum_p' exp(s_p') + S_i) ): L_out of SupCon (arXiv:2004.11362), equation 2
        supcon_in   -log( sum_p exp(s_p) / (sum_p exp(s_p) + S_i) ): its L_in, equation 3, without the constant 1 / P_i

    With one positive, each form equals InfoNCE, bit for bit.

    Args:
      form: "infonce", "supcon" or "supcon_in".
      queries: (n, C), of unit length.
      keys: (n, P, C), of unit length: each query's own keys, always positives.
      others: (M, C), of unit length: more keys, of the batch.
      same, different: bool (n, M): which of `others` are a query's positives, and which are its negatives. The rest is
        left out.
      dictionary: (K, C), of unit length: rows of another thing are negatives.
      temperature: T.
      own: ((n,), (K,)) integers: the thing that each query and each row of the dictionary belongs to; -1 equals
        nothing.
      from_dictionary: whether the dictionary's rows of the query's own thing are positives, which takes n x K numbers.
        If not, these rows are left out.
    """
    own_cosines = tf.stack([tf.einsum("nc,nc->n", queries, key) for key in tf.unstack(keys, axis=1)], axis=1)  # n x P
    cosines = tf.matmul(queries, others, transpose_b=True)  # n x M
    log_sum, hardest, mean, rows = _log_sum_exp(queries, dictionary, temperature, own)
    negatives = tf.concat([log_sum[:, None], cosines / temperature], axis=1)
    log_sum = _masked_log_sum_exp(negatives, tf.pad(different, ((0, 0), (1, 0)), constant_values=True))
    nothing = tf.constant(-math.inf, cosines.dtype)
    hardest = tf.maximum(hardest, tf.reduce_max(tf.where(different, cosines, nothing), axis=1))
    number = tf.reduce_sum(tf.cast(different, cosines.dtype), axis=1)
    total = mean * rows + tf.reduce_sum(tf.where(different, cosines, tf.zeros_like(cosines)), axis=1)

    parts, masks = [own_cosines, cosines], [tf.ones_like(own_cosines, tf.bool), same]
    if from_dictionary:
        places = tf.range(dictionary.shape[0])
        parts.append(tf.matmul(queries, look_up(dictionary, places), transpose_b=True))  # n x K
        masks.append(~_differs(own[0], look_up(own[1], places)))
    positives, masks = tf.concat(parts, axis=1), tf.concat(masks, axis=1)
    count = tf.reduce_sum(tf.cast(masks, cosines.dtype), axis=1)

    def mean_over_positives(values):
        return tf.reduce_sum(tf.where(masks, values, tf.zeros_like(values)), axis=1) / count

    if form == "infonce":
        loss = mean_over_positives(tf.nn.softplus(log_sum[:, None] - positives / temperature))
    else:
        of_positives = _masked_log_sum_exp(positives / temperature, masks)
        loss = tf.nn.softplus(log_sum - of_positives)
        if form == "supcon":
            loss += of_positives - mean_over_positives(positives / temperature)
    top1 = mean_over_positives(tf.cast(positives > hardest[:, None], loss.dtype))
    negatives = tf.math.divide_no_nan(total, rows + number)
    return Contrast(loss, mean_over_positives(positives), hardest, negatives, top1, queries)


def _differs(things, others):
    """Returns which of `others` (K,) are not of the same thing as each of `things` (n,): bool (n, K)."""
    others = others if isinstance(others, tf.Tensor) else look_up(others, tf.range(others.shape[0]))
    return (things[:, None] != others[None, :]) | (things[:, None] < 0)


def _masked_log_sum_exp(values, mask):
    """Returns log sum exp over axis 1 of the values (n, M) in the mask; -inf, without a gradient, if there are none.

    For a single value the result is this value, bit for bit.
    """
    values = tf.where(mask, values, tf.constant(-math.inf, values.dtype))
    largest = tf.stop_gradient(tf.reduce_max(values, axis=1, keepdims=True))
    largest = tf.where(tf.math.is_finite(largest), largest, tf.zeros_like(largest))
    total = tf.reduce_sum(tf.exp(values - largest), axis=1)
    empty = total == 0
    found = tf.math.log(tf.where(empty, tf.ones_like(total), total)) + largest[:, 0]
    return tf.where(empty, tf.constant(-math.inf, values.dtype), found)


def _log_sum_exp(queries, dictionary, temperature, own=None):
    """log sum_j exp(q_i . d_j / T), largest and mean of q_i . d_j, and the number of d_j, (N,) each, in one pass.

    The pass also sums up the gradient, sum_j softmax_ij d_j / T. So the gradient keeps nothing of size K, and computes
    nothing twice. Sums are relative to the largest similarity so far, as in online softmax (arXiv:1805.02867).

    own: as for `info_nce`: it says which d_j are left out for which q_i. Without it the number is not counted, but 0.
    """
    size, width = dictionary.shape

    def look_at(first, count, hardest, total, weighted, cosines, number):
        places = first + tf.range(count)
        block = look_up(dictionary, places)
        similarities = tf.matmul(queries, block, transpose_b=True)  # N x BLOCK
        if own is None:
            taken = similarities
            cosines += tf.reduce_sum(block, axis=0)
        else:
            of_query, of_block = own[0][:, None], look_up(own[1], places)[None, :]
            same = (of_query == of_block) & (of_query >= 0)
            taken = tf.where(same, tf.constant(-math.inf, similarities.dtype), similarities)
            cosines += tf.reduce_sum(tf.where(same, tf.zeros_like(similarities), similarities), axis=1)
            number += tf.reduce_sum(tf.cast(~same, similarities.dtype), axis=1)
        largest = tf.maximum(hardest, tf.reduce_max(taken, axis=1))
        before = tf.exp((hardest - largest) / temperature)
        weights = tf.exp((taken - largest[:, None]) / temperature)
        total = total * before + tf.reduce_sum(weights, axis=1)
        weighted = weighted * before[:, None] + tf.matmul(weights, block)
        return largest, total, weighted, cosines, number

    @tf.custom_gradient
    def scan(queries):
        nothing = tf.zeros_like(queries[:, 0])
        cosines = tf.zeros(width, queries.dtype) if own is None else nothing  # without `own`: the sum of the d_j
        state = nothing - 2, nothing, tf.zeros_like(queries), cosines, nothing  # cosines are >= -1
        whole, rest = size // BLOCK, size % BLOCK

        def look_at_block(number, *state):
            return number + 1, *look_at(number * BLOCK, BLOCK, *state)

        if whole:
            _, *state = tf.while_loop(lambda i, *_: i < whole, look_at_block, (0, *state), parallel_iterations=1)
        if rest:
            state = look_at(whole * BLOCK, rest, *state)
        hardest, total, weighted, cosines, number = state

        def gradient(of_log_sum, *_):
            if own is None:
                return (of_log_sum / (temperature * total))[:, None] * weighted
            return tf.math.divide_no_nan(of_log_sum, temperature * total)[:, None] * weighted  # perhaps no d_j is left

        mean = tf.linalg.matvec(queries, cosines / size) if own is None else tf.math.divide_no_nan(cosines, number)
        return (hardest / temperature + tf.math.log(total), hardest, mean, number), gradient

    return scan(queries)


def nce(queries, keys, noise, temperature, log_z, records):
    """Noise-contrastive estimation (Wu et al. 2018, arXiv:1805.01978, section 3.2): tells the own key from noise.

        h(x) = p(x) / (p(x) + K / R),  p(x) = exp(q_i . x / T) / Z
        loss_i = -log h(k_i) - sum_j log(1 - h(d_j))

    The cost of a softmax over all R records grows with R. Here p has a constant Z in place of the softmax's sum, and
    the loss has K keys, the noise, drawn uniformly from all R. With more noise, the gradient approaches that of the
    softmax.

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
    hardest, negatives = tf.reduce_max(negatives, axis=1), tf.reduce_mean(negatives, axis=1)
    return Contrast.of(queries, loss, positives, hardest, negatives)


def log_normalizer(queries, noise, temperature, records):
    """log Z of `nce`, estimated as in its source: Z ~ R / (N K) sum_ij exp(q_i . d_j / T)."""
    logits = tf.matmul(queries, noise, transpose_b=True) / temperature
    count = tf.cast(tf.size(logits), logits.dtype)
    return tf.reduce_logsumexp(logits) - tf.math.log(count) + tf.math.log(tf.cast(records, logits.dtype))


def in_batch(queries, keys, labels, temperature):
    """The contrastive loss of MoCo v3 (algorithm 1, `ctr`): the negatives are the keys of the batch's other images.

        loss_i = -2T log( exp(q_i . k_label(i) / T) / sum_j exp(q_i . k_j / T) )

    Args:
      queries: (n, C), of unit length.
      keys: (N, C), of unit length: the keys of the global batch, N > 1.
      labels: (n,) integers: the row of `keys` that belongs to each query.
      temperature: T; 1 for ResNet-50, 0.2 for ViTs. The factor 2T keeps the gradients' size the same for any T.
    """
    contrast = batch_info_nce(queries, keys, labels, temperature)
    return contrast._replace(loss=2 * temperature * contrast.loss)


def batch_info_nce(queries, keys, labels, temperature, itself=None):
    """InfoNCE with the negatives of the batch (MoCo, section 3.2, "end-to-end"); NT-Xent (SimCLR) with `itself`.

        loss_i = -log( exp(q_i . k_label(i) / T) / sum_j exp(q_i . k_j / T) ),  j != itself(i)

    Args:
      queries, keys, labels, temperature: as for `in_batch`.
      itself: (n,) integers: the row of `keys` that is the query, and so not a candidate. In SimCLR (arXiv:2002.05709,
        equation 1) the 2N views of N images look for their partners among each other.
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
    negatives = tf.math.divide_no_nan(tf.reduce_sum(others, axis=1), count)
    return Contrast.of(queries, loss, positives, hardest, negatives)


def unit_length(vectors):
    """Scales each row of (N, C) to length 1, in at least float32."""
    return tf.math.l2_normalize(full(vectors), axis=1)


def full(values):
    """Casts values to at least float32."""
    return tf.cast(values, tf.float32) if values.dtype in (tf.float16, tf.bfloat16) else values
