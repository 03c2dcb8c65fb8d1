"""Batch normalisation as PyTorch defines it, over equal parts ("groups") of the batch.

Called by every encoder of this package. Axes: N batch, H W space, C channels.
"""

import keras
import tensorflow as tf


@keras.saving.register_keras_serializable("moco_tf")
class BatchNorm(keras.layers.Layer):
    """Normalises (N, C) or (N, H, W, C) by the statistics of each of `groups` equal parts of the batch.

    `groups` lets one device stand in for several: with G groups the first N/G images are normalised
    together, then the next N/G, as G replicas would do. Shuffling BN (MoCo, section 3.3) has no effect
    without it.

    Differs from `keras.layers.BatchNormalization` in what PyTorch does otherwise: epsilon 1e-5, running
    statistics that move by 1 - `momentum` = 0.1 a step and hold the *unbiased* variance. They are the mean
    over the groups. Statistics and parameters are float32 in mixed precision (float64 under a float64
    policy).
    """

    def __init__(self, momentum=0.9, epsilon=1e-5, groups=1, **kwargs):
        super().__init__(**kwargs)
        self.momentum = momentum
        self.epsilon = epsilon
        self.groups = groups

    def build(self, input_shape):
        def weight(name, initializer, trainable):
            return self.add_weight(
                name=name, shape=input_shape[-1:], initializer=initializer, trainable=trainable, autocast=False
            )

        self.gamma = weight("gamma", "ones", trainable=True)
        self.beta = weight("beta", "zeros", trainable=True)
        self.moving_mean = weight("moving_mean", "zeros", trainable=False)
        self.moving_variance = weight("moving_variance", "ones", trainable=False)

    def call(self, inputs, training=False):
        normalize = _normalize_plain if inputs.dtype == tf.float64 else _normalize_fused
        if not training:
            statistics = self.moving_mean.value, self.moving_variance.value
            return normalize(inputs, self.gamma.value, self.beta.value, self.epsilon, statistics)[0]
        outputs, means, variances = zip(
            *(
                normalize(part, self.gamma.value, self.beta.value, self.epsilon)
                for part in (tf.split(inputs, self.groups) if self.groups > 1 else [inputs])
            ),
            strict=True,
        )
        self._move(self.moving_mean, tf.add_n(means) / self.groups)
        self._move(self.moving_variance, tf.add_n(variances) / self.groups)
        return tf.concat(outputs, axis=0) if self.groups > 1 else outputs[0]

    def _move(self, running, batch):
        running.assign(running.value * self.momentum + batch * (1.0 - self.momentum))

    def get_config(self):
        config = {"momentum": self.momentum, "epsilon": self.epsilon, "groups": self.groups}
        return super().get_config() | config


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
