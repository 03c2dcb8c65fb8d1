"""Optimizers as the papers' code defines them, where Keras' own differ."""

import keras
import tensorflow as tf


def forget(optimizer, variable):
    """Sets the velocity that SGD or LARS keeps of a variable to 0. AdamW counts its steps for all variables together.

    Raises:
      ValueError: the optimizer is neither SGD nor LARS.
    """
    optimizer = getattr(optimizer, "inner_optimizer", optimizer)  # under a loss scale
    if not isinstance(optimizer, (SGD, LARS)):
        raise ValueError(f"a layer begins anew with moco_tf.SGD or LARS, not with {type(optimizer).__name__}")
    velocity = optimizer.velocities[optimizer._get_variable_index(variable)]
    velocity.assign(keras.ops.zeros_like(velocity))


@keras.saving.register_keras_serializable("moco_tf")
class SGD(keras.optimizers.Optimizer):
    """Stochastic gradient descent with momentum as PyTorch defines it.

        v <- momentum * v + (gradient + weight_decay * w)
        w <- w - learning_rate * v

    `keras.optimizers.SGD` differs twice. Its decay does not pass through the momentum buffer, which makes the decay
    about ten times weaker at momentum 0.9. Its learning rate is inside the buffer, so that a drop of the learning
    rate takes effect late. Decay applies to every trainable weight, including BatchNorm's and biases, as in MoCo v1
    and v2.

    Args:
      learning_rate: a number, a Keras schedule, or a callable without arguments.
      momentum: 0.9 in the papers.
      weight_decay: the L2 coefficient; 1e-4 in MoCo v1 and v2.
    """

    def __init__(self, learning_rate, momentum=0.9, weight_decay=0.0, name="SGD", **kwargs):
        super().__init__(learning_rate=learning_rate, name=name, **kwargs)
        self.momentum = momentum
        self.coupled_weight_decay = weight_decay  # not `weight_decay`: Keras would apply that one decoupled

    def build(self, variables):
        if self.built:
            return
        super().build(variables)
        self.velocities = self.add_optimizer_variables(variables, "velocity")

    def update_step(self, gradient, variable, learning_rate):
        learning_rate = keras.ops.cast(learning_rate, variable.dtype)
        velocity = self.velocities[self._get_variable_index(variable)]
        # One kernel computes both formulas of the class, with the learning rate outside the buffer.
        tf.raw_ops.ResourceApplyMomentum(
            var=variable.handle,
            accum=velocity.value.handle,
            lr=learning_rate,
            grad=gradient + self.coupled_weight_decay * variable,
            momentum=tf.constant(self.momentum, variable.dtype),
        )

    def get_config(self):
        config = {"momentum": self.momentum, "weight_decay": self.coupled_weight_decay}
        return super().get_config() | config


@keras.saving.register_keras_serializable("moco_tf")
class LARS(keras.optimizers.Optimizer):
    """Layer-wise adaptive learning rates (You et al. 2017, arXiv:1708.03888) as MoCo v3 has them (section 4.1).

        u <- gradient + weight_decay * w;  u <- u * trust * |w| / |u|, 1 in place of a quotient with |w| or |u| = 0
        v <- momentum * v + u
        w <- w - learning_rate * v

    Tensors of one dimension, which are gains, offsets and biases, get neither decay nor trust ratio. The learning
    rate multiplies outside the buffer. (Other versions of LARS multiply inside the buffer; the results differ once
    the learning rate changes.)

    Args:
      learning_rate: a number, a Keras schedule, or a callable without arguments.
      momentum: 0.9 in the paper.
      weight_decay: 1e-6 in the paper, 1.5e-6 for 1000 epochs.
      trust: 0.001 in the paper.
    """

    def __init__(self, learning_rate, momentum=0.9, weight_decay=0.0, trust=0.001, name="LARS", **kwargs):
        super().__init__(learning_rate=learning_rate, name=name, **kwargs)
        self.momentum = momentum
        self.coupled_weight_decay = weight_decay  # not `weight_decay`: Keras would apply that one decoupled
        self.trust = trust

    def build(self, variables):
        if self.built:
            return
        super().build(variables)
        self.velocities = self.add_optimizer_variables(variables, "velocity")

    def update_step(self, gradient, variable, learning_rate):
        learning_rate = keras.ops.cast(learning_rate, variable.dtype)
        velocity = self.velocities[self._get_variable_index(variable)]
        if len(variable.shape) > 1:
            gradient = gradient + self.coupled_weight_decay * variable
            of_weight, of_gradient = (keras.ops.norm(keras.ops.reshape(x, (-1,))) for x in (variable, gradient))
            both = (of_weight > 0) & (of_gradient > 0)
            ratio = self.trust * of_weight / keras.ops.where(both, of_gradient, 1.0)
            gradient = gradient * keras.ops.where(both, ratio, 1.0)
        self.assign(velocity, self.momentum * velocity + gradient)
        self.assign_sub(variable, learning_rate * velocity)

    def get_config(self):
        config = {"momentum": self.momentum, "weight_decay": self.coupled_weight_decay, "trust": self.trust}
        return super().get_config() | config


@keras.saving.register_keras_serializable("moco_tf")
class AdamW(keras.optimizers.Optimizer):
    """Adam with decoupled decay as PyTorch defines it (Loshchilov and Hutter 2019, arXiv:1711.05101).

        w <- w - learning_rate * weight_decay * w
        m <- beta_1 m + (1 - beta_1) gradient;  v <- beta_2 v + (1 - beta_2) gradient^2
        w <- w - learning_rate * m / (1 - beta_1^t) / (sqrt(v / (1 - beta_2^t)) + epsilon)

    `keras.optimizers.AdamW` adds epsilon to the square root of the *uncorrected* v, so that at first epsilon has some
    30 times as much effect. Decay applies to every trainable weight, as in MoCo v3.

    Args:
      learning_rate: a number, a Keras schedule, or a callable without arguments.
      weight_decay: 0.1 in MoCo v3.
      beta_1, beta_2, epsilon: PyTorch's defaults, which the paper keeps.
    """

    def __init__(
        self, learning_rate, weight_decay=0.0, beta_1=0.9, beta_2=0.999, epsilon=1e-8, name="AdamW", **kwargs
    ):
        super().__init__(learning_rate=learning_rate, name=name, **kwargs)
        self.decoupled_weight_decay = weight_decay  # not `weight_decay`: Keras would apply that one as well
        self.beta_1 = beta_1
        self.beta_2 = beta_2
        self.epsilon = epsilon

    def build(self, variables):
        if self.built:
            return
        super().build(variables)
        self.firsts = self.add_optimizer_variables(variables, "momentum")
        self.seconds = self.add_optimizer_variables(variables, "velocity")

    def update_step(self, gradient, variable, learning_rate):
        learning_rate = keras.ops.cast(learning_rate, variable.dtype)
        place = self._get_variable_index(variable)
        first, second = self.firsts[place], self.seconds[place]
        self.assign(first, self.beta_1 * first + (1 - self.beta_1) * gradient)
        self.assign(second, self.beta_2 * second + (1 - self.beta_2) * keras.ops.square(gradient))
        step = keras.ops.cast(self.iterations + 1, variable.dtype)
        beta_1, beta_2 = (keras.ops.convert_to_tensor(beta, variable.dtype) for beta in (self.beta_1, self.beta_2))
        mean = first / (1 - keras.ops.power(beta_1, step))
        square = second / (1 - keras.ops.power(beta_2, step))
        decayed = (1 - learning_rate * self.decoupled_weight_decay) * variable
        self.assign(variable, decayed - learning_rate * mean / (keras.ops.sqrt(square) + self.epsilon))

    def get_config(self):
        return super().get_config() | {
            "weight_decay": self.decoupled_weight_decay,
            "beta_1": self.beta_1,
            "beta_2": self.beta_2,
            "epsilon": self.epsilon,
        }
