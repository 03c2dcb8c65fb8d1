"""Instance discrimination by combined patches: queries are pairs of a view's quarters, keys are whole views.

Data: images. Supervision: that parts and a whole come from one image. Source: Fast-MoCo (arXiv:2207.08220), which
learns as much in fewer epochs, since one pass over a view gives six queries. Views are those of `crops`.
"""

import dataclasses

from moco_tf.command import ConfigError
from moco_tf.methods.flags import MoCo
from moco_tf.pretext import crops

views, at_once, on_device = crops.views, crops.at_once, crops.on_device


@dataclasses.dataclass(frozen=True)
class Options(MoCo, crops.Options):
    """The views, and the flags of MoCo, which learns from their parts."""

    def check(self):
        if self.is_vit or self.small_views:
            raise ConfigError(
                "--pretext=patches encodes quarters of a view by a ResNet, and nothing smaller; got "
                f"--arch={self.arch}, --small_views={self.small_views}"
            )
        if odd := [size for size in (*self.growing_sizes, self.image_size) if size % 2]:
            raise ConfigError(
                "--pretext=patches halves the sides of a view: --image_size and --growing_sizes are even; got "
                f"{odd[0]}"
            )


def model(config, options, inputs, source):
    """The `CombinedPatches` of a run."""
    from moco_tf.methods import combined_patches

    return combined_patches.model(config, options, inputs, source)
