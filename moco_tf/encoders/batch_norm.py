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
        if len(input_shape) not in (2, 4):
            raise ValueError(f"BatchNorm takes (N, C) or (N, H, W, C), not {tuple(input_shape)}")

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
        x = inputs if inputs.shape.rank == 4 else inputs[:, None, None, :]  # N x H x W x C
        gamma, beta = self._gain_and_offset()
        fused = x.dtype != tf.float64  # TensorFlow's kernel takes no float64
        if not training:
            infer = _infer_fused if fused else _infer
            outputs = infer(x, gamma, beta, self.epsilon, self.moving_mean.value, self.moving_variance.value)
        else:
            if self.synchronized and replicas.count() > 1:
                outputs, mean, variance = _normalize_together(x, gamma, beta, self.epsilon, self.moving_mean.value)
            else:
                normalize = _normalize_fused if fused else _normalize
                outputs, mean, variance = normalize(x, gamma, beta, self.epsilon, self.groups)
            for running, batch in ((self.moving_mean, mean), (self.moving_variance, variance)):
                running.assign(running.value * self.momentum + batch * (1.0 - self.momentum))
        return outputs if x is inputs else tf.reshape(outputs, tf.shape(inputs))

    def compute_output_shape(self, input_shape):  # else Keras traces `call` to find it, at each symbolic call
        return input_shape

    def _gain_and_offset(self):
        if self.affine:
            return tf.convert_to_tensor(self.gamma.value), tf.convert_to_tensor(self.beta.value)
        return tf.ones_like(self.moving_mean.value), tf.zeros_like(self.moving_mean.value)

    def get_config(self):
        return super().get_config() | {
            "momentum": self.momentum,
            "epsilon": self.epsilon,
            "groups": self.groups,
            "synchronized": self.synchronized,
            "affine": self.affine,
            "gamma_initializer": self.gamma_initializer,
        }


def _infer(x, gamma, beta, epsilon, mean, variance):
    return (x - mean) * tf.math.rsqrt(variance + epsilon) * gamma + beta


def _infer_fused(x, gamma, beta, epsilon, mean, variance):
    return tf.raw_ops.FusedBatchNormV3(
        x=x, scale=gamma, offset=beta, mean=mean, variance=variance, epsilon=epsilon, is_training=False
    ).y


def _normalize(x, gamma, beta, epsilon, groups):
    """Normalises each of `groups` equal parts of x by its own mean and variance.

    Returns:
      The outputs, and the means over the parts of their mean and of their unbiased variance.
    """
    outputs, means, variances = [], [], []
    for part in tf.split(x, groups):
        mean, variance = tf.nn.moments(part, (0, 1, 2))
        count = tf.cast(tf.size(part) / part.shape[-1], part.dtype)
        outputs.append(_infer(part, gamma, beta, epsilon, mean, variance))
        means.append(mean)
        variances.append(variance * count / (count - 1.0))
    return tf.concat(outputs, axis=0), tf.add_n(means) / groups, tf.add_n(variances) / groups


def _normalize_fused(x, gamma, beta, epsilon, groups):
    """As `_normalize`, by TensorFlow's kernel; mean and variance have no gradient."""
    nothing = tf.zeros(0)
    settings = {"scale": gamma, "epsilon": epsilon, "is_training": True}

    def kernel(part):
        return tf.raw_ops.FusedBatchNormV3(x=part, offset=beta, mean=nothing, variance=nothing, **settings)

    if groups == 1:  # only here does TensorFlow fuse the kernel with the ReLU behind it
        found = kernel(x)
        return found.y, found.batch_mean, found.batch_variance

    # TensorFlow's own gradient adds some ten operations a group. They take no time in a step, but in its tracing.
    @tf.custom_gradient
    def normalize(x, *gain_and_offset):  # arguments, so that they get their gradients
        parts = tf.split(x, groups)
        found = [kernel(part) for part in parts]

        def gradient(of_outputs, *_):
            gradients = [
                tf.raw_ops.FusedBatchNormGradV3(
                    y_backprop=of_output,
                    x=part,
                    reserve_space_1=each.reserve_space_1,
                    reserve_space_2=each.reserve_space_2,
                    reserve_space_3=each.reserve_space_3,
                    **settings,
                )
                for of_output, part, each in zip(tf.split(of_outputs, groups), parts, found, strict=True)
            ]
            of_parts, of_gamma, of_beta, *_ = zip(*gradients, strict=True)
            return tf.concat(of_parts, axis=0), tf.add_n(of_gamma), tf.add_n(of_beta)

        outputs, means, variances, *_ = zip(*found, strict=True)
        return (tf.concat(outputs, axis=0), tf.add_n(means) / groups, tf.add_n(variances) / groups), gradient

    return normalize(x, gamma, beta)


def _normalize_together(inputs, gamma, beta, epsilon, shift):
    """By the statistics of all replicas' inputs: one all-reduce forward and, as its gradient, one backward.

    shift: (C,), the same on all replicas. Moments about it, and not about 0, lose no digits where a channel's mean is
    large beside its spread.
    """
    x = tf.cast(inputs, gamma.dtype)
    mean, variance = tf.nn.moments(x, (0, 1, 2))
    count = tf.cast(tf.reduce_prod(tf.shape(x)[:-1]), x.dtype)
    offset = mean - shift
    total, first, second = replicas.add_up([count, count * offset, count * (variance + offset**2)])
    offset = first / total
    mean, variance = shift + offset, tf.maximum(second / total - offset**2, 0.0)
    outputs = (x - mean) * tf.math.rsqrt(variance + epsilon) * gamma + beta
    return tf.cast(outputs, inputs.dtype), mean, variance * total / (total - 1.0)
