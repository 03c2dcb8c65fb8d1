"""XLA on several replicas: it compiles the backbones' passes of training, forward and backward, in each replica.

Where one replica trains, XLA compiles the whole step (Keras' `jit_compile`). It has no gather and no merging of
replicas, so on several replicas it gets the part of a step that computes most and sends nothing.
"""

import inspect

import tensorflow as tf

from moco_tf.methods import batch_norms, keras_internals


def can_compile(backbone):
    """Whether a backbone is told when it trains, sends nothing to other replicas, and has layers that XLA takes."""
    if "training" not in inspect.signature(backbone.call).parameters:
        return False  # its passes of training cannot be told from others
    sends = any(getattr(layer, "synchronized", False) for layer in batch_norms.layers(backbone))
    return not sends and all(layer.supports_jit for layer in [backbone, *keras_internals.layers_of(backbone)])


def set_compiled(backbone, compiled):
    """Lets XLA compile a backbone's calls with `training=True`, and their gradients; or no longer.

    All else, such as inference and export, stays as it is. Each replica traces and compiles a pass once for each
    shape.
    """
    vars(backbone).pop("call", None)  # what an earlier call of this function put before the class' own
    if not compiled:
        return
    plain = backbone.call
    in_xla = tf.function(lambda x, **more: plain(x, training=True, **more), jit_compile=True, autograph=False)

    def call(inputs, training=None, **more):
        return in_xla(inputs, **more) if training else plain(inputs, training=training, **more)

    vars(backbone)["call"] = call  # past Keras, which would keep it among what it saves
