"""Contrastive multiview coding: luminance and colour of one image are the two views (CMC, arXiv:1906.05849).

Data: images in colour. Supervision: that a grey picture and its colours belong together. Crops are flipped, and made
grey in no case: that would leave nothing to find.
"""

import dataclasses
import logging

from moco_tf.command import ConfigError
from moco_tf.config import flag
from moco_tf.methods import flags
from moco_tf.pretext import crops

log = logging.getLogger("moco_tf")
LOOKED_AT = 256  # images among which grey ones are counted


@dataclasses.dataclass(frozen=True)
class Options(flags.ShuffleBN, flags.Head, flags.KeyEncoder, flags.Negatives, crops.Cropping):
    """Frame and colours."""

    frame: str = flag(
        "in_batch",
        "in_batch: each modality looks for the other's of its crop among the batch's, gradients to both; learns at "
        "once. queue: MoCo's frame, keys of a second crop by momentum encoders, a queue a modality; for long runs. "
        "Queue, momentum and shuffling have an effect there only.",
        choices=flags.FRAMES,
    )
    color_space: str = flag(
        "lab", "Luminance and colour: lab, ycbcr or ydbdr. CMC: lab.", choices=("lab", "ycbcr", "ydbdr")
    )
    head: str = flag("linear", "Projection head of each modality. CMC: linear.", choices=("linear", "mlp"))
    queue_size: int = flag(16384, "K: keys in each queue, with --frame=queue. CMC: 16384.")
    augment: str = flag(
        "flip",
        "flip: crops, flipped half of the time, as in CMC. v1, v2, v3, cifar: that recipe's steps, but never grey.",
        choices=("flip", "v1", "v2", "v3", "cifar"),
    )

    def check(self):
        even = 32 if self.arch == "resnext50" else 2
        if self.is_vit or self.width % even:
            raise ConfigError(
                f"--pretext=cmc has two ResNets of half of --width, a multiple of {even}; got --arch={self.arch}, "
                f"--width={self.width}"
            )


def records(source, options):
    """The source; says how many of the first images have no colours."""
    import tensorflow as tf

    from moco_tf.data.encoded import decode

    def grey(record):
        image = record["image"]
        image = tf.cast(decode(image) if image.dtype == tf.string else image, tf.int32)
        return tf.reduce_all(image == image[..., :1])

    sample = [bool(grey(record)) for _, record in source.shuffled(0).take(LOOKED_AT)]
    if number := sum(sample):
        log.warning(
            f"  Greyscale: {number} of {len(sample)} images looked at; their colours are all the same, so that "
            "each is taken for any other"
        )
    return source


def kinds(inputs, options):
    """What the crops are, query first: an `augment.View` each."""
    from moco_tf.data import augment

    if options.augment == "flip":
        view = augment.View(crop_scale=(options.crop_min or 0.2, 1.0), steps=("flip",))
    else:
        recipe = augment.RECIPES[options.augment](inputs.image_size, crop_min=options.crop_min or None)
        steps = tuple(step for step in recipe.query.steps if step != "grayscale")
        view = dataclasses.replace(recipe.query, steps=steps)
    return (view,) * (1 if options.frame == "in_batch" else 2)


def views(record, seed, inputs, options):
    """One crop of an image, or with --frame=queue two, float32 (S, S, 3) each, normalised RGB."""
    return crops.host_part(record, seed, kinds(inputs, options), inputs, options)


def at_once(source, options):
    """What `views` does, for all records of a batch, or None."""
    return crops.pictures_of(source, 1 if options.frame == "in_batch" else 2, options)


def on_device(inputs, options):
    """What the training step does of a batch's views, or None."""
    return crops.device_part(kinds(inputs, options), inputs, options)


def backbone(config, options, inputs):
    """The backbone of a run, with fresh weights, for images of its size."""
    from moco_tf.methods import cmc

    return cmc.backbone(config, options, inputs, any_size=False)


def model(config, options, inputs, source):
    """The `CMC` of a run."""
    from moco_tf.methods import cmc

    return cmc.model(config, options, inputs, source)
