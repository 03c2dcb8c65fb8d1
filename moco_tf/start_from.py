"""Takes initial weights, layer by layer, from another run, a Keras file, or a PyTorch checkpoint.

`moco_tf.train --start_from` and the commands of transfer call this module.
"""

import collections
from pathlib import Path
from typing import NamedTuple

import keras

from moco_tf import build, files, run_folder
from moco_tf.command import ConfigError
from moco_tf.encoders import first_convolution
from moco_tf.methods.ema import derive_state
from moco_tf.methods.keras_internals import layers_of
from moco_tf.pytorch import checkpoint_files, conversion, tensor_names

KERAS = ".keras"
POSITIONS = "pos_embed"  # a ViT's positions, a function of the size


class Taken(NamedTuple):
    """Which layers of a model were given weights."""

    layers: list  # names of the layers that were
    left: list  # sentences on the layers that were not
    adapted: list  # sentences on the layers whose weights were made to fit


def encoder(path, flag):
    """The encoder that a path names, a functional Keras model with its weights.

    Args:
      path: a run folder, a .keras file, or a PyTorch file as `moco_tf.torch_weights` takes it.
      flag: the flag that names the path, for refusals.

    Raises:
      ConfigError: the path is none of these, or cannot be read.
    """
    if not Path(path).exists():
        raise ConfigError(f"{flag}={path}: there is no such file or folder")
    if Path(path).is_dir():
        if run_folder.recorded(path) is None:
            raise ConfigError(f"{flag}={path} is a folder, but none of a run: it has no config.flags")
        return build.trained(path).backbone
    return _of_keras(path, flag) if str(path).endswith(KERAS) else _of_torch(path, flag)


def copy_by_name(source, target):
    """Copies the weights of layers of `source` to the layers of `target` with the same name and shapes.

    A ViT's positions stay as they are if sizes differ. The first convolution also takes a kernel for images with
    another number of channels; `first_convolution.of_channels` makes it fit.

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
    """Whether two layers are the first convolutions of their models, alike except for the images' channels."""
    kinds = isinstance(mine, keras.layers.Conv2D) and isinstance(its, keras.layers.Conv2D)
    if mine.name not in first_convolution.LAYERS or not kinds or its.use_bias != mine.use_bias:
        return False
    (*there, of_its, wide), (*here, of_mine, wide_here) = its.kernel.shape, mine.kernel.shape
    # A convolution that sees only a part of the channels, as in CMC, is not a convolution of images.
    of_images = [getattr(model, "input_shape", (None,))[-1] for model in (source, target)] == [of_its, of_mine]
    return of_images and of_its != of_mine and (there, wide) == (here, wide_here)


def _with_weights(model):
    """{name: layer} of the layers at any depth that have weights and are not models.

    A name that several layers have, as in CMC's two networks, stands after the names of the models that it lies in.
    """
    placed = list(_placed(model, ""))
    count = collections.Counter(layer.name for _, layer in placed)
    return {within * (count[layer.name] > 1) + layer.name: layer for within, layer in placed}


def _placed(model, within):
    """Yields (names of the models around it, layer), each layer with weights once."""
    inner = [layer for layer in model.layers if isinstance(layer, keras.Model)]
    for other in inner:
        yield from _placed(other, f"{within}{other.name}/")
    theirs = {id(layer) for other in inner for layer in layers_of(other)}
    for layer in layers_of(model):
        if layer.weights and not isinstance(layer, keras.Model) and id(layer) not in theirs:
            yield within, layer


def _shapes(layer):
    return [tuple(weight.shape) for weight in layer.weights if weight.name != POSITIONS]


def _of_keras(path, flag):
    import moco_tf  # noqa: F401 - registers its classes

    try:
        model = keras.models.load_model(path, compile=False, safe_mode=True)
    except Exception as error:  # Keras raises various errors for unreadable files
        raise ConfigError(f"{flag}={path} cannot be read: {files.first_line(error)}") from None
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
