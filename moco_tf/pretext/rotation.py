"""Rotation: by which quarter turn was an image turned? (Gidaris et al. 2018, arXiv:1803.07728).

Data: images that have an upper side. Supervision: which side is the upper one. A crop is square and turned exactly, so
that neither borders nor interpolation reveal the turn. (Of wide pictures, more crops are squeezed sideways: a weak
sign of their sides.)
"""

import dataclasses

from moco_tf.methods import flags
from moco_tf.pretext import crops

views, at_once, on_device = crops.plain_views, crops.plain_at_once, crops.plain_on_device

UNUSED = ("dim", "hidden_dim", "temperature")


@dataclasses.dataclass(frozen=True)
class Options(flags.BNGroups, crops.PlainCropping):
    """How the crop that is turned is made."""


def model(config, options, inputs, source):
    """The `Rotation` of a run."""
    from moco_tf.methods import rotation

    return rotation.model(config, options, inputs, source)
