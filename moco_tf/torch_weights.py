"""The authors' checkpoints go in, torchvision's names come out.

  python -m moco_tf.torch_weights --checkpoint=moco_v2_800ep_pretrain.pth.tar --output=runs/v2   # a run, or an encoder
  python -m moco_tf.torch_weights --encoder=runs/v2 --output=resnet50.safetensors                # and back

In: MoCo v1 and v2 checkpoints become a run folder that `moco_tf.train` goes on with, every other file an encoder
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
    if contents.method == "moco_v3":
        if part == "whole":
            raise torch_names.Mismatch("MoCo v3, of which this version takes the backbone only: --part=encoder")
        print(f"{checkpoint}: a MoCo v3 checkpoint. Its backbone is taken; its heads and key encoder are not.")
        contents = torch_names.Contents("", torch_names.without_head(contents.query), {}, {}, {})
    whole = part == "whole" or (part is None and bool(contents.key or contents.queue))
    if whole and contents.method != "moco":
        raise torch_names.Mismatch("a plain network, without key encoder and queue: --part=encoder takes it")
    found = torch_names.recognise(contents.query, contents.method)
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
            lines = _write_encoder(aside, contents.query, found, values, given)
            last = f"Wrote {output}/encoder.keras."
        sidecar = {
            "checkpoint": Path(checkpoint).name,
            "architecture": dataclasses.asdict(found),
            "counters": {
                f"{prefix}{name}": count
                for prefix, tensors in (("encoder_q.", contents.query), ("encoder_k.", contents.key))
                for name, count in torch_names.counters(tensors).items()
            },
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


def run_config(found, queue_size, values, given):
    """The `Config` of a run that goes on with a checkpoint.

    Args:
      found: the checkpoint's `Architecture`.
      values: {name: value} of all of `Config`'s fields; given: the names that the user set.

    Raises:
      ConfigError: a flag that was given contradicts the file.
    """
    hidden_dim = 0 if found.hidden_dim == found.features else found.hidden_dim
    held = {
        "method": "moco",
        "arch": found.arch,
        "width": found.width,
        "stem": found.stem,
        "head": found.head,
        "dim": found.dim,
        "hidden_dim": hidden_dim,
        "queue_size": queue_size,
    }
    if "hidden_dim" in given and values["hidden_dim"] == found.hidden_dim:
        values = values | {"hidden_dim": hidden_dim}
    for name, value in held.items():
        if name in given and values[name] != value:
            raise ConfigError(f"--{name}={values[name]}, but the checkpoint has {value}: leave the flag out")
    defaults = EIGHT_GPUS | (V1 if found.head == "linear" else {}) | (CIFAR if found.stem == "cifar" else {})
    defaults = {name: value for name, value in defaults.items() if name not in given}
    config = Config(**values | defaults | held)
    return dataclasses.replace(config, bn_groups=config.bn_groups or 1)


def _write_run(folder, contents, found, values, given):
    from moco_tf import build
    from moco_tf.checkpoint import Checkpoints
    from moco_tf.torch_names import Mismatch

    for name in ("queue", "queue_ptr"):
        if name not in contents.queue:
            raise Mismatch(f"missing: {name}; --part=encoder takes the query encoder alone")
    queue = contents.queue["queue"]
    if queue.ndim != 2:
        raise Mismatch(f"queue has shape {queue.shape}; (dim, keys) was expected")
    config = run_config(found, queue.shape[1], values, given)
    model = build.model(config, steps_per_epoch=1)  # shapes the schedules only, which are no part of a checkpoint
    lines = load_moco(model, contents)
    (folder / "config.flags").write_text(config.flag_lines())
    Checkpoints(folder / "checkpoints", model).save()
    return lines


def load_moco(model, contents):
    """Sets both encoders, queue and pointer of a `MoCo` to a checkpoint's; nothing is set if anything does not fit.

    Returns:
      A line for each tensor.

    Raises:
      Mismatch: names the tensor.
    """
    from moco_tf.torch_names import Mismatch, match

    pairs = match(model.query_encoder, contents.query, "encoder_q.")
    key_pairs = match(model.key_encoder, contents.key, "encoder_k.")
    queue, pointer = contents.queue["queue"], contents.queue["queue_ptr"]
    expected = (model.dim, model.queue.size)
    if queue.shape != expected or queue.dtype.kind == "i":
        raise Mismatch(f"queue has shape {queue.shape}; {expected} was expected")
    if pointer.size != 1 or not 0 <= int(pointer.item()) < model.queue.size:
        raise Mismatch(f"queue_ptr is {pointer.tolist()}; a place in the queue of {model.queue.size} was expected")
    lines = _assign(pairs, "encoder_q.") + _assign(key_pairs, "encoder_k.")
    model.queue.keys.assign(queue.T.astype(model.queue.keys.dtype))
    model.queue.pointer.assign(int(pointer.item()))
    return [*lines, f"queue {queue.shape} -> queue/keys, queue_ptr {int(pointer.item())} -> queue/pointer"]


def load_encoder(model, tensors):
    """Sets an encoder's weights to a state dict's; returns a line for each tensor, raises as `load_moco` does."""
    from moco_tf.torch_names import match

    return _assign(match(model, tensors))


def _write_encoder(folder, tensors, found, values, given):
    image_size = CIFAR["image_size"] if found.stem == "cifar" and "image_size" not in given else values["image_size"]
    model = encoder(found, image_size)
    lines = load_encoder(model, tensors)
    model.save(folder / "encoder.keras")
    return lines


def encoder(found, image_size):
    """An `Architecture` as a functional model: normalised images -> {"features", and by its head "projection" (N, dim)
    or "logits" (N, classes)}. The weights are fresh."""
    import keras

    from moco_tf.encoders import heads, resnet

    backbone = getattr(resnet, found.arch)(image_size=image_size, width=found.width, stem=found.stem)
    if found.head in ("linear", "mlp"):
        return heads.encoder(backbone, backbone.input_shape[1:], found.head, found.dim, found.hidden_dim or None)
    outputs = {"features": backbone.output}
    if found.head == "classifier":
        outputs["logits"] = keras.layers.Dense(found.dim, name="fc")(backbone.output)
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
    """The query encoder's backbone under torchvision's names, with `fc` where it is a classifier's: {name: array}."""
    from moco_tf.torch_names import recognise, without_head

    tensors = _query_tensors(model, counters)
    tensors = tensors if "logits" in _outputs(model) else without_head(tensors)
    recognise(tensors)
    return tensors


def whole_state_dict(model, counters=None):
    """Everything under the authors' names (`module.encoder_q.*`, the queue); without a projection, the backbone.

    Args:
      model: a `MoCo`, or an encoder with or without a head.
      counters: BatchNorm's counters when the weights came from PyTorch, under the authors' names without "module.".
    """
    from moco_tf import torch_names
    from moco_tf.methods.moco import MoCo

    tensors = _query_tensors(model, counters)
    if not isinstance(model, MoCo) and "projection" not in _outputs(model):
        return backbone_state_dict(model, counters)
    torch_names.recognise(tensors, "moco")
    whole = {f"encoder_q.{name}": value for name, value in tensors.items()}
    if isinstance(model, MoCo):
        key = torch_names.state_dict(model.key_encoder, _under(counters, "encoder_k."), int(model.step))
        whole |= {f"encoder_k.{name}": value for name, value in key.items()}
        whole["queue"] = np.ascontiguousarray(model.queue.keys.numpy().T)
        whole["queue_ptr"] = np.array([int(model.queue.pointer)], np.int64)
    return {f"module.{name}": value for name, value in whole.items()}


def _outputs(encoder):
    """The names of a functional model's outputs, where it has names for them."""
    outputs = getattr(encoder, "output", None)  # subclassed models have none
    return tuple(outputs) if isinstance(outputs, dict) else ()


def _query_tensors(model, counters):
    from moco_tf import torch_names
    from moco_tf.methods.moco import MoCo

    is_moco = isinstance(model, MoCo)
    encoder, steps = (model.query_encoder, int(model.step)) if is_moco else (model, 0)
    return torch_names.state_dict(encoder, _under(counters, "encoder_q."), steps)


def _under(counters, prefix):
    if counters is None:
        return None
    return {name.removeprefix(prefix): count for name, count in counters.items() if name.startswith(prefix)}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
