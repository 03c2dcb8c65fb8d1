"""Colorization: which colours does a grey picture have? (Zhang, Isola and Efros 2016, arXiv:1603.08511).

Data: images in colour. Supervision: their colours, as classes in Lab's plane of a and b. Crops are flipped, and
never made grey. The encoder takes colour images, and drops their colours itself.
"""

import dataclasses
import functools

from moco_tf import command
from moco_tf.pretext import crops, inpaint
from moco_tf.recorded import flag

views = functools.partial(crops.plain_views, leave_out=("grayscale",))
at_once = crops.plain_at_once
on_device = functools.partial(crops.plain_on_device, leave_out=("grayscale",))
UNUSED = ("dim", "hidden_dim", "temperature")


@dataclasses.dataclass(frozen=True)
class Options(inpaint.Decoded):
    """How classes are balanced, and how an image is cropped."""

    rebalance: float = flag(
        0.5,
        "How little a colour's frequency counts: a pixel weighs 1 / ((1 - this) p + this / Q), p the share of its "
        "class and Q their number. 1: all alike. Colorization: 0.5.",
    )

    def check(self):
        crops.require_colors(self)
        command.require(self, 0 < self.rebalance <= 1, "rebalance", "is more than 0 and at most 1")


def records(source, options):
    """Returns the source; logs how many of the first images have no colours."""
    return crops.with_colors(source)


def backbone(config, options, inputs):
    """The backbone of a run, with fresh weights."""
    from moco_tf.methods import colorize

    return colorize.backbone(config, options, inputs)


def model(config, options, inputs, source):
    """The `Colorize` of a run."""
    from moco_tf.methods import colorize

    return colorize.model(config, options, inputs, source)
