"""The encoder under a head: the network of a run with its initial weights, as a pyramid of maps."""

import dataclasses
import logging

import keras

from moco_tf import build, start_from
from moco_tf.command import ConfigError
from moco_tf.encoders.pyramid import pyramid

log = logging.getLogger("moco_tf")


def of_run(settings, dilated=False, start=True):
    """Returns the pyramid of the encoder of `settings`, and its input format.

    Args:
      dilated: as `pyramid` takes it.
      start: give the encoder the weights that --init names; else the caller loads the weights.

    Raises:
      ConfigError: this encoder has no pyramid, or --init has other weights.
    """
    config = settings.encoder_config()
    inputs = build.inputs(config)
    if config.is_vit and dilated:
        raise ConfigError(f"--head=fcn dilates a ResNet's last stage; of {config.arch} take --head=deeplab")
    if config.is_vit:  # its position embeddings belong to one image size
        config = dataclasses.replace(config, image_size=settings.image_size)
    keras.utils.set_random_seed(settings.seed)
    backbone = build.backbone(config)
    if start and settings.init == "encoder":
        _start(backbone, settings.encoder, "--encoder")
    elif start and settings.init != "random":
        _start(backbone, settings.init, "--init")
    if settings.freeze:
        for layer in backbone.layers:
            layer.trainable = False
    keras.utils.set_random_seed(settings.seed)  # draws the same head weights for every --init
    try:
        return pyramid(backbone, dilated), inputs
    except ValueError as error:
        raise ConfigError(f"--encoder={settings.encoder}: {error}") from None


def _start(backbone, path, flag):
    """Loads the weights of the encoder at a path into a backbone; refuses an encoder that lacks a layer of it."""
    taken = start_from.copy_by_name(start_from.encoder(path, flag), backbone)
    for sentence in taken.adapted:
        log.info(f"{flag}={path}: {sentence}.")
    if taken.left:
        raise ConfigError(f"{flag}={path} must have all layers of the encoder; {taken.left[0]}")
