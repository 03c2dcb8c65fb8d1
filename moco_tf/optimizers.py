"""Optimizers as the papers' code defines them, where Keras' own differ."""

import keras


@keras.saving.register_keras_serializable("moco_tf")
class SGD(keras.optimizers.Optimizer):
    """Stochastic gradient descent with momentum as PyTorch defines it.

        v <- momentum * v + (gradient + weight_decay * w)
        w <- w - learning_rate * v

    `keras.optimizers.SGD` differs twice: its decay does not pass through the momentum buffer, which makes it
    about ten times weaker at momentum 0.9, and its rate is inside the buffer, so that a drop of the rate takes
    effect late. Decay applies to every trainable weight, BatchNorm's and biases included, as in MoCo v1 and v2.

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
        gradient = gradient + self.coupled_weight_decay * variable
        self.assign(velocity, self.momentum * velocity + gradient)
        self.assign_sub(variable, learning_rate * velocity)

    def get_config(self):
        config = {"momentum": self.momentum, "weight_decay": self.coupled_weight_decay}
        return super().get_config() | config
