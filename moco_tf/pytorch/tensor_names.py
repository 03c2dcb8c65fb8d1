"""Maps the tensors of a PyTorch file to weights here, and tells the network from the file's names and shapes.

The functions take {name: array}. The tables hold all details of PyTorch, torchvision and the papers' code.
`moco_tf.torch_weights` moves weights with these functions.
"""

import collections
import dataclasses
import math
import re

import keras
import ml_dtypes
import numpy as np

from moco_tf.config import ARCHITECTURES
from moco_tf.encoders import first_convolution, resnet, vit
from moco_tf.methods.keras_internals import layers_of

LEAVES = {  # a weight's name in Keras -> its name in PyTorch; the layer has the same name in both
    "kernel": "weight",
    "bias": "bias",
    "gamma": "weight",
    "beta": "bias",
    "moving_mean": "running_mean",
    "moving_variance": "running_var",
}
OWN_NAMES = ("cls_token", "pos_embed")  # weights of a ViT whose names have no layer's name before them
# For each number of axes, the source's axis for each target axis. PyTorch has (out, in, h, w) and (out, in).
TO_KERAS = {4: (2, 3, 1, 0), 2: (1, 0)}
TO_TORCH = {4: (3, 2, 0, 1), 2: (1, 0)}
COUNTER = ".num_batches_tracked"  # PyTorch's BatchNorm counts its steps; the BatchNorm here has no such weight
FLOATS = (np.float32, np.float64, np.float16, ml_dtypes.bfloat16)

# Names that the papers' code gives its parts. A file with none of these prefixes holds a plain network.
WRAPPER = "module."  # DistributedDataParallel puts it before every name
ENCODERS = {"moco": ("encoder_q.", "encoder_k."), "moco_v3": ("base_encoder.", "momentum_encoder.")}  # query, key
QUEUE, POINTER, PREDICTOR = "queue", "queue_ptr", "predictor."
HEADS = ("fc.", "head.")  # before the names of a ResNet's head, and of a ViT's head

# Prefixes of an encoder's names in other libraries' files.
WRAPPERS = (WRAPPER, "model.", "_orig_mod.")  # before every name: also of Lightning's modules and of torch.compile
BACKBONES = ("backbone.", "encoder.", "resnet.", "net.", "model.")
HEAD_LAYERS = ("mlp.", "fc.", "fc_cls.", "layers.", "classification_head.")  # between a head's name and its layers
LINEAR = {"weight", "bias"}
MLP = {f"{number}.{kind}" for number in (0, 2) for kind in LINEAR}
DEMO = "MoCo's CIFAR-10 demo"
# A ResNet's children in an nn.Sequential: the number of layer1 gives the numbers of the others. torchvision's ResNets
# have layer1 at 4, ResNets without the max-pool at 3 (the demo), and those without ReLU too at 2 (lightly's own
# ResNets). A pool and Flatten stand before fc.
CHILDREN = {
    str(first): {"0": "conv1", "1": "bn1", str(first + 6): "fc"} | {str(first + i): f"layer{i + 1}" for i in range(4)}
    for first in (2, 3, 4)
}


@dataclasses.dataclass(frozen=True)
class Scheme:
    """The parts that a library's checkpoint holds beside its backbone, by the prefixes of their names."""

    name: str
    projection: str
    classifier: str
    others: tuple
    key: tuple = ()  # the key encoder's backbone and projection, if the file can hold a whole MoCo run
    also: tuple = ()  # parts of the file for which a run has no place
    stem_padding: int = 1  # of a 3x3 stem

    @property
    def parts(self):
        return (self.projection, self.classifier, *self.others)


SCHEMES = (
    Scheme(
        "mmselfsup or mmpretrain",
        "neck.",
        "head.",
        ("encoder_k.", "momentum_encoder.", "target_net.", "queue", "memory_bank.", "data_preprocessor."),
        key=("encoder_k.module.0.", "encoder_k.module.1."),
        also=("encoder_k.steps", "data_preprocessor."),
    ),
    Scheme(
        "solo-learn",
        "projector.",
        "classifier.",
        ("momentum_", "predictor.", "prototypes.", "head.", "queue", "dino_loss_func.", "loss_func."),
        stem_padding=2,
    ),
    Scheme(
        "lightly",
        "projection_head.",
        "online_classifier.",
        (
            *("backbone_momentum.", "projection_head_momentum.", "prediction_head.", "prototypes.", "criterion."),
            *("key_backbone.", "key_projection_head.", "query_backbone.", "query_projection_head."),
        ),
    ),
)
OLD_MM = {  # mmselfsup 0.x's and OpenSelfSup's names -> mmpretrain's; old files have the query encoder under two names
    "encoder_q.0.": "backbone.",
    "encoder_q.1.": "neck.",
    "encoder_k.0.": "encoder_k.module.0.",
    "encoder_k.1.": "encoder_k.module.1.",
}

STEMS = {7: "imagenet", 3: "cifar"}  # by the side of the first convolution's kernel
RESNETS = {
    (*row.args, row.keywords.get("cardinality", 1), row.keywords.get("base_width", 64)): name
    for name in ARCHITECTURES
    if (row := getattr(resnet, name, None))
}
VITS = {row.args[:2]: name for name in ARCHITECTURES if (row := getattr(vit, name, None))}  # by width and depth


class Mismatch(ValueError):
    """Tensors that do not fit the expected network. The message is one line and names the first such tensor."""


@dataclasses.dataclass(frozen=True)
class Contents:
    """The tensors of a file by the part that they belong to, under their names inside that part."""

    method: str  # "moco", "moco_v3", or "" for a plain network
    query: dict
    key: dict
    rest: dict  # MoCo's queue and its pointer; MoCo v3's predictor, under its whole names
    scheme: str = ""  # a name in `SCHEMES`, or `DEMO`
    prefix: str = ""  # before the encoder's names in the file, if it is not a prefix of the authors or of torchvision
    left_out: tuple = ()  # names in the file
    stem_padding: int = 1  # of a 3x3 stem

    @property
    def origin(self):
        """The scheme and the encoder's prefix, for messages; "" for the authors' and torchvision's files."""
        return " ".join(filter(None, (self.scheme, self.prefix and f"({self.prefix}*)")))


@dataclasses.dataclass(frozen=True)
class Architecture:
    """An encoder with its head, in the terms of `moco_tf.config`; `width` and `stem` are a ResNet's."""

    arch: str
    width: int
    stem: str
    features: int
    head: str  # "linear", "mlp", "projector" (MoCo v3's), "classifier" or ""
    dim: int = 0  # the size of the head's output
    hidden_dim: int = 0
    patch_size: int = 0  # of a ViT; its position embeddings belong to one image size
    image_size: int = 0
    stem_padding: int = 1  # of a 3x3 stem; the tensors do not show it
    channels: int = 3  # of the images

    @property
    def is_vit(self):
        return self.arch in VITS.values()

    def __str__(self):
        padding = f" padded by {self.stem_padding}" if self.stem_padding > 1 else ""
        kind = f"width {self.width}, {self.stem} stem{padding}"
        if self.is_vit:
            kind = f"patches of {self.patch_size} pixels, images of {self.image_size}"
        if self.channels != 3:
            kind += f", {self.channels} channel{'s' * (self.channels > 1)}"
        hidden = f"{self.hidden_dim}-" if self.hidden_dim else ""
        return f"{self.arch}, {kind}, " + (f"{self.head} {hidden}{self.dim}" if self.head else "no head")


def contents(tensors):
    """Sorts a state dict into its parts, each under the authors' or torchvision's names.

    Raises:
      Mismatch: a tensor belongs to none of the parts.
    """
    while tensors and (wrapper := next((w for w in WRAPPERS if all(name.startswith(w) for name in tensors)), "")):
        tensors = {name.removeprefix(wrapper): value for name, value in tensors.items()}
    if "encoder_q.0.conv1.weight" in tensors:
        tensors = _of_old_mm(tensors)
    for method, prefixes in ENCODERS.items():
        if any(name.startswith(prefixes[0]) for name in tensors):
            return _of_the_authors(tensors, method, prefixes)
    prefix, backbone, beside = _backbone(tensors)
    backbone = _named_children(backbone, prefix)
    return _of_a_scheme(prefix, backbone, beside) if beside else Contents("", backbone, {}, {}, prefix=prefix)


def _of_the_authors(tensors, method, prefixes):
    inner, *_ = _backbone(_under(tensors, prefixes[0]))
    scheme = DEMO if method == "moco" and inner == "net." else ""
    parts, rest = [], {name: value for name, value in tensors.items() if not name.startswith(prefixes)}
    for prefix in prefixes:
        for name in tensors:
            if name.startswith(prefix) and not name.startswith(prefix + inner):
                raise Mismatch(f"left over: {name} {_shape(tensors[name])} is beside {prefix}{inner}*")
        parts.append(_named_children(_under(tensors, prefix + inner), prefix + inner))
    for name in rest:
        if not (name in (QUEUE, POINTER) if method == "moco" else name.startswith(PREDICTOR)):
            raise Mismatch(f"left over: {name} {_shape(tensors[name])} is in no part of a {method} checkpoint")
    return Contents(method, *parts, rest, scheme, inner and prefixes[0] + inner)


def _of_a_scheme(prefix, backbone, beside):
    """Returns the `Contents` of a backbone behind a prefix and of the tensors beside it in the file."""
    scheme = max(SCHEMES, key=lambda scheme: sum(name.startswith(scheme.parts) for name in beside))
    strays = sorted(name for name in beside if not name.startswith(scheme.parts))
    if strays:
        known = ", ".join(row.name for row in SCHEMES) if len(strays) == len(beside) else scheme.name
        raise Mismatch(
            f"left over: {strays[0]} {_shape(beside[strays[0]])}, beside {prefix}*, is in no part of a checkpoint of "
            f"{known}; a file of {prefix}* alone is taken"
        )
    method, used, head = _used_head(scheme, backbone, beside)
    known = {name for name in beside if used and name.startswith(used)}
    key, rest = {}, {}
    if method and _holds_a_run(scheme, used, beside):
        key = _under(beside, scheme.key[0]) | _head(beside, scheme.key[1], projects=True)
        rest = {name: beside[name] for name in (QUEUE, POINTER) if name in beside}
        of_key = {name for name in beside if name.startswith(scheme.key)}
        if len(key) != len(of_key):
            raise Mismatch(
                f"{scheme.key[1]}* is not a head as {used}* is; --part=encoder takes a file of {prefix}* alone"
            )
        known |= of_key | rest.keys()
    left_out = tuple(name for name in beside if name not in known)
    return Contents(method, backbone | head, key, rest, scheme.name, prefix, left_out, scheme.stem_padding)


def _used_head(scheme, backbone, beside):
    """Returns (method, prefix, tensors) of the head that the encoder gets: the projection, else the classifier."""
    if not any(name.startswith(HEADS) for name in backbone):
        is_vit = "patch_embed.proj.weight" in backbone
        if not is_vit and (head := _head(beside, scheme.projection, projects=True)):
            return "moco", scheme.projection, head
        if head := _head(beside, scheme.classifier, "head." if is_vit else "fc."):
            return "", scheme.classifier, head
    return "", "", {}


def _holds_a_run(scheme, projection, beside):
    """Says whether all tensors beside the backbone belong to a MoCo run, key encoder included."""
    parts = (projection, *scheme.key, *scheme.also)
    has_key = scheme.key and any(name.startswith(scheme.key) for name in beside)
    return has_key and all(name in (QUEUE, POINTER) or name.startswith(parts) for name in beside)


def _backbone(tensors):
    """Finds an encoder's first layer; returns (prefix, {name without it: value}, {name: value} of the others)."""
    first = (*FAMILIES, "0.weight")
    for prefix in ("", *BACKBONES):
        if any(prefix + name in tensors for name in first):
            beside = {name: value for name, value in tensors.items() if not name.startswith(prefix)}
            return prefix, _under(tensors, prefix), beside
    for name in tensors:
        if name.endswith("patch_embed.projection.weight"):
            raise Mismatch(f"{name} is of mmpretrain's Vision Transformers; only ResNets are taken of its files")
    return "", tensors, {}


def _head(tensors, root, name="fc.", projects=False):
    """Returns a head's tensors as `name` if it is linear or, where it `projects`, an MLP; {} for any other head."""
    head = _under(tensors, root)
    for inner in HEAD_LAYERS:
        if head and all(layer.startswith(inner) for layer in head):
            head = _under(head, inner)
    if head.keys() == LINEAR or (projects and head.keys() == MLP):
        return {name + layer: value for layer, value in head.items()}
    return {}


def _named_children(tensors, prefix):
    """Replaces the numbers of an nn.Sequential by torchvision's names; `prefix` is for messages."""
    stages = [match[1] for name in tensors if (match := re.fullmatch(r"(\d+)\.0\.conv1\.weight", name))]
    first = min(stages, key=lambda number: (len(number), number), default="")
    if not first:
        return tensors
    if first not in CHILDREN:
        raise Mismatch(f"{prefix}{first}.0.conv1.weight is the first block; an nn.Sequential's is known at 2, 3 and 4")
    stem = tensors.get("0.weight")
    if first != "4" and stem is not None and stem.shape[2:] != (3, 3):
        raise Mismatch(
            f"{prefix}0.weight has shape {_shape(stem)}; a 3x3 kernel was expected, for {prefix}{first} is the first "
            "stage, which leaves no place for a max-pool"
        )
    renamed = {}
    for name, value in tensors.items():
        number, _, layer = name.partition(".")
        if number not in CHILDREN[first]:
            raise Mismatch(f"left over: {prefix}{name} {_shape(value)} is not a child of a ResNet")
        if first == "2":
            layer = layer.replace("shortcut.", "downsample.")
            bias = tensors.get(name.removesuffix("running_mean") + "bias", value)
            if name.endswith(".running_mean") and value.size > bias.size:
                raise Mismatch(
                    f"{prefix}{name} has shape {_shape(value)}; {_shape(bias)} was expected: lightly's SplitBatchNorm "
                    "keeps running_mean and running_var of each split, average them over the splits first"
                )
        renamed[f"{CHILDREN[first][number]}.{layer}"] = value
    return renamed


def _of_old_mm(tensors):
    """Replaces OpenSelfSup's and mmselfsup 0.x's names by mmpretrain's."""
    renamed = {}
    for name, value in tensors.items():
        old = next((old for old in OLD_MM if name.startswith(old)), "")
        new = OLD_MM.get(old, "") + name.removeprefix(old)
        if new in renamed and (renamed[new].dtype, renamed[new].tobytes()) != (value.dtype, value.tobytes()):
            twice = next(prefix + new.removeprefix(there) for prefix, there in OLD_MM.items() if new.startswith(there))
            raise Mismatch(f"{new} and {twice} are one tensor in mmselfsup; here they differ")
        renamed[new] = value
    return renamed


def _under(tensors, prefix):
    """Returns the tensors whose names begin with the prefix, under their names without it."""
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def left_out(contents, whole):
    """Lists the names of the tensors that set no weight, apart from BatchNorm's counters."""
    if whole or not contents.method:
        return list(contents.left_out)
    key = ENCODERS[contents.method][1]
    return [*(key + name for name in contents.key), *contents.rest, *contents.left_out]


def grouped(names):
    """Shortens many names for one line: returns the first part of each name, and how many names have it."""
    counts = collections.Counter(name.partition(".")[0] + ".*" * ("." in name) for name in sorted(names))
    return [f"{part} ({count} tensors)" if part.endswith("*") else part for part, count in counts.items()]


def recognise(tensors, method=""):
    """Returns the `Architecture` that an encoder's names and shapes describe.

    Args:
      tensors: an encoder's state dict.
      method: as in `Contents`; a linear `fc` is a projection in MoCo's files and a classifier in a plain network.

    Raises:
      Mismatch: this package does not build such an encoder.
    """
    for marker, family in FAMILIES.items():
        if marker in tensors:
            return family(tensors, method)
    raise Mismatch(
        f"no encoder that is known here: none of {', '.join(FAMILIES)} among its {len(tensors)} tensors, "
        f"the first of which is {next(iter(tensors), 'missing')}; taken are ResNets and ViTs by the authors', "
        "torchvision's and timm's names"
    )


def _resnet(tensors, method):
    width, channels, side, _ = _wanted(tensors, "conv1.weight", 4)
    if side not in STEMS:
        raise Mismatch(f"conv1.weight has a {side}x{side} kernel; known are 7x7 (imagenet) and 3x3 (cifar)")
    stage_blocks = {match.groups() for name in tensors if (match := re.match(r"layer([1-4])\.(\d+)\.", name))}
    blocks = tuple(sum(stage == str(number) for stage, _ in stage_blocks) for number in (1, 2, 3, 4))
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
    return Architecture(RESNETS[row], width, STEMS[side], features, **head, channels=channels)


def _vit(tensors, method):
    features, channels, patch, _ = _wanted(tensors, "patch_embed.proj.weight", 4)
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
    return Architecture(VITS[features, depth], 0, "", features, **head, **sizes, channels=channels)


FAMILIES = {"conv1.weight": _resnet, "patch_embed.proj.weight": _vit}  # by a tensor that only this family has


def of_channels(contents, channels):
    """Returns the `Contents` with both encoders' first convolutions adapted to this number of channels."""
    names = [f"{layer}.weight" for layer in first_convolution.LAYERS]

    def adapted(tensors):
        return tensors | {
            name: first_convolution.of_channels(tensors[name], channels, axis=1) for name in names if name in tensors
        }

    return dataclasses.replace(contents, query=adapted(contents.query), key=adapted(contents.key))


def without_head(tensors):
    """Returns the backbone's tensors."""
    return {name: value for name, value in tensors.items() if not name.startswith(HEADS)}


def names(encoder):
    """Yields (PyTorch's name, variable) for each weight of an encoder whose layers have PyTorch's names.

    Raises:
      Mismatch: PyTorch has no such layer, or two layers have one name. PyTorch has no encoder of two ResNets (CMC's),
        of patches (CPC's) or of text.
    """
    seen, layers = set(), layers_of(encoder)
    for layer in layers:
        if isinstance(layer, (keras.layers.GroupNormalization, keras.layers.Embedding)):
            raise Mismatch(
                f"PyTorch's ResNets and ViTs have no {type(layer).__name__}, as {layer.name} is one: an encoder of "
                "patches (cpc) or of text (simcse) stays in Keras"
            )
    for layer in layers:
        if layer.weights and not isinstance(layer, keras.Model):
            if layer.name in seen:
                raise Mismatch(
                    f"two layers are called {layer.name}: PyTorch has no encoder of two networks, as CMC's is"
                )
            seen.add(layer.name)
            for variable in layer.weights:
                if variable.name in OWN_NAMES:
                    yield variable.name, variable
                elif variable.name in LEAVES:
                    yield f"{layer.name}.{LEAVES[variable.name]}", variable
                else:
                    raise Mismatch(f"{variable.path} has no name in PyTorch's ResNets and ViTs")


def to_keras(value):
    """PyTorch's layout -> Keras': convolutions (out, in, h, w) -> (h, w, in, out), linears (out, in) -> (in, out)."""
    return value.transpose(TO_KERAS.get(value.ndim, range(value.ndim)))


def to_torch(value):
    """Transposes from Keras' layout to PyTorch's."""
    return value.transpose(TO_TORCH.get(value.ndim, range(value.ndim)))


def match(encoder, tensors, prefix=""):
    """Pairs an encoder's variables with the tensors of a state dict, one to one; `prefix` is for messages.

    Returns:
      [(name, tensor, variable)]; BatchNorm's counters are left out.

    Raises:
      Mismatch: a tensor is missing or left over, or has another shape, or has integers.
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
    """Returns BatchNorm's step counters: {name: number}."""
    counters = {name: value for name, value in tensors.items() if name.endswith(COUNTER)}
    for name, value in counters.items():
        if value.size != 1 or value.dtype != np.int64:
            raise Mismatch(f"{name} has shape {_shape(value)} and type {value.dtype}; one int64 was expected")
    return {name: int(value.item()) for name, value in counters.items()}


def state_dict(encoder, counters=None, steps=0):
    """Returns an encoder's weights under PyTorch's names and in PyTorch's layout: {name: array}.

    Args:
      counters: BatchNorm's counters when the weights were loaded, {name: number}; None: each was 0.
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
    """Returns the shape of a tensor that must exist, with this number of axes and none of them empty."""
    if name not in tensors:
        raise Mismatch(f"missing: {name}")
    if tensors[name].ndim != axes or 0 in tensors[name].shape:
        raise Mismatch(f"{name} has shape {_shape(tensors[name])}; {axes} axes were expected")
    return tensors[name].shape


def _shape(value):
    return tuple(value.shape)
