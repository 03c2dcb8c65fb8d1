"""The authors' checkpoints go in, torchvision's names come out.

  python -m moco_tf.torch_weights --checkpoint=moco_v2_800ep_pretrain.pth.tar --output=runs/v2   # a run, or an encoder
  python -m moco_tf.torch_weights --encoder=runs/v2 --output=resnet50.safetensors                # and back

In: checkpoints of MoCo become a run folder that `moco_tf.train` goes on with, every other file an encoder
(`encoder.keras`). Out: a run folder or an encoder becomes a state dict. PyTorch is needed to write .pth only. The
flags of `moco_tf.train` shape the run that is made; what the file says of the model need not be given.
"""

import dataclasses
import json
import os
import shutil
import sys
from pathlib import Path

import numpy as np
from absl import flags

from moco_tf import command, torch_files
from moco_tf.command import ConfigError
from moco_tf.config import Config
from moco_tf.startup import load_tensorflow

# A run's settings that differ from `Config`'s defaults, unless flags say otherwise: the papers' 8 GPUs, and v1.
EIGHT_GPUS = {"bn_groups": 8}
V1 = {"augment": "v1", "temperature": 0.07, "lr_schedule": "step"}
CIFAR = {"image_size": 32, "augment": "cifar"}
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
SIDECAR = "torch.json"  # beside the weights: where they came from, and what has no place in a Keras model


def main(arguments):
    """Runs the command; returns the process's exit status."""
    try:
        return command.run("moco_tf.torch_weights", __doc__, lambda given: _run(*_parse(given)), arguments)
    except torch_files.TorchFileError as error:
        print(f"moco_tf.torch_weights: {error}", file=sys.stderr)
        return 1


@dataclasses.dataclass(frozen=True)
class Settings:
    checkpoint: str = command.flag("", "File to read: of PyTorch (.pth, .pth.tar), or .safetensors.")
    encoder: str = command.flag("", "To write back: a run folder, a folder of this command's, or .keras.")
    output: str = command.flag("", "With --checkpoint a folder to make, with --encoder a file to write.")
    part: str | None = command.flag(
        None,
        "whole: both encoders, heads and queue. encoder: the query encoder; its backbone only with --encoder. "
        "Default: with --checkpoint all that the file has, with --encoder the encoder.",
        choices=("whole", "encoder"),
    )
    heads: int = command.flag(
        0,
        "Attention heads of a ViT that becomes an encoder, which its tensors do not show; 0: as MoCo v3 has them "
        "(vit_small 12). DeiT's and timm's vit_small: 6.",
    )
    verbose: bool = command.flag(False, "Print a line for each tensor.")


def _parse(arguments):
    """Command-line arguments -> the flag values, and the names of the flags that were given."""
    flag_values = flags.FlagValues()
    command.define_flags(flag_values, Settings)
    command.define_flags(flag_values, Config)
    command.read_arguments(flag_values, "moco_tf.torch_weights", arguments)
    given = {name for name in flag_values if flag_values[name].present}
    if bool(flag_values.checkpoint) == bool(flag_values.encoder) or not flag_values.output:
        raise ConfigError("give --checkpoint=FILE or --encoder=DIR, one of them, and --output: see --help")
    for name in ("run_dir", "resume"):
        if name in given:
            raise ConfigError(f"--{name} belongs to moco_tf.train; here --output names the folder")
    return flag_values, given


def _run(flag_values, given):
    output = Path(flag_values.output)
    if flag_values.checkpoint:
        if output.is_symlink() or (output.exists() and not (output.is_dir() and not any(output.iterdir()))):
            raise ConfigError(f"--output={output} exists: choose another folder, or delete it yourself")
        tensors = torch_files.read(flag_values.checkpoint)
    else:
        torch_files.check_writable(output)
        if not Path(flag_values.encoder).exists():
            raise ConfigError(f"--encoder={flag_values.encoder}: there is no such file or folder")
    load_tensorflow()  # takes seconds: what could be refused without it has been
    from moco_tf.torch_names import Mismatch

    try:
        if flag_values.checkpoint:
            return _bring_in(tensors, output, flag_values, given)
        return _bring_out(output, flag_values)
    except Mismatch as error:
        source = flag_values.checkpoint or flag_values.encoder
        raise torch_files.TorchFileError(f"{source}: {error}") from None


# In.


def _bring_in(tensors, output, flag_values, given):
    from moco_tf import torch_names

    contents = torch_names.contents(tensors)
    checkpoint, part = flag_values.checkpoint, flag_values.part
    whole = part == "whole" or (part is None and bool(contents.key or contents.rest))
    if whole and not contents.method:
        raise torch_names.Mismatch("a plain network, without key encoder and queue: --part=encoder takes it")
    found = torch_names.recognise(contents.query, contents.method)
    if whole and not found.head:
        raise torch_names.Mismatch("missing: the query encoder's head; --part=encoder takes the rest of it")
    if flag_values.heads and (whole or not found.is_vit):
        raise ConfigError(f"--heads={flag_values.heads} is for a ViT that becomes an encoder: leave the flag out")
    print(f"{checkpoint}: {contents.method or 'encoder'}, {found}.")
    values = command.values(flag_values, Config)
    aside = output.absolute().with_name(f".{output.absolute().name}.writing-{os.getpid()}")
    try:
        aside.mkdir(parents=True)
        if whole:
            lines = _write_run(aside, contents, found, values, given)
            flag_file = f"{output}/config.flags"
            last = f"Wrote {output}. Train on: python -m moco_tf.train --flagfile={flag_file} --run_dir={output}"
        else:
            lines = _write_encoder(aside, contents.query, found, values, given, flag_values.heads)
            last = f"Wrote {output}/encoder.keras."
        sidecar = {
            "checkpoint": Path(checkpoint).name,
            "architecture": dataclasses.asdict(found),
            "counters": _counters(contents, found, whole),
        }
        (aside / SIDECAR).write_text(json.dumps(sidecar, indent=1) + "\n")
        os.rename(aside, output)
    except OSError as error:
        raise ConfigError(f"--output={output}: {error.strerror or error}") from None
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    if flag_values.verbose:
        print("\n".join(lines))
    if not whole:
        unused = sorted(given & set(values) - {"image_size"})
        if unused:
            print(f"Not used for an encoder: {', '.join('--' + name for name in unused)}.")
    print(last)
    return 0


def _counters(contents, found, whole):
    """BatchNorm's counters under the names by which `whole_state_dict` will ask for them: {name: number}."""
    from moco_tf import torch_names

    projects = found.head not in ("classifier", "")
    query, key = torch_names.ENCODERS[contents.method] if contents.method and projects else ("", "")
    parts = [(query, contents.query)] + ([(key, contents.key), ("", contents.rest)] if whole else [])
    return {f"{p}{name}": count for p, tensors in parts for name, count in torch_names.counters(tensors).items()}


def run_config(found, queue_size, values, given):
    """The `Config` of a run that goes on with a checkpoint.

    Args:
      found: the checkpoint's `Architecture`.
      queue_size: K; None in MoCo v3, which has no queue.
      values: {name: value} of all of `Config`'s fields; given: the names that the user set.

    Raises:
      ConfigError: a flag that was given contradicts the file.
    """
    held = {"method": "moco", "arch": found.arch, "dim": found.dim, "hidden_dim": found.hidden_dim}
    if found.is_vit:
        held |= {"patch_size": found.patch_size, "image_size": found.image_size}
    else:
        held |= {"width": found.width, "stem": found.stem}
    if found.head == "projector":
        held |= {"method": "moco_v3"}
        defaults = V3_VIT if found.is_vit else V3
    else:
        held |= {"head": found.head, "queue_size": queue_size}
        if found.hidden_dim == found.features:  # 0 says so, unless the user does in figures
            held["hidden_dim"] = values["hidden_dim"] if values["hidden_dim"] == found.features else 0
        defaults = EIGHT_GPUS | (V1 if found.head == "linear" else {})
    for name, value in held.items():
        if name in given and values[name] != value:
            raise ConfigError(f"--{name}={values[name]}, but the checkpoint has {value}: leave the flag out")
    defaults |= CIFAR if found.stem == "cifar" else {}
    defaults = {name: value for name, value in defaults.items() if name not in given}
    config = Config(**values | defaults | held)
    return dataclasses.replace(config, bn_groups=config.bn_groups or 1) if config.uses("bn_groups") else config


def _write_run(folder, contents, found, values, given):
    from moco_tf import build
    from moco_tf.checkpoint import Checkpoints

    config = run_config(found, _queue_size(contents), values, given)
    model = build.model(config, steps_per_epoch=1)  # shapes the schedules only, which are no part of a checkpoint
    lines = load_run(model, contents)
    (folder / "config.flags").write_text(config.flag_lines())
    Checkpoints(folder / "checkpoints", model).save()
    return lines


def _queue_size(contents):
    """K of a MoCo v1 or v2 checkpoint, None for v3's."""
    from moco_tf.torch_names import POINTER, QUEUE, Mismatch

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
    from moco_tf.torch_names import ENCODERS, match

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
    return model.query_encoder, model.key_encoder


def _queue(model, tensors):
    """A checkpoint's queue (C, K) and its pointer, an integer."""
    from moco_tf.torch_names import POINTER, QUEUE, Mismatch

    queue, pointer = tensors[QUEUE], tensors[POINTER]
    expected = (model.dim, model.queue.size)
    if queue.shape != expected or queue.dtype.kind == "i":
        raise Mismatch(f"queue has shape {queue.shape}; {expected} was expected")
    if pointer.size != 1 or not 0 <= int(pointer.item()) < model.queue.size:
        raise Mismatch(f"queue_ptr is {pointer.tolist()}; a place in the queue of {model.queue.size} was expected")
    return queue, int(pointer.item())


def load_encoder(model, tensors):
    """Sets an encoder's weights to a state dict's; returns a line for each tensor, raises as `load_moco` does."""
    from moco_tf.torch_names import match

    return _assign(match(model, tensors))


def _write_encoder(folder, tensors, found, values, given, heads):
    image_size = CIFAR["image_size"] if found.stem == "cifar" and "image_size" not in given else values["image_size"]
    if found.is_vit and "image_size" in given and image_size != found.image_size:
        raise ConfigError(
            f"--image_size={image_size}, but the file's positions are of {found.image_size}: leave it out"
        )
    model = encoder(found, image_size, heads)
    lines = load_encoder(model, tensors)
    model.save(folder / "encoder.keras")
    return lines


def encoder(found, image_size, heads=0):
    """An `Architecture` as a functional model: normalised images -> {"features", and by its head "projection" (N, dim)
    or "logits" (N, classes)}. The weights are fresh.

    image_size: of a ResNet's input; a ViT has its own. heads: of a ViT; 0: as MoCo v3 has them.
    """
    import keras

    from moco_tf.encoders import heads as head_lib
    from moco_tf.encoders import resnet, vit

    row = getattr(vit if found.is_vit else resnet, found.arch)
    if found.is_vit:
        width, depth, usual = row.args
        backbone = vit.vit(width, depth, heads or usual, image_size=found.image_size, patch_size=found.patch_size)
    else:
        backbone = row(image_size=image_size, width=found.width, stem=found.stem)
    if found.head not in ("classifier", ""):
        kind = {"projector": "vit" if found.is_vit else "resnet"}.get(found.head, found.head)
        return head_lib.encoder(backbone, backbone.input_shape[1:], kind, found.dim, found.hidden_dim or None)
    outputs = {"features": backbone.output}
    if found.head == "classifier":
        name = "head" if found.is_vit else "fc"
        outputs["logits"] = keras.layers.Dense(found.dim, name=name)(backbone.output)
    return keras.Model(backbone.input, outputs)


def _assign(pairs, prefix=""):
    """Sets variables to tensors; returns a line for each."""
    from moco_tf.torch_names import to_keras

    lines = []
    for name, value, variable in pairs:
        variable.assign(to_keras(value).astype(variable.dtype))
        rounded = "" if np.can_cast(value.dtype, variable.dtype) else f", rounded to {variable.dtype}"
        lines.append(f"{prefix}{name} {value.shape} {value.dtype} -> {variable.path} {tuple(variable.shape)}{rounded}")
    return lines


# Out.


def _bring_out(output, flag_values):
    source = Path(flag_values.encoder)
    model = _load(source)
    sidecar = source / SIDECAR
    counters = json.loads(sidecar.read_text())["counters"] if sidecar.exists() else None
    state_dict = whole_state_dict if flag_values.part == "whole" else backbone_state_dict
    tensors = state_dict(model, counters)
    torch_files.write(output, tensors)
    if flag_values.verbose:
        print("\n".join(f"{name} {value.shape} {value.dtype}" for name, value in tensors.items()))
    print(f"Wrote {output}: {len(tensors)} tensors.")
    return 0


def _load(path):
    """The `MoCo` model of a run folder, or the model in a .keras file or a converted encoder's folder."""
    import keras

    import moco_tf.methods.moco  # noqa: F401 - its classes may stand in the file
    from moco_tf import build, run_folder

    if run_folder.recorded(path):
        return build.trained(path)
    file = path / "encoder.keras" if path.is_dir() else path
    if file.suffix != ".keras" or not file.exists():
        raise ConfigError(f"--encoder={path} is no run folder, no folder with encoder.keras, and no .keras file")
    try:
        return keras.models.load_model(file, compile=False)
    except Exception as error:  # whatever Keras says of a file that it cannot read
        raise ConfigError(f"--encoder={path}: Keras cannot read it: {str(error).splitlines()[0]}") from None


def backbone_state_dict(model, counters=None):
    """The query encoder's backbone under torchvision's or timm's names, with its classifier if any: {name: array}.

    Args:
      model: a `MoCo`, a `MoCoV3`, or an encoder with or without a head.
      counters: BatchNorm's counters when the weights came from PyTorch, under the file's names without "module.".
    """
    from moco_tf.torch_names import recognise, without_head

    ((_, tensors), *_) = _state_dicts(model, counters)
    tensors = tensors if "logits" in _outputs(model) else without_head(tensors)
    recognise(tensors)
    return tensors


def whole_state_dict(model, counters=None):
    """Everything under the authors' names, "module." before each; without a projection, the backbone.

    Takes what `backbone_state_dict` takes.
    """
    from moco_tf import torch_names

    parts = _state_dicts(model, counters)
    prefix, tensors = parts[0]
    if not prefix:
        return backbone_state_dict(model, counters)
    torch_names.recognise(tensors, "moco" if prefix in torch_names.ENCODERS["moco"] else "moco_v3")
    whole = {f"{prefix}{name}": value for prefix, part in parts for name, value in part.items()}
    if hasattr(model, "queue"):
        whole[torch_names.QUEUE] = np.ascontiguousarray(model.queue.keys.numpy().T)
        whole[torch_names.POINTER] = np.array([int(model.queue.pointer)], np.int64)
    return {f"{torch_names.WRAPPER}{name}": value for name, value in whole.items()}


def _outputs(encoder):
    """The names of a functional model's outputs, where it has names for them."""
    outputs = getattr(encoder, "output", None)  # subclassed models have none
    return tuple(outputs) if isinstance(outputs, dict) else ()


def _state_dicts(model, counters):
    """[(prefix, {name: array})] of the query encoder first, then of key encoder and predictor where there are any.

    The prefix is "" for what has no projection.
    """
    from moco_tf import torch_names

    trained = hasattr(model, "query_encoder")  # else an encoder
    encoders = _encoders(model) if trained else (model,)
    prefixes, passes = ("", ""), 1
    if _has_projector(encoders[0]):
        prefixes, passes = torch_names.ENCODERS["moco_v3"], 2  # in a step both views go through each encoder
    elif "projection" in _outputs(encoders[0]):
        prefixes = torch_names.ENCODERS["moco"]
    steps = passes * int(model.step) if trained else 0
    parts = list(zip(prefixes, encoders, strict=False))
    if hasattr(model, "predictor"):
        parts.append(("", model.predictor))
    return [(prefix, torch_names.state_dict(part, _under(counters, prefix), steps)) for prefix, part in parts]


def _has_projector(encoder):
    """Whether an encoder ends in MoCo v3's projector, whose last layer is BatchNorm without gain and offset."""
    return "projection" in _outputs(encoder) and not encoder.layers[-1].trainable_variables


def _under(counters, prefix):
    if counters is None:
        return None
    return {name.removeprefix(prefix): count for name, count in counters.items() if name.startswith(prefix)}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
