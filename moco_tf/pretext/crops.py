"""Instance discrimination, the papers' task: the views of an image are random crops of it, each distorted anew.

Data: images. Supervision: that two views come from one image. Source: MoCo v1, v2 and v3 (arXiv:1911.05722,
2003.04297, 2104.02057); `data/augment.py` has the recipes.
"""

import dataclasses

from moco_tf import command
from moco_tf.config import flag


@dataclasses.dataclass(frozen=True)
class Options:
    """How many views there are, and how each is cropped and distorted."""

    augment: str = flag(
        "v2",
        "Recipe of the random views: v1, v2, v3 as in the papers, or cifar (the official CIFAR-10 demo).",
        choices=("v1", "v2", "v3", "cifar"),
    )
    crop_min: float = flag(
        0.0,
        "Least area of a random crop, as a share of the image; 0: the recipe's own (v1, v2: 0.2). v3: 0.2, ViTs 0.08.",
    )
    positives: int = flag(1, "P: key views of an image beside the query view, each a key of its own. v1, v2, v3: 1.")

    def check(self):
        command.require(self, self.positives >= 1, "positives", "is at least 1 key view")
        command.require(self, 0 <= self.crop_min <= 1, "crop_min", "lies between 0 and 1")


def views(record, seed, inputs, options):
    """(query view, P key views) of an image, float32 (S, S, 3) each, normalised.

    record: a dict with "image", encoded bytes or uint8; seed: int64 (2,); inputs: the encoder's `Preprocessing`.
    """
    from moco_tf.data import augment

    recipe = augment.RECIPES[options.augment](inputs.image_size, crop_min=options.crop_min or None)
    kinds = (recipe.query, *[recipe.key] * options.positives)
    return tuple(augment.random_views(record, seed, kinds, inputs))
