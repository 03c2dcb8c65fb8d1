"""Batch normalisation as PyTorch defines it: over equal parts ("groups") of the batch, or over all replicas.

The ResNets and the heads use it. Axes: N batch, H W space, C channels.
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

    `affine=False` leaves out the gain gamma and the offset beta. With `trainable = False` the layer infers, even in
    training, as Keras' own layer does. So a frozen encoder does not change.

    Differs from `keras.layers.BatchNormalization` where PyTorch does. Epsilon is 1e-5. The running statistics
    move by 1 - `momentum` = 0.1 a step, hold the *unbiased* variance, and are the mean over the groups.
    Statistics and parameters are float32 in mixed precision (float64 under a float64 policy).

    Without `synchronized`, each replica moves its own running statistics. At the end of a training step the statistics
    become the mean over the replicas (`methods/pretrainer.py`, `train_step`).
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
        if not training or not self.trainable:
            infer = _infer_fused if fused else _infer
            outputs = infer(x, gamma, beta, self.epsilon, self.moving_mean.value, self.moving_variance.value)
        else:
            together = self.synchronized and replicas.count() > 1
            each = _normalize_at_once if self.groups > 1 and on_gpu() else _normalize_fused if fused else _normalize
            normalize = _normalize_together if together else each
            # Tensors, because each group would read the variables anew.
            running = [tf.convert_to_tensor(variable.value) for variable in (self.moving_mean, self.moving_variance)]
            outputs, mean, variance = normalize(
                x, gamma, beta, self.epsilon, self.groups, running, 1.0 - self.momentum
            )
            self.moving_mean.assign(mean)
            self.moving_variance.assign(variance)
        return outputs if x is inputs else tf.reshape(outputs, tf.shape(inputs))

    def compute_output_shape(self, input_shape):  # otherwise Keras traces `call` at each symbolic call
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


def on_gpu():
    """Whether a step runs on a GPU here."""
    return bool(tf.config.list_logical_devices("GPU"))


def _infer(x, gamma, beta, epsilon, mean, variance):
    return (x - mean) * tf.math.rsqrt(variance + epsilon) * gamma + beta


def _infer_fused(x, gamma, beta, epsilon, mean, variance):
    return tf.raw_ops.FusedBatchNormV3(
        x=x, scale=gamma, offset=beta, mean=mean, variance=variance, epsilon=epsilon, is_training=False
    ).y


def _normalize(x, gamma, beta, epsilon, groups, running, rate):
    """Normalises each of `groups` equal parts of x by its own mean and variance.

    Returns:
      The outputs, and the `running` mean and variance moved by `rate` towards the parts' mean and unbiased variance.
    """
    outputs, means, variances = [], [], []
    for part in tf.split(x, groups):
        mean, variance = tf.nn.moments(part, (0, 1, 2))
        count = tf.cast(tf.size(part) / part.shape[-1], part.dtype)
        outputs.append(_infer(part, gamma, beta, epsilon, mean, variance))
        means.append(mean)
        variances.append(variance * count / (count - 1.0))
    moments = tf.add_n(means) / groups, tf.add_n(variances) / groups
    return tf.concat(outputs, axis=0), *_move(running, moments, rate)


def _move(running, moments, rate):
    return [old * (1.0 - rate) + new * rate for old, new in zip(running, moments, strict=True)]


def _normalize_fused(x, gamma, beta, epsilon, groups, running, rate):
    """Does the same as `_normalize`, with TensorFlow's kernel, which moves `running` too.

    Mean and variance have no gradient.
    """
    settings = {"scale": gamma, "epsilon": epsilon, "is_training": True}
    mean, variance = running

    def kernel(part, rate):
        return tf.raw_ops.FusedBatchNormV3(
            x=part, offset=beta, mean=mean, variance=variance, exponential_avg_factor=rate, **settings
        )

    if groups == 1:  # TensorFlow fuses the kernel with the ReLU behind it only here
        result = kernel(x, rate)
        return result.y, result.batch_mean, result.batch_variance

    # The code below has one operation per group where possible: more operations slow down tracing, but not a step.
    axis = tf.constant(0)
    parts = tf.split(x, groups, axis)
    normalized = []
    for number, part in enumerate(parts):
        # Each group moves the running statistics on. In the end all groups have equal weights, rate / groups each.
        share = rate / groups
        normalized.append(kernel(part, share / (1.0 - (groups - 1 - number) * share)))
        mean, variance = normalized[-1].batch_mean, normalized[-1].batch_variance

    @tf.custom_gradient
    def joined(*_):  # of x, gamma and beta; the gradients below replace the kernels' own
        def gradient(of_outputs):
            gradients = [
                tf.raw_ops.FusedBatchNormGradV3(
                    y_backprop=of_output,
                    x=part,
                    reserve_space_1=each.reserve_space_1,
                    reserve_space_2=each.reserve_space_2,
                    reserve_space_3=each.reserve_space_3,
                    **settings,
                )
                for of_output, part, each in zip(tf.split(of_outputs, groups, axis), parts, normalized, strict=True)
            ]
            of_parts, of_gamma, of_beta, *_ = zip(*gradients, strict=True)
            # Not `tf.add_n`: TensorFlow spends seconds on ordering the inputs of each.
            of_gamma, of_beta = (tf.reduce_sum(tf.stack(each), axis) for each in (of_gamma, of_beta))
            return tf.concat(of_parts, axis), of_gamma, of_beta

        return tf.concat([each.y for each in normalized], axis), gradient

    return joined(x, gamma, beta), mean, variance


def _normalize_at_once(inputs, gamma, beta, epsilon, groups, running, rate):
    """Does the same as `_normalize`, with operations that take all groups at once.

    So GPUs launch, and XLA compiles, few large kernels. Mean and variance have no gradient.
    """
    dtype, shape = gamma.dtype, tf.shape(inputs)
    tf.debugging.assert_equal(shape[0] % groups, 0, "BatchNorm's groups are equal parts of the batch")
    count = tf.cast(tf.reduce_prod(shape[:-1]) // groups, dtype)

    def parts(x):  # G x (N/G H W) x C
        return tf.cast(tf.reshape(x, (groups, -1, inputs.shape[-1])), dtype)

    @tf.custom_gradient
    def normalize(inputs, gamma, beta):
        x = parts(inputs)
        mean = tf.reduce_mean(x, axis=1, keepdims=True)  # G x 1 x C
        variance = tf.reduce_mean(tf.square(x - mean), axis=1, keepdims=True)
        scale = tf.math.rsqrt(variance + epsilon)
        outputs = (x - mean) * (scale * gamma) + beta

        def gradient(of_outputs, *_):
            of_outputs = parts(of_outputs)
            normal = (parts(inputs) - mean) * scale  # not x: its memory would stay taken until here
            of_beta, of_gamma = (
                tf.reduce_sum(each, axis=1, keepdims=True) for each in (of_outputs, of_outputs * normal)
            )  # G x 1 x C
            of_inputs = scale * gamma * (of_outputs - (of_beta + normal * of_gamma) / count)
            return (
                tf.reshape(tf.cast(of_inputs, inputs.dtype), shape),
                *(tf.reduce_sum(each, axis=(0, 1)) for each in (of_gamma, of_beta)),
            )

        return (tf.reshape(tf.cast(outputs, inputs.dtype), shape), mean, variance), gradient

    outputs, mean, variance = normalize(inputs, gamma, beta)
    moments = tf.reduce_mean(mean, axis=(0, 1)), tf.reduce_mean(variance, axis=(0, 1)) * count / (count - 1.0)
    return outputs, *_move(running, moments, rate)


def _normalize_together(inputs, gamma, beta, epsilon, _, running, rate):
    """Does the same as `_normalize` for one group, the inputs of all replicas.

    It needs one all-reduce forward and one back, its gradient. The moments are about the running mean, which is the
    same on all replicas, and not about 0: so they lose no digits where a channel's mean is large compared with its
    standard deviation.
    """
    shift = running[0]
    x = tf.cast(inputs, gamma.dtype)
    mean, variance = tf.nn.moments(x, (0, 1, 2))
    count = tf.cast(tf.reduce_prod(tf.shape(x)[:-1]), x.dtype)
    offset = mean - shift
    total, first, second = replicas.add_up([count, count * offset, count * (variance + offset**2)])
    offset = first / total
    mean, variance = shift + offset, tf.maximum(second / total - offset**2, 0.0)
    outputs = (x - mean) * tf.math.rsqrt(variance + epsilon) * gamma + beta
    return tf.cast(outputs, inputs.dtype), *_move(running, (mean, variance * total / (total - 1.0)), rate)
