"""Weights to start from: of another run, of a Keras file, or of a PyTorch checkpoint, taken layer by layer.

`moco_tf.train --start_from` and the commands of transfer call it.
"""

from pathlib import Path
from typing import NamedTuple

import keras

from moco_tf import build, run_folder
from moco_tf.command import ConfigError
from moco_tf.encoders import first_convolution
from moco_tf.methods.ema import derive_state
from moco_tf.methods.keras_internals import layers_of
from moco_tf.pytorch import checkpoint_files, conversion, tensor_names

KERAS = ".keras"
POSITIONS = "pos_embed"  # of a ViT, a function of the size


class Taken(NamedTuple):
    """Which layers of a model were given weights."""

    layers: list  # names of those that were
    left: list  # sentences on those that were not
    adapted: list  # sentences on those whose weights were made to fit


def encoder(path, flag):
    """The encoder that a path names, a functional Keras model with its weights.

    Args:
      path: a run folder, a .keras file, or a PyTorch file as `moco_tf.torch_weights` takes it.
      flag: that names it, for refusals.

    Raises:
      ConfigError: it is none of these, or cannot be read.
    """
    if not Path(path).exists():
        raise ConfigError(f"{flag}={path}: there is no such file or folder")
    if Path(path).is_dir():
        if run_folder.recorded(path) is None:
            raise ConfigError(f"{flag}={path} is a folder, but none of a run: it has no config.flags")
        return build.trained(path).backbone
    return _of_keras(path, flag) if str(path).endswith(KERAS) else _of_torch(path, flag)


def copy_by_name(source, target):
    """Gives each layer of a model the weights of the layer of its name in another, where their shapes are equal.

    A ViT's positions stay as they are where sizes differ. The first convolution takes a kernel of images of another
    number of channels, as `first_convolution.of_channels` makes it fit.

    Returns:
      `Taken`.
    """
    known, taken = _with_weights(source), Taken([], [], [])
    for name, layer in _with_weights(target).items():
        if name not in known:
            taken.left.append(f"{name} is not there")
        elif _differ_in_channels(known[name], layer, source, target):
            kernel, (*_, before, _) = known[name].kernel.numpy(), known[name].kernel.shape
            channels = target.input_shape[-1]
            layer.kernel.assign(first_convolution.of_channels(kernel, channels, axis=2))
            if layer.use_bias:
                layer.bias.assign(known[name].bias)
            taken.layers.append(name)
            taken.adapted.append(first_convolution.said(name, before, channels))
        elif _shapes(layer) != _shapes(known[name]):
            taken.left.append(f"{name} is {_shapes(known[name])} there and {_shapes(layer)} here")
        else:
            for mine, its in zip(layer.weights, known[name].weights, strict=True):
                if mine.shape == its.shape:
                    mine.assign(its)
            taken.layers.append(name)
    derive_state(target)
    return taken


def _differ_in_channels(its, mine, source, target):
    """Whether two layers are the first convolutions of their models, alike but for the channels of the images."""
    kinds = isinstance(mine, keras.layers.Conv2D) and isinstance(its, keras.layers.Conv2D)
    if mine.name not in first_convolution.LAYERS or not kinds or its.use_bias != mine.use_bias:
        return False
    (*there, of_its, wide), (*here, of_mine, wide_here) = its.kernel.shape, mine.kernel.shape
    # One that sees a part of the channels, as CMC's do, is no convolution of images.
    of_images = [getattr(model, "input_shape", (None,))[-1] for model in (source, target)] == [of_its, of_mine]
    return of_images and of_its != of_mine and (there, wide) == (here, wide_here)


def _with_weights(model):
    """{name: layer} of the layers at any depth that have weights, models apart."""
    return {layer.name: layer for layer in layers_of(model) if layer.weights and not isinstance(layer, keras.Model)}


def _shapes(layer):
    return [tuple(weight.shape) for weight in layer.weights if weight.name != POSITIONS]


def _of_keras(path, flag):
    import moco_tf  # noqa: F401 - its classes

    try:
        model = keras.models.load_model(path, compile=False, safe_mode=True)
    except Exception as error:  # whatever Keras says of files that it cannot read
        raise ConfigError(f"{flag}={path} cannot be read: {str(error).strip().splitlines()[0]}") from None
    return getattr(model, "backbone", model)


def _of_torch(path, flag):
    try:
        contents = tensor_names.contents(checkpoint_files.read(path))
        architecture = tensor_names.recognise(contents.query, contents.method)
        model = conversion.encoder(architecture, architecture.image_size or 224)
        conversion.load_encoder(model, contents.query)
    except (tensor_names.Mismatch, checkpoint_files.TorchFileError) as error:
        raise ConfigError(f"{flag}={path}: {error}") from None
    return model
