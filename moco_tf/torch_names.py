"""Which tensor of a PyTorch file is which weight here, and what a file's names and shapes say of its network.

Pure functions over {name: array}; the tables hold all that is particular to PyTorch, torchvision and the papers' code.
`moco_tf.torch_weights` moves weights with them.
"""

import dataclasses

import keras

from moco_tf import config
from moco_tf.encoders import resnet

LEAVES = {  # a weight's name in Keras -> in PyTorch; a layer's name is the same in both
    "kernel": "weight",
    "bias": "bias",
    "gamma": "weight",
    "beta": "bias",
    "moving_mean": "running_mean",
    "moving_variance": "running_var",
}
# By number of axes, Keras' place of each of PyTorch's: (out, in, height, width), (out, in).
TO_KERAS = {4: (2, 3, 1, 0), 2: (1, 0)}
TO_TORCH = {4: (3, 2, 0, 1), 2: (1, 0)}
COUNTER = ".num_batches_tracked"  # PyTorch's BatchNorm counts its steps; ours has no such weight

# What the papers' code calls its parts. A file without any of these prefixes holds a plain network.
MODULE = "module."  # DistributedDataParallel's, before all other names
PARTS = {
    "moco": {"query": "encoder_q.", "key": "encoder_k."},
    "moco_v3": {"query": "base_encoder.", "key": "momentum_encoder.", "predictor": "predictor."},
}
QUEUE, POINTER = "queue", "queue_ptr"
HEADS = {  # the head's modules, each with weight and bias
    "linear": ("fc",),
    "mlp": ("fc.0", "fc.2"),
}


class NameError_(ValueError):
    pass
