"""Denoising: what did an image look like before noise was added? (denoising autoencoders, Vincent et al. 2008).

Data: images. Supervision: the images themselves. In evaluation the encoder sees images without noise.
"""

import dataclasses

from moco_tf import command
from moco_tf.pretext import crops, inpaint
from moco_tf.recorded import flag

views, at_once, on_device = crops.plain_views, crops.plain_at_once, crops.plain_on_device

UNUSED = ("dim", "hidden_dim", "temperature")


@dataclasses.dataclass(frozen=True)
class Options(inpaint.Decoded):
    """The noise, and how an image is cropped."""

    noise: str = flag(
        "gaussian",
        "gaussian: added to each value; masking: whole pixels become the mean. The paper: masking, and others.",
        choices=("gaussian", "masking"),
    )
    noise_level: float = flag(
        0.5, "Standard deviation of the noise, in the data's; or share of the pixels. The paper: 0.1 to 0.5."
    )

    def check(self):
        command.require(self, self.noise_level > 0, "noise_level", "is more than 0")
        if self.noise == "masking":
            command.require(self, self.noise_level < 1, "noise_level", "is a share below 1 with --noise=masking")


def model(config, options, inputs, source):
    """The `Denoise` of a run."""
    from moco_tf.methods import denoise

    return denoise.model(config, options, inputs, source)
