"""Converts between PyTorch's state dicts and models: from a checkpoint's `Contents` to a run or an encoder, and back.

`moco_tf.torch_weights` is the command; `tensor_names` maps tensors to weights.
"""

import dataclasses

import keras
import numpy as np

from moco_tf import command
from moco_tf import config as config_lib
from moco_tf.command import ConfigError
from moco_tf.encoders import heads as heads_lib
from moco_tf.encoders import resnet, vit
from moco_tf.encoders.color_spaces import ColorSpace
from moco_tf.methods.keras_internals import layers_of
from moco_tf.pytorch import tensor_names
from moco_tf.pytorch.tensor_names import ENCODERS, POINTER, QUEUE, Mismatch, match, recognise, to_keras, without_head

# A run's settings that differ from `Config`'s defaults, unless flags set them: for the papers' 8 GPUs, and for v1.
EIGHT_GPUS = {"bn_groups": 8}
V1 = {"augment": "v1", "temperature": 0.07, "lr_schedule": "step"}
CIFAR = {"image_size": 32, "augment": "cifar"}
DEMO = CIFAR | {  # the authors' CIFAR-10 demo
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
BORDER = "conv1.border"  # the name of a layer


# In.


def run_config(architecture, queue_size, values, named, scheme=""):
    """Returns the `Config` of a run that continues from a checkpoint.

    Args:
      architecture: the checkpoint's `Architecture`.
      queue_size: K; None in MoCo v3, which has no queue.
      values: {name: value} of all flags of MoCo's and MoCo v3's runs; named: the names that the user set.
      scheme: as in `Contents`; the demo has its own settings.

    Raises:
      ConfigError: a flag that the user set contradicts the file.
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
        if architecture.hidden_dim == architecture.features:  # 0 means this width, unless the user set the number
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
    """Returns K of a MoCo v1 or v2 checkpoint, None for a v3 checkpoint."""
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
    """Loads a checkpoint's `Contents` into a `MoCo` or `MoCoV3`; sets nothing if a tensor does not fit.

    Returns:
      A line for each tensor.

    Raises:
      Mismatch: a tensor does not fit; the message names it.
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
    """Returns a trained model's encoders: the query encoder and, if the model has one, the key encoder."""
    return [getattr(model, name) for name in ("query_encoder", "key_encoder") if hasattr(model, name)]


def _queue(model, tensors):
    """Returns a checkpoint's queue (C, K) and its pointer, an integer."""
    queue, pointer = tensors[QUEUE], tensors[POINTER]
    expected = (model.dim, model.queue.size)
    if queue.shape != expected or queue.dtype.kind == "i":
        raise Mismatch(f"queue has shape {queue.shape}; {expected} was expected")
    if pointer.size != 1 or not 0 <= int(pointer.item()) < model.queue.size:
        raise Mismatch(f"queue_ptr is {pointer.tolist()}; a place in the queue of {model.queue.size} was expected")
    return queue, int(pointer.item())


def load_encoder(model, tensors):
    """Loads a state dict into an encoder; returns a line for each tensor, raises as `load_run` does."""
    return _assign(match(model, tensors))


def encoder(architecture, image_size, heads=0):
    """Builds an `Architecture` as a functional model with fresh weights.

    The model maps normalised images to {"features", and by its head "projection" (N, dim) or "logits" (N, classes)}.

    image_size: of a ResNet's input; a ViT has its own. heads: of a ViT; 0: as in MoCo v3.
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
        border = architecture.stem_padding - 1  # zeros around the image replace the stem's padding beyond 1
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
    """Assigns tensors to variables; returns a line for each pair."""
    lines = []
    for name, value, variable in pairs:
        variable.assign(to_keras(value).astype(variable.dtype))
        rounded = "" if np.can_cast(value.dtype, variable.dtype) else f", rounded to {variable.dtype}"
        lines.append(f"{prefix}{name} {value.shape} {value.dtype} -> {variable.path} {tuple(variable.shape)}{rounded}")
    return lines


def counters(contents, architecture, whole):
    """Returns BatchNorm's counters under the names that `whole_state_dict` looks up: {name: number}."""
    projects = architecture.head not in ("classifier", "")
    method = contents.method or ("moco_v3" if architecture.head == "projector" else "moco")  # a lone encoder has none
    query, key = ENCODERS[method] if projects else ("", "")
    parts = [(query, contents.query)] + ([(key, contents.key), ("", contents.rest)] if whole else [])
    return {f"{p}{name}": count for p, tensors in parts for name, count in tensor_names.counters(tensors).items()}


# Out.


def backbone_state_dict(model, counters=None):
    """Returns the query encoder's backbone, with any classifier, under torchvision's or timm's names: {name: array}.

    Args:
      model: a `MoCo`, a `MoCoV3`, or an encoder with or without a head.
      counters: BatchNorm's counters when the weights came from PyTorch, under the file's names without "module.".
    """

    if any(isinstance(layer, ColorSpace) for layer in layers_of(model)):
        raise ConfigError(
            "the encoder converts colours in a layer that PyTorch's networks do not have (--pretext=colorize, cmc): "
            "export a SavedModel"
        )
    ((_, tensors), *_) = _state_dicts(model, counters)
    tensors = tensors if "logits" in _outputs(model) else without_head(tensors)
    recognise(tensors)
    return tensors


def whole_state_dict(model, counters=None):
    """Returns all tensors under the authors' names, each with "module." before it; without a projection, the backbone.

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
    """Lists (prefix, {name: array}) of the query encoder, then of the key encoder and the predictor if they exist.

    The prefix is "" for a part without a projection.
    """

    trained = hasattr(model, "query_encoder")  # otherwise the model is an encoder
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
    """Says whether a model was built from an `Architecture` whose stem is padded by more than 1."""
    return any(layer.name == BORDER for layer in layers_of(model))


def _outputs(encoder):
    """Returns the names of a functional model's outputs, if it names them."""
    outputs = getattr(encoder, "output", None)  # subclassed models have none
    return tuple(outputs) if isinstance(outputs, dict) else ()


def _under(counters, prefix):
    if counters is None:
        return None
    return {name.removeprefix(prefix): count for name, count in counters.items() if name.startswith(prefix)}
