"""Encoders: images -> features, as functional Keras models."""

from moco_tf.encoders import heads, resnet, vit
from moco_tf.encoders.batch_norm import BatchNorm
from moco_tf.encoders.pyramid import pyramid

__all__ = ["BatchNorm", "heads", "of_config", "pyramid", "resnet", "vit"]


def of_config(config, zero_init_residual=False, any_size=None, **more):
    """The backbone that a run's flags describe, a functional model with fresh weights.

    any_size: whether a ResNet takes images of any size, not only of the run's size. None: it does if the run's views
      have several sizes.
    more: `resnet.resnet`'s keywords that differ from the run's, for a ResNet.
    """
    if config.is_vit:
        return getattr(vit, config.arch)(
            image_size=config.image_size,
            patch_size=config.patch_size,
            freeze_patch=config.freeze_patch,
            channels=config.channels,
        )
    any_size = config.several_sizes if any_size is None else any_size
    settings = {
        "image_size": None if any_size else config.image_size,
        "width": config.width,
        "stem": config.stem,
        "channels": config.channels,
        "zero_init_residual": zero_init_residual,
    }
    return getattr(resnet, config.arch)(**settings | more)
