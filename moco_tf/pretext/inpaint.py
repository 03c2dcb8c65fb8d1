"""Inpainting: what was in the missing regions? (context encoders, Pathak et al. 2016, arXiv:1604.07379).

Data: images. Supervision: the images themselves. As for the paper's own features, regions are random, and the
adversarial loss, which makes pictures sharper, is left out.
"""

import dataclasses

from moco_tf import command
from moco_tf.command import ConfigError
from moco_tf.methods import flags
from moco_tf.pretext import crops
from moco_tf.recorded import flag

views, at_once, on_device = crops.plain_views, crops.plain_at_once, crops.plain_on_device

UNUSED = ("dim", "hidden_dim", "temperature")


@dataclasses.dataclass(frozen=True)
class Decoded(flags.BNGroups, crops.PlainCropping):
    """How an image is cropped, for a decoder that reconstructs it from a ResNet's maps."""

    def check(self):
        shrunk = 8 if self.stem == "cifar" else 32
        if self.is_vit or self.growing_sizes or self.image_size % shrunk:
            got = (
                f"--arch={self.arch}"
                if self.is_vit
                else f"--growing_sizes={self.growing_sizes} --image_size={self.image_size}"
            )
            raise ConfigError(
                f"--pretext={self.pretext} decodes the last maps of a ResNet, {shrunk} times smaller than an image of "
                f"one size, a multiple of {shrunk}; got {got}" + (": --pretext=mae is for ViTs" if self.is_vit else "")
            )


@dataclasses.dataclass(frozen=True)
class Options(Decoded):
    """The missing regions, and how an image is cropped."""

    missing: float = flag(
        0.25, "Share of an image that is missing, in regions of random shape. Context encoders: 0.25."
    )

    def check(self):
        command.require(self, 0 < self.missing < 1, "missing", "is a share, more than 0 and less than 1")


def model(config, options, inputs, source):
    """The `Inpaint` of a run."""
    from moco_tf.methods import inpaint

    return inpaint.model(config, options, inputs, source)
