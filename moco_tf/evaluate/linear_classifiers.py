"""Linear classifiers of features, many at once. Axes: N images, D features, R classifiers, L classes.

The papers' probe is one such classifier (He et al. 2020, section 4.1). A search for its learning rate trains R
classifiers side by side. All see the same batch, so this costs little more than one classifier.
"""

import numpy as np
import tensorflow as tf

from moco_tf.encoders.batch_norm import BatchNorm

MOMENTUM = 0.9
CHUNK = 4096  # images at a time outside of training


class LinearClassifiers:
    """R classifiers from the same start, each with its own learning rate, trained by SGD: momentum 0.9, no decay.

    The weights start as N(0, 0.01), the biases as 0.

    Args:
      width, classes: D and L.
      rates: (R,) learning rates; the schedule's factor multiplies them.
      batch_norm: normalise the features before the classifiers, without gain and offset.
    """

    def __init__(self, width, classes, rates, seed=0, batch_norm=False):
        one = 0.01 * tf.random.stateless_normal((width, 1, classes), (seed, 0))
        self.rates = tf.constant(rates, tf.float32)[:, None]  # R x 1
        self.kernel = tf.Variable(tf.repeat(one, len(rates), axis=1))  # D x R x L: one matrix product for all
        self.bias = tf.Variable(tf.zeros((len(rates), classes)))
        self.velocities = [tf.Variable(tf.zeros_like(variable)) for variable in (self.kernel, self.bias)]
        self.norm = BatchNorm(affine=False, dtype="float32") if batch_norm else None
        if self.norm:
            self.norm.build((None, width))
        self._step = tf.function(self._step, reduce_retracing=True)

    def step(self, features, labels, factor):
        """Learns from a batch of features (N, D) and labels (N,); returns the losses (R,) before the step."""
        if self.norm and len(features) < 2:  # one image has no variance
            return tf.zeros(len(self.rates))
        return self._step(tf.cast(features, tf.float32), tf.cast(labels, tf.int32), tf.cast(factor, tf.float32))

    def _step(self, features, labels, factor):
        if self.norm:
            features = self.norm(features, training=True)
        variables = (self.kernel, self.bias)
        with tf.GradientTape() as tape:
            logits = tf.tensordot(features, self.kernel, 1) + self.bias  # N x R x L
            labels = tf.repeat(labels[:, None], logits.shape[1], axis=1)
            losses = tf.reduce_mean(tf.nn.sparse_softmax_cross_entropy_with_logits(labels, logits), axis=0)
        # Each classifier has its own loss, so the gradient of the sum of the losses holds the gradients of all.
        for variable, velocity, gradient in zip(
            variables, self.velocities, tape.gradient(losses, variables), strict=True
        ):
            velocity.assign(MOMENTUM * velocity + gradient)
            variable.assign_sub(factor * self.rates * velocity)
        return losses

    def folded(self):
        """Returns kernels (D, R, L) and biases (R, L) that include BatchNorm, for raw features: NumPy, float32."""
        kernel, bias = self.kernel.numpy(), self.bias.numpy()
        if not self.norm:
            return kernel, bias
        scale = 1 / np.sqrt(self.norm.moving_variance.numpy() + self.norm.epsilon)
        kernel = scale[:, None, None] * kernel
        return kernel, bias - np.tensordot(self.norm.moving_mean.numpy(), kernel, 1)


def fit(heads, features, labels, batch_size, factors, seed=0):
    """Trains on features (N, D) in memory, one epoch per entry of `factors`; yields each epoch's mean losses (R,)."""
    labels = np.asarray(labels)
    for epoch, factor in enumerate(factors):
        order = np.random.default_rng((seed, epoch)).permutation(len(labels))
        losses = []
        for first in range(0, len(order), batch_size):
            some = order[first : first + batch_size]
            losses.append(heads.step(features[some], labels[some], factor) * (len(some) / len(order)))
        yield sum(losses).numpy()


def search(features, labels, classes, rates, batch_size, factors, held_out=0.1, seed=0, batch_norm=False):
    """Returns the accuracy in percent of each learning rate (R,), on images that are held out from training.

    Args:
      features, labels: (N, D), (N,), of the training split alone.
      held_out: the share of these images that is held out.
    """
    order = np.random.default_rng(seed).permutation(len(labels))
    judging, learning = np.split(order, [max(1, round(held_out * len(order)))])
    at_once = max(1, 2**26 // (features.shape[1] * classes))  # learning rates whose weights take 256 MB
    accuracies = []
    for first in range(0, len(rates), at_once):
        heads = LinearClassifiers(features.shape[1], classes, rates[first : first + at_once], seed, batch_norm)
        for _ in fit(heads, _Rows(features, learning), labels[learning], batch_size, factors, seed):
            pass
        kernel, bias = heads.folded()
        right = np.zeros(len(bias))
        for start in range(0, len(judging), CHUNK // len(bias) + 1):
            some = judging[start : start + CHUNK // len(bias) + 1]
            logits = np.tensordot(features[some], kernel, 1) + bias  # N x R x L
            right += (logits.argmax(axis=2) == labels[some][:, None]).sum(axis=0)
        accuracies.append(100 * right / len(judging))
    return np.concatenate(accuracies)


def rank(features, kernel, bias, places=5):
    """Ranks classes of features (N, D) by a classifier (D, L), (L,), likeliest first: int64 (N, min(places, L))."""
    parts = []
    for first in range(0, len(features), CHUNK):
        logits = tf.matmul(features[first : first + CHUNK], kernel) + bias
        parts.append(tf.math.top_k(logits, min(places, len(bias))).indices.numpy())
    return np.concatenate(parts).astype(np.int64)


class _Rows:
    """Some rows of an array, without a copy of it."""

    def __init__(self, array, numbers):
        self.array, self.numbers = array, numbers

    def __getitem__(self, places):
        return self.array[self.numbers[places]]
