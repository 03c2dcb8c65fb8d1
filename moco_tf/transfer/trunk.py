"""The encoder under a head: the network of a run, its weights as they are to start, as a pyramid of maps."""

import dataclasses

import keras

from moco_tf import build
from moco_tf.command import ConfigError
from moco_tf.encoders.pyramid import pyramid


def trunk(settings, dilated=False, start=True):
    """The pyramid of the encoder of `settings`, and how images become its input.

    Args:
      dilated: as `pyramid` takes it.
      start: give it the weights that --init says; else they are the caller's to bring.

    Raises:
      ConfigError: there is no pyramid of this encoder, or --init has other weights.
    """
    config = settings.encoder_config()
    inputs = build.inputs(config)
    if config.is_vit:  # its positions are those of one size
        config = dataclasses.replace(config, image_size=settings.image_size)
    keras.utils.set_random_seed(settings.seed)
    backbone = build.backbone(config)
    if start and settings.init == "encoder":
        copy_by_name(build.trained(settings.encoder).backbone, backbone, f"--encoder={settings.encoder}")
    elif start and settings.init != "random":
        copy_by_name(_loaded(settings.init), backbone, f"--init={settings.init}")
    if settings.freeze:
        for layer in backbone.layers:
            layer.trainable = False
    try:
        return pyramid(backbone, dilated), inputs
    except ValueError as error:
        raise ConfigError(f"--encoder={settings.encoder}: {error}") from None


def copy_by_name(source, target, name):
    """Gives each layer of a model the weights of the layer of its name in another.

    A ViT's positions stay as they are: they are a function of the size.

    Raises:
      ConfigError: the other has no such layer, or one of another shape; it begins with `name`.
    """
    known = {layer.name: layer for layer in source.layers}
    for layer in target.layers:
        if not layer.weights:
            continue
        there = known[layer.name].weights if layer.name in known else []
        shapes = [tuple(weight.shape) for weight in layer.weights]
        if layer.name == "tokens" and there:
            there = [a if a.name != "pos_embed" else b for a, b in zip(there, layer.weights, strict=True)]
        if [tuple(weight.shape) for weight in there] != shapes:
            found = f"{[tuple(weight.shape) for weight in there]}" if there else "none of that name"
            raise ConfigError(f"{name} has the layers of the encoder; {layer.name} is {shapes} there; got {found}")
        for mine, other in zip(layer.weights, there, strict=True):
            mine.assign(other)


def _loaded(file):
    import moco_tf  # noqa: F401 - its classes

    try:
        model = keras.models.load_model(file, compile=False)
    except Exception as error:  # whatever Keras says of files that it cannot read
        raise ConfigError(f"--init={file} cannot be read: {str(error).strip().splitlines()[0]}") from None
    return getattr(model, "backbone", model)
