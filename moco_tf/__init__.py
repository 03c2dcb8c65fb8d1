"""moco_tf: Momentum Contrast (MoCo) for Keras 3 / TensorFlow 2.

This module holds the public names. They load on first use, so that `python -m moco_tf.train --help` prints its help,
and a wrong flag its error, before TensorFlow starts.
"""

from importlib import import_module

from moco_tf import registration

_MODULES = {"encoders": "moco_tf.encoders", "augment": "moco_tf.data.augment"}
_OBJECTS = {
    "AdamW": "moco_tf.optimizers",
    "EndToEnd": "moco_tf.methods.end_to_end",
    "LARS": "moco_tf.optimizers",
    "MemoryBank": "moco_tf.methods.memory_bank",
    "MoCo": "moco_tf.methods.moco",
    "MoCoV3": "moco_tf.methods.moco_v3",
    "Preprocessing": "moco_tf.data.inputs.image",
    "SGD": "moco_tf.optimizers",
    "export_encoder": "moco_tf.serving.saved_model",
    "views": "moco_tf.data.views",
}

__all__ = [*_MODULES, *_OBJECTS]
__version__ = "0.1.0"

registration.register()


def __getattr__(name):
    if name in _MODULES:
        value = import_module(_MODULES[name])
    elif name in _OBJECTS:
        value = getattr(import_module(_OBJECTS[name]), name)
    else:
        raise AttributeError(f"module 'moco_tf' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__():
    return __all__
