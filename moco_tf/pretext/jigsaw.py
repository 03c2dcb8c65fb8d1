"""Jigsaw: in which order are nine tiles of an image? (Noroozi and Favaro 2016, arXiv:1603.09246).

Data: images, best of 64 pixels and more. Supervision: where tiles stand. They are cut as in `position.py`.
"""

import dataclasses

from moco_tf import command
from moco_tf.pretext import position
from moco_tf.recorded import flag

MOST = 10_000  # permutations; VISSL's most
views = position.views

UNUSED = ("dim", "temperature")


@dataclasses.dataclass(frozen=True)
class Options(position.Tiles):
    """The tiles, and the number of their orders."""

    permutations: int = flag(
        100, "P: orders in which tiles come, chosen far apart from one another. Jigsaw: 100 or 1000, VISSL: to 10000."
    )

    def check(self):
        command.require(self, 2 <= self.permutations <= MOST, "permutations", f"is from 2 to {MOST}")


def model(config, options, inputs, source):
    """The `Jigsaw` of a run."""
    from moco_tf.methods import jigsaw

    return jigsaw.model(config, options, inputs, source)
