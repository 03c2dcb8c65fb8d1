"""The base class of models with several frames: in "queue" they learn with momentum keys and a queue."""

from moco_tf.methods.ema import cosine_momentum
from moco_tf.methods.pretrainer import Pretrainer


class QueueFrame(Pretrainer):
    """A `Pretrainer` whose `frame` may be "queue"; in this frame it has a momentum, as `MoCo` has, otherwise none.

    Attributes:
      frame, queue_size, momentum, momentum_rise_steps, temperature, seed: set by the model, and kept in its config.
    """

    def rates(self):
        return super().rates() | ({"momentum": self._momentum()} if self.frame == "queue" else {})

    def columns(self):
        return (*super().columns(), *(("momentum",) if self.frame == "queue" else ()))

    def _momentum(self):
        return cosine_momentum(self.momentum, self.step.value, self.momentum_rise_steps)

    def get_config(self):
        return super().get_config() | {
            "frame": self.frame,
            "queue_size": self.queue_size,
            "momentum": self.momentum,
            "momentum_rise_steps": self.momentum_rise_steps,
            "temperature": self.temperature,
            "seed": self.seed,
        }
