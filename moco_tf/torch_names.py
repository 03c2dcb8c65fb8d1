"""Which tensor of a PyTorch file is which weight here, and what a file's names and shapes say of its network.

Functions over {name: array}; the tables hold all that is particular to PyTorch, torchvision and the papers' code.
`moco_tf.torch_weights` moves weights with them.
"""

import dataclasses
import math
import re

import keras
import ml_dtypes
import numpy as np

from moco_tf.config import ARCHITECTURES
from moco_tf.encoders import resnet, vit

LEAVES = {  # a weight's name in Keras -> in PyTorch; its layer has the same name in both
    "kernel": "weight",
    "bias": "bias",
    "gamma": "weight",
    "beta": "bias",
    "moving_mean": "running_mean",
    "moving_variance": "running_var",
}
OWN_NAMES = ("cls_token", "pos_embed")  # weights of a ViT that no layer's name stands before
# For each number of axes, where the target's axes stand in the source. PyTorch has (out, in, h, w) and (out, in).
TO_KERAS = {4: (2, 3, 1, 0), 2: (1, 0)}
TO_TORCH = {4: (3, 2, 0, 1), 2: (1, 0)}
COUNTER = ".num_batches_tracked"  # PyTorch's BatchNorm counts its steps; ours has no such weight
FLOATS = (np.float32, np.float64, np.float16, ml_dtypes.bfloat16)

# What the papers' code calls its parts. A file with none of these prefixes holds a plain network.
WRAPPER = "module."  # DistributedDataParallel's, before every name
ENCODERS = {"moco": ("encoder_q.", "encoder_k."), "moco_v3": ("base_encoder.", "momentum_encoder.")}  # query's, key's
QUEUE, POINTER, PREDICTOR = "queue", "queue_ptr", "predictor."
HEADS = ("fc.", "head.")  # before the names of a ResNet's head, and of a ViT's
STEMS = {7: "imagenet", 3: "cifar"}  # by the side of the first convolution's kernel
RESNETS = {
    (*row.args, row.keywords.get("cardinality", 1), row.keywords.get("base_width", 64)): name
    for name in ARCHITECTURES
    if (row := getattr(resnet, name, None))
}
VITS = {row.args[:2]: name for name in ARCHITECTURES if (row := getattr(vit, name, None))}  # by width and depth


class Mismatch(ValueError):
    """Tensors that do not make the network they are taken for. The message is one line and names the first of them."""


@dataclasses.dataclass(frozen=True)
class Contents:
    """The tensors of a file by what they belong to, under their names inside that part."""

    method: str  # "moco", "moco_v3", or "" for a plain network
    query: dict
    key: dict
    rest: dict  # MoCo's queue and its pointer; MoCo v3's predictor, under its whole names


@dataclasses.dataclass(frozen=True)
class Architecture:
    """An encoder with its head, as `moco_tf.config` names such things; `width` and `stem` are a ResNet's."""

    arch: str
    width: int
    stem: str
    features: int
    head: str  # "linear", "mlp", "projector" (MoCo v3's), "classifier" or ""
    dim: int = 0  # of the head's output
    hidden_dim: int = 0
    patch_size: int = 0  # of a ViT; its positions are those of one image size
    image_size: int = 0

    @property
    def is_vit(self):
        return self.arch in VITS.values()

    def __str__(self):
        kind = f"width {self.width}, {self.stem} stem"
        if self.is_vit:
            kind = f"patches of {self.patch_size} pixels, images of {self.image_size}"
        hidden = f"{self.hidden_dim}-" if self.hidden_dim else ""
        return f"{self.arch}, {kind}, " + (f"{self.head} {hidden}{self.dim}" if self.head else "no head")


def contents(tensors):
    """Sorts a state dict into its parts.

    Raises:
      Mismatch: a tensor that belongs to none of them.
    """
    if all(name.startswith(WRAPPER) for name in tensors):
        tensors = {name.removeprefix(WRAPPER): value for name, value in tensors.items()}
    for method, prefixes in ENCODERS.items():
        if not any(name.startswith(prefixes[0]) for name in tensors):
            continue
        query, key = (
            {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
            for prefix in prefixes
        )
        rest = {name: value for name, value in tensors.items() if not name.startswith(prefixes)}
        for name in rest:
            if not (name in (QUEUE, POINTER) if method == "moco" else name.startswith(PREDICTOR)):
                raise Mismatch(f"left over: {name} {_shape(tensors[name])} is in no part of a {method} checkpoint")
        return Contents(method, query, key, rest)
    return Contents("", tensors, {}, {})


def recognise(tensors, method=""):
    """The `Architecture` that an encoder's names and shapes say.

    Args:
      tensors: an encoder's state dict.
      method: as in `Contents`; a linear `fc` is a projection in MoCo's files and a classifier in a plain one.

    Raises:
      Mismatch: it is none that this package builds.
    """
    for marker, family in FAMILIES.items():
        if marker in tensors:
            return family(tensors, method)
    raise Mismatch(
        f"no encoder that is known here: none of {', '.join(FAMILIES)} among its {len(tensors)} tensors, "
        f"the first of which is {next(iter(tensors), 'missing')}"
    )


def _resnet(tensors, method):
    width, _, side, _ = _wanted(tensors, "conv1.weight", 4)
    if side not in STEMS:
        raise Mismatch(f"conv1.weight has a {side}x{side} kernel; known are 7x7 (imagenet) and 3x3 (cifar)")
    found = {match.groups() for name in tensors if (match := re.match(r"layer([1-4])\.(\d+)\.", name))}
    blocks = tuple(sum(stage == str(number) for stage, _ in found) for number in (1, 2, 3, 4))
    bottleneck = "layer1.0.conv3.weight" in tensors
    row = (blocks, False, 1, 64)
    if bottleneck:
        inner, group, *_ = _wanted(tensors, "layer1.0.conv2.weight", 4)
        row = (blocks, True, inner // group, 64 * group // width)
    if row not in RESNETS:
        kind = f"bottlenecks of {row[2]} groups of width {row[3]}" if bottleneck else "basic blocks"
        raise Mismatch(f"a ResNet of {'-'.join(map(str, blocks))} {kind}; known are {', '.join(RESNETS.values())}")
    features = width * (32 if bottleneck else 8)
    head = {"head": ""}
    if "fc.weight" in tensors:
        dim, _ = _wanted(tensors, "fc.weight", 2)
        head = {"head": "linear" if method == "moco" else "classifier", "dim": dim}
    elif "fc.2.weight" in tensors:
        dim, hidden_dim = _wanted(tensors, "fc.2.weight", 2)
        head = {"head": "mlp", "dim": dim, "hidden_dim": hidden_dim}
    elif "fc.3.weight" in tensors:
        dim, hidden_dim = _wanted(tensors, "fc.3.weight", 2)
        head = {"head": "projector", "dim": dim, "hidden_dim": hidden_dim}
    return Architecture(RESNETS[row], width, STEMS[side], features, **head)


def _vit(tensors, method):
    features, _, patch, _ = _wanted(tensors, "patch_embed.proj.weight", 4)
    depth = len({match[1] for name in tensors if (match := re.match(r"blocks\.(\d+)\.", name))})
    if (features, depth) not in VITS:
        known = ", ".join(f"{name} ({width} and {blocks})" for (width, blocks), name in VITS.items())
        raise Mismatch(f"a Vision Transformer of width {features} and {depth} blocks; known are {known}")
    _, tokens, _ = _wanted(tensors, "pos_embed", 3)
    side = math.isqrt(tokens - 1)
    if side**2 != tokens - 1:
        raise Mismatch(f"pos_embed has {tokens} tokens; a class token and a square of patches were expected")
    head = {"head": ""}
    if "head.weight" in tensors:
        head = {"head": "classifier", "dim": _wanted(tensors, "head.weight", 2)[0]}
    elif "head.6.weight" in tensors:
        dim, hidden_dim = _wanted(tensors, "head.6.weight", 2)
        head = {"head": "projector", "dim": dim, "hidden_dim": hidden_dim}
    sizes = {"patch_size": patch, "image_size": side * patch}
    return Architecture(VITS[features, depth], 0, "", features, **head, **sizes)


FAMILIES = {"conv1.weight": _resnet, "patch_embed.proj.weight": _vit}  # by a tensor that only they have


def without_head(tensors):
    """The backbone's tensors."""
    return {name: value for name, value in tensors.items() if not name.startswith(HEADS)}


def names(encoder):
    """(PyTorch's name, variable) for each weight of an encoder whose layers bear PyTorch's names."""
    for layer in encoder._flatten_layers(include_self=False, recursive=True):
        if layer.weights and not isinstance(layer, keras.Model):
            for variable in layer.weights:
                if variable.name in OWN_NAMES:
                    yield variable.name, variable
                elif variable.name in LEAVES:
                    yield f"{layer.name}.{LEAVES[variable.name]}", variable
                else:
                    raise Mismatch(f"{variable.path} has no name in PyTorch's ResNets and ViTs")


def to_keras(value):
    """PyTorch's layout to Keras'; convolutions (out, in, h, w) -> (h, w, in, out), linears (out, in) -> (in, out)."""
    return value.transpose(TO_KERAS.get(value.ndim, range(value.ndim)))


def to_torch(value):
    """Keras' layout to PyTorch's."""
    return value.transpose(TO_TORCH.get(value.ndim, range(value.ndim)))


def match(encoder, tensors, prefix=""):
    """Pairs an encoder's variables with the tensors of a state dict, one to one; `prefix` is for messages.

    Returns:
      [(name, tensor, variable)]; BatchNorm's counters are left out.

    Raises:
      Mismatch: a tensor that is missing, left over, of another shape, or of integers.
    """
    pairs, missing = [], []
    for name, variable in names(encoder):
        if name not in tensors:
            missing.append(name)
            continue
        value = tensors[name]
        axes = len(variable.shape)
        expected = tuple(variable.shape[axis] for axis in TO_TORCH.get(axes, range(axes)))
        if value.shape != expected:
            raise Mismatch(f"{prefix}{name} has shape {_shape(value)}; {expected} was expected")
        if value.dtype not in FLOATS:
            raise Mismatch(f"{prefix}{name} is {value.dtype}; a floating-point type was expected")
        pairs.append((name, value, variable))
    known = {name for name, _, _ in pairs}
    counted = {name.removesuffix(".running_var") + COUNTER for name in known if name.endswith(".running_var")}
    left_over = [name for name in tensors if name not in known | counted]
    for what, which in (("missing", missing), ("left over", left_over)):
        if which:
            more = f", and {len(which) - 1} more" if len(which) > 1 else ""
            raise Mismatch(f"{what}: {prefix}{which[0]}{more}")
    return pairs


def counters(tensors):
    """BatchNorm's counters of steps: {name: number}."""
    found = {name: value for name, value in tensors.items() if name.endswith(COUNTER)}
    for name, value in found.items():
        if value.size != 1 or value.dtype != np.int64:
            raise Mismatch(f"{name} has shape {_shape(value)} and type {value.dtype}; one int64 was expected")
    return {name: int(value.item()) for name, value in found.items()}


def state_dict(encoder, counters=None, steps=0):
    """An encoder's weights under PyTorch's names and in its layout: {name: array}.

    Args:
      counters: BatchNorm's counters when the weights came in, {name: number}; None: each was 0.
      steps: training steps since then.
    """
    tensors = {}
    for name, variable in names(encoder):
        tensors[name] = np.ascontiguousarray(to_torch(variable.numpy()))
        counter = name.removesuffix(".running_var") + COUNTER
        if name.endswith(".running_var") and (counters is None or counter in counters):
            tensors[counter] = np.array((counters or {}).get(counter, 0) + steps, np.int64)
    return tensors


def _wanted(tensors, name, axes):
    """The shape of a tensor that must be there, with that many axes and none of them empty."""
    if name not in tensors:
        raise Mismatch(f"missing: {name}")
    if tensors[name].ndim != axes or 0 in tensors[name].shape:
        raise Mismatch(f"{name} has shape {_shape(tensors[name])}; {axes} axes were expected")
    return tensors[name].shape


def _shape(value):
    return tuple(value.shape)
