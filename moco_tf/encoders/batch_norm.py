"""Batch normalisation as PyTorch defines it: over equal parts ("groups") of the batch, or over all replicas.

Called by every encoder of this package. Axes: N batch, H W space, C channels.
"""

import keras
import tensorflow as tf

from moco_tf import replicas


@keras.saving.register_keras_serializable("moco_tf")
class BatchNorm(keras.layers.Layer):
    """Normalises (N, C) or (N, H, W, C) by the statistics of each of `groups` equal parts of the batch.

    `groups` lets one device stand in for several: with G groups the first N/G images are normalised
    together, then the next N/G, as G replicas would do. Shuffling BN (MoCo, section 3.3) has no effect
    without it. `synchronized` does the reverse: all replicas of a `tf.distribute` strategy are normalised
    together, as one device with the whole batch would do it (MoCo v3).

    `affine=False` leaves the gain gamma and the offset beta out.

    Differs from `keras.layers.BatchNormalization` in what PyTorch does otherwise: epsilon 1e-5, running
    statistics that move by 1 - `momentum` = 0.1 a step and hold the *unbiased* variance. They are the mean
    over the groups. Statistics and parameters are float32 in mixed precision (float64 under a float64
    policy).
    """

    def __init__(
        self,
        momentum=0.9,
        epsilon=1e-5,
        groups=1,
        synchronized=False,
        affine=True,
        gamma_initializer="ones",
        **kwargs,
    ):
        super().__init__(**kwargs)
        self.momentum = momentum
        self.epsilon = epsilon
        self.groups = groups
        self.synchronized = synchronized
        self.affine = affine
        self.gamma_initializer = gamma_initializer

    def build(self, input_shape):
        def weight(name, initializer, trainable):
            return self.add_weight(
                name=name, shape=input_shape[-1:], initializer=initializer, trainable=trainable, autocast=False
            )

        if self.affine:
            self.gamma = weight("gamma", self.gamma_initializer, trainable=True)
            self.beta = weight("beta", "zeros", trainable=True)
        self.moving_mean = weight("moving_mean", "zeros", trainable=False)
        self.moving_variance = weight("moving_variance", "ones", trainable=False)

    def call(self, inputs, training=False):
        normalize = _normalize_plain if inputs.dtype == tf.float64 else _normalize_fused
        gamma, beta = self._gain_and_offset()
        if not training:
            statistics = self.moving_mean.value, self.moving_variance.value
            return normalize(inputs, gamma, beta, self.epsilon, statistics)[0]
        if self.synchronized and replicas.count() > 1:
            outputs, mean, variance = _normalize_together(inputs, gamma, beta, self.epsilon, self.moving_mean.value)
            self._move(self.moving_mean, mean)
            self._move(self.moving_variance, variance)
            return outputs
        outputs, means, variances = zip(
            *(
                normalize(part, gamma, beta, self.epsilon)
                for part in (tf.split(inputs, self.groups) if self.groups > 1 else [inputs])
            ),
            strict=True,
        )
        self._move(self.moving_mean, tf.add_n(means) / self.groups)
        self._move(self.moving_variance, tf.add_n(variances) / self.groups)
        return tf.concat(outputs, axis=0) if self.groups > 1 else outputs[0]

    def _gain_and_offset(self):
        if self.affine:
            return self.gamma.value, self.beta.value
        return tf.ones_like(self.moving_mean.value), tf.zeros_like(self.moving_mean.value)

    def _move(self, running, batch):
        running.assign(running.value * self.momentum + batch * (1.0 - self.momentum))

    def get_config(self):
        return super().get_config() | {
            "momentum": self.momentum,
            "epsilon": self.epsilon,
            "groups": self.groups,
            "synchronized": self.synchronized,
            "affine": self.affine,
            "gamma_initializer": self.gamma_initializer,
        }


def _normalize_fused(inputs, gamma, beta, epsilon, statistics=None):
    """One kernel, which also gives the mean and the unbiased variance; it takes no float64 and only 4-D."""
    x = inputs if inputs.shape.rank == 4 else inputs[:, None, None, :]
    outputs, mean, variance, *_ = tf.raw_ops.FusedBatchNormV3(
        x=x,
        scale=gamma,
        offset=beta,
        mean=statistics[0] if statistics else [],
        variance=statistics[1] if statistics else [],
        epsilon=epsilon,
        is_training=statistics is None,
    )
    return tf.reshape(outputs, tf.shape(inputs)) if x is not inputs else outputs, mean, variance


def _normalize_plain(inputs, gamma, beta, epsilon, statistics=None):
    axes = list(range(inputs.shape.rank - 1))
    mean, variance = statistics or tf.nn.moments(inputs, axes)
    outputs = (inputs - mean) * tf.math.rsqrt(variance + epsilon) * gamma + beta
    count = tf.cast(tf.reduce_prod(tf.shape(inputs)[:-1]), inputs.dtype)
    return outputs, mean, variance * count / (count - 1.0)


def _normalize_together(inputs, gamma, beta, epsilon, shift):
    """By the statistics of all replicas' inputs: one all-reduce forward and, as its gradient, one backward.

    shift: (C,), the same on all replicas. Moments about it, and not about 0, lose no digits where a channel's mean is
    large beside its spread.
    """
    x = tf.cast(inputs, gamma.dtype)
    mean, variance = tf.nn.moments(x, list(range(x.shape.rank - 1)))
    count = tf.cast(tf.reduce_prod(tf.shape(x)[:-1]), x.dtype)
    offset = mean - shift
    total, first, second = replicas.add_up([count, count * offset, count * (variance + offset**2)])
    offset = first / total
    mean, variance = shift + offset, tf.maximum(second / total - offset**2, 0.0)
    outputs = (x - mean) * tf.math.rsqrt(variance + epsilon) * gamma + beta
    return tf.cast(outputs, inputs.dtype), mean, variance * total / (total - 1.0)
