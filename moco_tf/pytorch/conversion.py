"""Between PyTorch's state dicts and models: a run or an encoder of a checkpoint's `Contents`, and back.

`moco_tf.torch_weights` is the command; `tensor_names` says which tensor is which weight.
"""

import dataclasses

import keras
import numpy as np

from moco_tf import command
from moco_tf import config as config_lib
from moco_tf.command import ConfigError
from moco_tf.encoders import heads as heads_lib
from moco_tf.encoders import resnet, vit
from moco_tf.methods.keras_internals import layers_of
from moco_tf.pytorch import tensor_names
from moco_tf.pytorch.tensor_names import ENCODERS, POINTER, QUEUE, Mismatch, match, recognise, to_keras, without_head

# A run's settings that differ from `Config`'s defaults, unless flags say otherwise: the papers' 8 GPUs, and v1.
EIGHT_GPUS = {"bn_groups": 8}
V1 = {"augment": "v1", "temperature": 0.07, "lr_schedule": "step"}
CIFAR = {"image_size": 32, "augment": "cifar"}
DEMO = CIFAR | {  # of the authors' CIFAR-10 demo
    "batch_size": 512,
    "epochs": 200,
    "lr": 0.06,
    "weight_decay": 5e-4,
    "momentum": 0.99,
    "temperature": 0.1,
}
V3 = {
    "augment": "v3",
    "crop_min": 0.2,
    "batch_size": 4096,
    "epochs": 100,
    "optimizer": "lars",
    "lr": 0.6,
    "lr_scaling": "linear",
    "lr_per": "step",
    "warmup_epochs": 10.0,
    "weight_decay": 1e-6,
    "momentum": 0.99,
    "momentum_schedule": "cosine",
    "temperature": 1.0,
}
V3_VIT = V3 | {
    "crop_min": 0.08,
    "epochs": 300,
    "optimizer": "adamw",
    "lr": 1.5e-4,
    "warmup_epochs": 40.0,
    "weight_decay": 0.1,
    "temperature": 0.2,
}
BORDER = "conv1.border"  # the layer


# In.


def run_config(architecture, queue_size, values, named, scheme=""):
    """The `Config` of a run that goes on with a checkpoint.

    Args:
      architecture: the checkpoint's `Architecture`.
      queue_size: K; None in MoCo v3, which has no queue.
      values: {name: value} of all flags of MoCo's and MoCo v3's runs; named: the names that the user set.
      scheme: as in `Contents`; the demo has settings of its own.

    Raises:
      ConfigError: a flag that was given contradicts the file.
    """
    held = {
        "method": "moco",
        "arch": architecture.arch,
        "dim": architecture.dim,
        "hidden_dim": architecture.hidden_dim,
        "channels": architecture.channels,
    }
    if architecture.is_vit:
        held |= {"patch_size": architecture.patch_size, "image_size": architecture.image_size}
    else:
        held |= {"width": architecture.width, "stem": architecture.stem}
    if architecture.head == "projector":
        held |= {"method": "moco_v3"}
        defaults = V3_VIT if architecture.is_vit else V3
    else:
        held |= {"head": architecture.head, "queue_size": queue_size}
        if architecture.hidden_dim == architecture.features:  # 0 says so, unless the user does in figures
            held["hidden_dim"] = values["hidden_dim"] if values["hidden_dim"] == architecture.features else 0
        defaults = EIGHT_GPUS | (V1 if architecture.head == "linear" else {})
        defaults = EIGHT_GPUS | DEMO if scheme == tensor_names.DEMO else defaults
    for name, value in held.items():
        if name in named and values[name] != value:
            raise ConfigError(f"--{name}={values[name]}, but the checkpoint has {value}: leave the flag out")
    defaults = defaults | (CIFAR if architecture.stem == "cifar" else {})
    defaults = {name: value for name, value in defaults.items() if name not in named}
    wanted = values | defaults | held
    kind = config_lib.kind(wanted["method"])
    config = kind(**{field.name: wanted.get(field.name, field.default) for field in command.fields(kind)})
    return dataclasses.replace(config, bn_groups=config.bn_groups or 1) if config.uses("bn_groups") else config


def queue_size(contents):
    """K of a MoCo v1 or v2 checkpoint, None for v3's."""
    if contents.method == "moco_v3":
        return None
    for name in (QUEUE, POINTER):
        if name not in contents.rest:
            raise Mismatch(f"missing: {name}; --part=encoder takes the query encoder alone")
    queue = contents.rest[QUEUE]
    if queue.ndim != 2:
        raise Mismatch(f"queue has shape {queue.shape}; (dim, keys) was expected")
    return queue.shape[1]


def load_run(model, contents):
    """Sets a `MoCo` or `MoCoV3` to a checkpoint's `Contents`; nothing is set if anything does not fit.

    Returns:
      A line for each tensor.

    Raises:
      Mismatch: names the tensor.
    """
    parts = zip(ENCODERS[contents.method], _encoders(model), (contents.query, contents.key), strict=True)
    matched = [(prefix, match(encoder, tensors, prefix)) for prefix, encoder, tensors in parts]
    if contents.method == "moco_v3":
        matched.append(("", match(model.predictor, contents.rest)))
        return [line for prefix, pairs in matched for line in _assign(pairs, prefix)]
    keys, pointer = _queue(model, contents.rest)
    lines = [line for prefix, pairs in matched for line in _assign(pairs, prefix)]
    model.queue.keys.assign(keys.T.astype(model.queue.keys.dtype))
    model.queue.pointer.assign(pointer)
    return [*lines, f"queue {keys.shape} -> queue/keys, queue_ptr {pointer} -> queue/pointer"]


def _encoders(model):
    """A trained model's encoders: the query's and, where there is one, the key's."""
    return [getattr(model, name) for name in ("query_encoder", "key_encoder") if hasattr(model, name)]


def _queue(model, tensors):
    """A checkpoint's queue (C, K) and its pointer, an integer."""
    queue, pointer = tensors[QUEUE], tensors[POINTER]
    expected = (model.dim, model.queue.size)
    if queue.shape != expected or queue.dtype.kind == "i":
        raise Mismatch(f"queue has shape {queue.shape}; {expected} was expected")
    if pointer.size != 1 or not 0 <= int(pointer.item()) < model.queue.size:
        raise Mismatch(f"queue_ptr is {pointer.tolist()}; a place in the queue of {model.queue.size} was expected")
    return queue, int(pointer.item())


def load_encoder(model, tensors):
    """Sets an encoder's weights to a state dict's; returns a line for each tensor, raises as `load_run` does."""
    return _assign(match(model, tensors))


def encoder(architecture, image_size, heads=0):
    """An `Architecture` as a functional model: normalised images -> {"features", and by its head "projection" (N, dim)
    or "logits" (N, classes)}. The weights are fresh.

    image_size: of a ResNet's input; a ViT has its own. heads: of a ViT; 0: as MoCo v3 has them.
    """
    row = getattr(vit if architecture.is_vit else resnet, architecture.arch)
    if architecture.is_vit:
        width, depth, usual = row.args
        backbone = vit.vit(
            width,
            depth,
            heads or usual,
            image_size=architecture.image_size,
            patch_size=architecture.patch_size,
            channels=architecture.channels,
        )
    else:
        border = architecture.stem_padding - 1  # zeros around the image do what the stem's padding beyond 1 would
        settings = {"width": architecture.width, "stem": architecture.stem, "channels": architecture.channels}
        backbone = row(image_size=image_size + 2 * border, **settings)
        if border:
            inputs = keras.Input((image_size, image_size, architecture.channels))
            backbone = keras.Model(inputs, backbone(keras.layers.ZeroPadding2D(border, name=BORDER)(inputs)))
    if architecture.head not in ("classifier", ""):
        kind = {"projector": "vit" if architecture.is_vit else "resnet"}.get(architecture.head, architecture.head)
        return heads_lib.encoder(
            backbone, backbone.input_shape[1:], kind, architecture.dim, architecture.hidden_dim or None
        )
    outputs = {"features": backbone.output}
    if architecture.head == "classifier":
        name = "head" if architecture.is_vit else "fc"
        outputs["logits"] = keras.layers.Dense(architecture.dim, name=name)(backbone.output)
    return keras.Model(backbone.input, outputs)


def _assign(pairs, prefix=""):
    """Sets variables to tensors; returns a line for each."""
    lines = []
    for name, value, variable in pairs:
        variable.assign(to_keras(value).astype(variable.dtype))
        rounded = "" if np.can_cast(value.dtype, variable.dtype) else f", rounded to {variable.dtype}"
        lines.append(f"{prefix}{name} {value.shape} {value.dtype} -> {variable.path} {tuple(variable.shape)}{rounded}")
    return lines


def counters(contents, architecture, whole):
    """BatchNorm's counters under the names by which `whole_state_dict` will ask for them: {name: number}."""
    projects = architecture.head not in ("classifier", "")
    query, key = ENCODERS[contents.method] if contents.method and projects else ("", "")
    parts = [(query, contents.query)] + ([(key, contents.key), ("", contents.rest)] if whole else [])
    return {f"{p}{name}": count for p, tensors in parts for name, count in tensor_names.counters(tensors).items()}


# Out.


def backbone_state_dict(model, counters=None):
    """The query encoder's backbone under torchvision's or timm's names, with its classifier if any: {name: array}.

    Args:
      model: a `MoCo`, a `MoCoV3`, or an encoder with or without a head.
      counters: BatchNorm's counters when the weights came from PyTorch, under the file's names without "module.".
    """

    ((_, tensors), *_) = _state_dicts(model, counters)
    tensors = tensors if "logits" in _outputs(model) else without_head(tensors)
    recognise(tensors)
    return tensors


def whole_state_dict(model, counters=None):
    """Everything under the authors' names, "module." before each; without a projection, the backbone.

    Takes what `backbone_state_dict` takes.
    """

    parts = _state_dicts(model, counters)
    prefix, tensors = parts[0]
    if not prefix:
        return backbone_state_dict(model, counters)
    recognise(tensors, "moco" if prefix in ENCODERS["moco"] else "moco_v3")
    whole = {f"{prefix}{name}": value for prefix, part in parts for name, value in part.items()}
    if hasattr(model, "queue"):
        whole[QUEUE] = np.ascontiguousarray(model.queue.keys.numpy().T)
        whole[POINTER] = np.array([int(model.queue.pointer)], np.int64)
    return {f"{tensor_names.WRAPPER}{name}": value for name, value in whole.items()}


def _state_dicts(model, counters):
    """[(prefix, {name: array})] of the query encoder first, then of key encoder and predictor where there are any.

    The prefix is "" for what has no projection.
    """

    trained = hasattr(model, "query_encoder")  # else an encoder
    encoders = _encoders(model) if trained else [model]
    prefixes, passes = ("", ""), 1
    if "projection" in _outputs(encoders[0]) and heads_lib.has_projector(encoders[0]):
        prefixes, passes = ENCODERS["moco_v3"], 2  # in a step both views go through each encoder
    elif "projection" in _outputs(encoders[0]):
        prefixes = ENCODERS["moco"]
    steps = passes * int(model.step) if trained else 0
    parts = list(zip(prefixes, encoders, strict=False))
    if hasattr(model, "predictor"):
        parts.append(("", model.predictor))
    return [(prefix, tensor_names.state_dict(part, _under(counters, prefix), steps)) for prefix, part in parts]


def has_border(model):
    """Whether an `Architecture` with a stem padded by more than 1 was built so."""
    return any(layer.name == BORDER for layer in layers_of(model))


def _outputs(encoder):
    """The names of a functional model's outputs, where it has names for them."""
    outputs = getattr(encoder, "output", None)  # subclassed models have none
    return tuple(outputs) if isinstance(outputs, dict) else ()


def _under(counters, prefix):
    if counters is None:
        return None
    return {name.removeprefix(prefix): count for name, count in counters.items() if name.startswith(prefix)}
