"""Contrastive multiview coding: luminance and colour of one image are the two views (CMC, arXiv:1906.05849).

Data: images in colour; or images with depth maps, which then are the two views. Supervision: that a grey picture and
its colours belong together. Crops are flipped, and never made grey: a grey crop leaves nothing to find.
"""

import dataclasses

from moco_tf import command
from moco_tf.command import ConfigError
from moco_tf.methods import flags
from moco_tf.pretext import crops
from moco_tf.recorded import flag

SHOWN_LUMINANCE = 65.0  # out of 100, for the colours in a picture


@dataclasses.dataclass(frozen=True)
class Options(
    flags.OfFrames, flags.ShuffleBN, flags.Head, flags.KeyEncoder, flags.Negatives, flags.Bank, crops.Cropping
):
    """Frame and modalities."""

    FRAMES_OF = flags.OfFrames.FRAMES_OF | {
        "shuffle_bn": ("queue",),
        "queue_size": ("queue", "memory_bank"),
        "bank_momentum": ("memory_bank",),
        "loss": ("memory_bank",),
    }

    modalities: str = flag(
        "luminance,color",
        "What the two encoders see. luminance,color: those of an image, as in CMC. rgb,depth: an image name.jpg and "
        "its depth map, a PNG name.depth.png beside it.",
        choices=("luminance,color", "rgb,depth"),
    )
    depth_max: float = flag(
        0.0,
        "Depth that counts as farthest, in the units of the depth maps: 10000 for millimetres up to ten metres. 0: "
        "the largest number that the files' 8 or 16 bits can say.",
    )
    frame: str = flag(
        "in_batch",
        "in_batch: each modality looks for the other's of its crop among the batch's, gradients to both; learns at "
        "once. memory_bank: CMC's, among those kept of other images, a bank a modality. queue: MoCo's, keys of a "
        "second crop by momentum encoders, a queue a modality; both for long runs. Momentum and shuffling have an "
        "effect with queue alone, --bank_momentum and --loss with memory_bank, K with both.",
        choices=flags.FRAMES_OF_CMC,
    )
    color_space: str = flag(
        "lab", "Luminance and colour: lab, ycbcr or ydbdr. CMC: lab.", choices=("lab", "ycbcr", "ydbdr")
    )
    head: str = flag("linear", "Projection head of each modality. CMC: linear.", choices=("linear", "mlp"))
    queue_size: int = flag(16384, "K: keys in each queue, or drawn from each bank, as negatives. CMC: 16384.")
    augment: str = flag(
        "flip",
        "flip: crops, flipped half of the time, as in CMC. v1, v2, v3, cifar: that recipe's steps, but never grey.",
        choices=("flip", "v1", "v2", "v3", "cifar"),
    )

    def check(self):
        crops.require_colors(self)
        even = 32 if self.arch == "resnext50" else 2
        if self.is_vit or self.width % even:
            raise ConfigError(
                f"--pretext=cmc has two ResNets of half of --width, a multiple of {even}; got --arch={self.arch}, "
                f"--width={self.width}"
            )
        command.require(self, self.depth_max >= 0, "depth_max", "is 0 or more")
        if self.modalities == "rgb,depth":
            if self.augment != "flip" or self.views_on != "host":
                raise ConfigError(
                    "--modalities=rgb,depth crops and flips image and depth alike, on the host; got "
                    f"--augment={self.augment} --views_on={self.views_on}: leave both out"
                )
        elif self.depth_max:
            raise ConfigError(
                f"--depth_max={self.depth_max:g} is of depth maps; got --modalities={self.modalities}: leave it out, "
                "or take --modalities=rgb,depth"
            )
        if self.loss != "infonce" and self.frame != "memory_bank":
            raise ConfigError(
                f"--loss={self.loss} is of keys drawn from a memory bank; got --frame={self.frame}: take "
                "--frame=memory_bank, or --loss=infonce"
            )
        if self.xla == "on" and self.frame == "memory_bank" and self.loss == "infonce":
            raise ConfigError("XLA has no way to draw a memory bank's negatives: --xla is auto or off; got on")

    def bank_bytes(self, size):
        """Returns the number of bytes that both memory banks of `size` images take in each replica."""
        return 2 * super().bank_bytes(size)


def inputs(config, options):
    """Returns what the encoder expects: images with depth; None: images, as in other tasks."""
    from moco_tf.data.inputs.image_and_depth import ImageAndDepth

    if options.modalities != "rgb,depth":
        return None
    return ImageAndDepth(image_size=config.image_size, depth_max=options.depth_max)


def records(source, options):
    """Returns the source; logs how many of the first images have no colours."""
    return source if options.modalities == "rgb,depth" else crops.with_colors(source)


def kinds(inputs, options):
    """Returns an `augment.View` for each crop, query first."""
    return (crops.plain_kind(inputs, options, leave_out=("grayscale",)),) * number_of_crops(options)


def number_of_crops(options):
    """Returns the number of crops of an image in a step; the second crop is for keys by momentum encoders."""
    return 2 if options.frame == "queue" else 1


def views(record, seed, inputs, options):
    """One crop of an image, or with --frame=queue two, float32 (S, S, 3) each, normalised RGB."""
    return crops.host_part(record, seed, kinds(inputs, options), inputs, options)


def at_once(source, options):
    """Returns a function that does the work of `views` for all records of a batch, or None."""
    return crops.pictures_of(source, number_of_crops(options), options)


def on_device(inputs, options):
    """Returns the training step's part of making a batch's views, a function, or None."""
    return crops.device_part(kinds(inputs, options), inputs, options)


def picture(views, inputs, options):
    """Returns the views as a picture: each crop, and below it its two modalities, with all colours equally light."""
    import tensorflow as tf

    from moco_tf.data.inputs.image import sheet
    from moco_tf.encoders import color_spaces

    if options.modalities == "rgb,depth":
        return inputs.picture(views)
    rows = []
    for view in views:
        crops = tf.clip_by_value(inputs.denormalize(view), 0.0, 255.0)
        luminance, *color = tf.unstack(color_spaces.lab(crops / 255), axis=-1)
        grey = tf.stack([luminance, *[tf.zeros_like(luminance)] * 2], axis=-1)
        colors = tf.stack([tf.fill(tf.shape(luminance), SHOWN_LUMINANCE), *color], axis=-1)
        rows += [crops, *(255 * color_spaces.of_lab(part) for part in (grey, colors))]
    return sheet(rows)


def backbone(config, options, inputs):
    """The backbone of a run, with fresh weights, for images of its size."""
    from moco_tf.methods import cmc

    return cmc.backbone(config, options, inputs, any_size=False)


def model(config, options, inputs, source):
    """The `CMC` of a run."""
    from moco_tf.methods import cmc

    return cmc.model(config, options, inputs, source)
