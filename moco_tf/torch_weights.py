"""Converts the authors' checkpoints to runs or encoders, and runs or encoders to weights with torchvision's names.

  python -m moco_tf.torch_weights --checkpoint=moco_v2_800ep_pretrain.pth.tar --output=runs/v2   # a run, or an encoder
  python -m moco_tf.torch_weights --encoder=runs/v2 --output=resnet50.safetensors                # and back
  python -m moco_tf.torch_weights --encoder=runs/v2 --output=resnet50.pkl --to=detectron2        # for detection

In: a checkpoint of MoCo becomes a run folder that `moco_tf.train` continues; any other file becomes an encoder
(`encoder.keras`). The names of mmselfsup, mmpretrain, solo-learn and lightly are known too. Out: a run folder or an
encoder becomes a state dict, or weights for Detectron2. Only writing .pth needs PyTorch. The flags of `moco_tf.train`
shape the new run; flags for what the file says about the model are not needed.
"""

import dataclasses
import shlex
import sys
from pathlib import Path

from absl import flags

from moco_tf import command, files, run_folder
from moco_tf import config as config_lib
from moco_tf.command import ConfigError
from moco_tf.pytorch import checkpoint_files
from moco_tf.startup import load_tensorflow

METHODS = ("moco", "moco_v3")  # the methods whose checkpoints become runs

SIDECAR = "torch.json"  # beside the weights: their origin, and what has no place in a Keras model


def main(arguments):
    """Runs the command; returns the process's exit status."""
    try:
        return command.run("moco_tf.torch_weights", __doc__, lambda words: _run(*_parse(words)), arguments)
    except checkpoint_files.TorchFileError as error:
        print(f"moco_tf.torch_weights: {files.printable(error)}", file=sys.stderr)
        return 1


@dataclasses.dataclass(frozen=True)
class Settings:
    checkpoint: str = command.flag("", "File to read: of PyTorch (.pth, .pth.tar), or .safetensors.", path=True)
    encoder: str = command.flag("", "To write back: a run folder, a folder of this command's, or .keras.", path=True)
    output: str = command.flag("", "With --checkpoint a folder to make, with --encoder a file to write.", path=True)
    part: str | None = command.flag(
        None,
        "whole: both encoders, heads and queue. encoder: the query encoder; its backbone only with --encoder. "
        "Default: with --checkpoint all that the file has, with --encoder the encoder.",
        choices=("whole", "encoder"),
    )
    to: str = command.flag(
        "pytorch",
        "With --encoder, the names. pytorch: torchvision's, timm's or the authors', by --part. detectron2: those of "
        "Detectron2's ResNets, in the .pkl that its MODEL.WEIGHTS takes; the settings beside it are printed.",
        choices=("pytorch", "detectron2"),
    )
    heads: int = command.flag(
        0,
        "Attention heads of a ViT that becomes an encoder, which its tensors do not show; 0: as MoCo v3 has them "
        "(vit_small 12). DeiT's and timm's vit_small: 6.",
    )
    stem_padding: int = command.flag(
        0,
        "Padding of a 3x3 stem that becomes an encoder, 1 or 2, which its tensors do not show; 0: as the library has "
        "it whose names the file bears (solo-learn 2, others 1).",
    )
    verbose: bool = command.flag(False, "Print a line for each tensor.")


def _settings_of_runs():
    """The flags of MoCo's and MoCo v3's runs."""
    return {field.name: field for method in METHODS for field in command.fields(config_lib.kind(method))}.values()


def _parse(arguments):
    """Command-line arguments -> the flag values, and the names of the flags that were given."""
    flag_values = flags.FlagValues()
    command.define(flag_values, command.fields(Settings))
    command.define(flag_values, _settings_of_runs())
    command.read_arguments(flag_values, "moco_tf.torch_weights", arguments)
    named = {name for name in flag_values if flag_values[name].present}
    if bool(flag_values.checkpoint) == bool(flag_values.encoder) or not flag_values.output:
        raise ConfigError("give --checkpoint=FILE or --encoder=DIR, one of them, and --output: see --help")
    if flag_values.to == "detectron2" and flag_values.checkpoint:
        raise ConfigError(
            f"--to=detectron2 writes what --encoder names; got --checkpoint={flag_values.checkpoint}: make a run or "
            "an encoder of it, and give that as --encoder"
        )
    if flag_values.to == "detectron2" and flag_values.part == "whole":
        raise ConfigError(
            "--to=detectron2 writes a backbone, which is all that Detectron2 takes: leave out --part=whole"
        )
    for name in ("run_dir", "resume", "start_from"):
        if name in named:
            raise ConfigError(f"--{name} belongs to moco_tf.train: leave it out")
    return flag_values, named


def _run(flag_values, named):
    output = Path(flag_values.output)
    if flag_values.checkpoint:
        if output.is_symlink() or (output.exists() and not (output.is_dir() and not any(output.iterdir()))):
            raise ConfigError(f"--output={output} exists: choose another folder, or delete it yourself")
        tensors = checkpoint_files.read(flag_values.checkpoint)
    else:
        checkpoint_files.check_writable(output, flag_values.to)
        if not Path(flag_values.encoder).exists():
            raise ConfigError(f"--encoder={flag_values.encoder}: there is no such file or folder")
    load_tensorflow()  # takes seconds, so that refusals that can do without it come before
    from moco_tf.pytorch.tensor_names import Mismatch

    try:
        if flag_values.checkpoint:
            return _bring_in(tensors, output, flag_values, named)
        return _bring_out(output, flag_values)
    except Mismatch as error:
        source = flag_values.checkpoint or flag_values.encoder
        raise checkpoint_files.TorchFileError(f"{source}: {error}") from None


# In.


def _bring_in(tensors, output, flag_values, named):
    from moco_tf.pytorch import tensor_names

    contents = tensor_names.contents(tensors)
    part = flag_values.part
    whole = part == "whole" or (part is None and bool(contents.key or contents.rest))
    if whole and (not contents.method or (contents.scheme and not contents.key)):
        what = contents.origin or "a plain network"
        raise tensor_names.Mismatch(f"{what}, without key encoder and queue as MoCo has them: --part=encoder takes it")
    try:
        return _convert(contents, whole, output, flag_values, named)
    except tensor_names.Mismatch as error:
        if not contents.origin:
            raise
        raise tensor_names.Mismatch(f"{contents.origin}, by the authors' or torchvision's names: {error}") from None


def _convert(contents, whole, output, flag_values, named):
    from moco_tf.data.errors import ERRORS, reason
    from moco_tf.encoders import first_convolution
    from moco_tf.pytorch import conversion, tensor_names

    checkpoint = flag_values.checkpoint
    architecture = tensor_names.recognise(contents.query, contents.method)
    if whole and not architecture.head:
        raise tensor_names.Mismatch("missing: the query encoder's head; --part=encoder takes the rest of it")
    if flag_values.heads and (whole or not architecture.is_vit):
        raise ConfigError(f"--heads={flag_values.heads} is for a ViT that becomes an encoder: leave the flag out")
    architecture = _padded(architecture, contents, whole, flag_values.stem_padding)
    print(f"{files.printable(checkpoint)}: {contents.origin or contents.method or 'encoder'}, {architecture}.")
    channels = flag_values.channels
    if "channels" in named and channels != architecture.channels:
        if channels < 1:
            raise ConfigError(f"--channels is more than 0; got {channels}")
        layer = first_convolution.LAYERS[architecture.is_vit]
        print(f"Adapted: {first_convolution.said(layer, architecture.channels, channels)}.")
        contents = tensor_names.of_channels(contents, channels)
        architecture = dataclasses.replace(architecture, channels=channels)
    left_out = tensor_names.left_out(contents, whole)
    if left_out:
        print(f"Left out: {', '.join(tensor_names.grouped(left_out))}.")
    values = {}
    for method in METHODS:
        values |= command.values(flag_values, config_lib.kind(method))
    try:
        with files.aside(output.absolute(), replaces=False) as aside:
            aside.mkdir(parents=True)
            if whole:
                lines = _write_run(aside, contents, architecture, values, named)
                flag_file = f"{output}/config.flags"
                words = shlex.join([f"--flagfile={flag_file}", f"--run_dir={output}"])
                last = f"Wrote {output}. Train on: python -m moco_tf.train {words}"
            else:
                lines = _write_encoder(aside, contents.query, architecture, values, named, flag_values.heads)
                last = f"Wrote {output}/encoder.keras."
            sidecar = {
                "checkpoint": Path(checkpoint).name,
                "architecture": dataclasses.asdict(architecture),
                "counters": conversion.counters(contents, architecture, whole),
            }
            files.write_json(aside / SIDECAR, sidecar)
    except OSError as error:
        raise ConfigError(f"--output={output}: {error.strerror or error}") from None
    except ERRORS as error:  # raised when TensorFlow writes
        raise ConfigError(f"--output={output}: {reason(error)}") from None
    if flag_values.verbose:
        print("\n".join([*lines, *(f"{name} left out" for name in left_out)]))
    if not whole:
        unused = sorted(named & set(values) - {"image_size", "channels"})
        if unused:
            print(f"Not used for an encoder: {', '.join('--' + name for name in unused)}.")
    print(files.printable(last))
    return 0


def _padded(architecture, contents, whole, padding):
    """The `Architecture` with the padding of its 3x3 stem, from the flag or else from the library."""
    if padding and (whole or architecture.stem != "cifar" or padding not in (1, 2)):
        raise ConfigError(f"--stem_padding={padding} is 1 or 2, for a 3x3 stem that becomes an encoder: leave it out")
    padding = padding or contents.stem_padding
    return dataclasses.replace(architecture, stem_padding=padding) if architecture.stem == "cifar" else architecture


def _write_run(folder, contents, architecture, values, named):
    from moco_tf import build
    from moco_tf.checkpoint import Checkpoints
    from moco_tf.pytorch import conversion

    config = conversion.run_config(architecture, conversion.queue_size(contents), values, named, contents.scheme)
    model = build.model(config, run_folder.Data(config.batch_size))  # affects schedules only, no part of a checkpoint
    lines = conversion.load_run(model, contents)
    files.write_text(folder / "config.flags", config.flag_lines(), errors="surrogateescape")
    Checkpoints(folder / "checkpoints", model).save()
    return lines


def _write_encoder(folder, tensors, architecture, values, named, heads):
    from moco_tf.pytorch import conversion

    image_size = values["image_size"]
    if architecture.stem == "cifar" and "image_size" not in named:
        image_size = conversion.CIFAR["image_size"]
    if architecture.is_vit and "image_size" in named and image_size != architecture.image_size:
        raise ConfigError(
            f"--image_size={image_size}, but the file's positions are of {architecture.image_size}: leave it out"
        )
    model = conversion.encoder(architecture, image_size, heads)
    lines = conversion.load_encoder(model, tensors)
    model.save(files.for_tensorflow(folder / "encoder.keras"))
    return lines


# Out.


def _bring_out(output, flag_values):
    from moco_tf.data.inputs.image import IMAGENET
    from moco_tf.pytorch import conversion, detectron2

    source = Path(flag_values.encoder)
    model = _load(source)
    sidecar = source / SIDECAR
    counters = command.read_json(sidecar).get("counters") if sidecar.exists() else None
    whole = flag_values.part == "whole"
    state_dict = conversion.whole_state_dict if whole else conversion.backbone_state_dict
    tensors = state_dict(model, counters)
    advice = "Its 3x3 stem pads by 2: so does the network to load this into." if conversion.has_border(model) else ""
    if flag_values.to == "detectron2":
        settings = detectron2.settings(tensors, getattr(model, "preprocessing", IMAGENET))  # an encoder has none
        tensors = detectron2.state_dict(tensors)
        words = [str(word) for setting in settings.items() for word in setting]
        advice = f"Detectron2 builds the network with: {shlex.join(words)}"
    checkpoint_files.write(output, tensors, flag_values.to)
    if flag_values.verbose:
        print("\n".join(f"{name} {value.shape} {value.dtype}" for name, value in tensors.items()))
    print(f"Wrote {files.printable(output)}: {len(tensors)} tensors.")
    if advice:
        print(advice)
    return 0


def _load(path):
    """The trained model of a run folder, or the model in a .keras file or a converted encoder's folder."""
    import keras

    from moco_tf import build, run_folder  # build also knows the classes that a file may contain

    if run_folder.recorded(path):
        return build.trained(path)
    file = path / "encoder.keras" if path.is_dir() else path
    if file.suffix != ".keras" or not file.exists():
        raise ConfigError(f"--encoder={path} is not a run folder, no folder with encoder.keras, and no .keras file")
    try:
        return keras.models.load_model(files.for_tensorflow(file), compile=False, safe_mode=True)
    except Exception as error:  # Keras raises various errors for unreadable files
        raise ConfigError(f"--encoder={path}: Keras cannot read it: {files.first_line(error)}") from None


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
