"""MoCo v3 and MAE at once: two views look for each other; each predicts its hidden patches from its visible ones.

Data: images. Supervision: that two views come from one image, and their own pixels. Source: this package's own mix of
CAN (arXiv:2210.16870) and CMAE (arXiv:2207.13532) in the frame of MoCo v3; `methods/mae_moco.py` lists its steps.
"""

import dataclasses

from moco_tf import command
from moco_tf.methods import flags
from moco_tf.pretext import crops, mae
from moco_tf.recorded import flag

picture = mae.picture


@dataclasses.dataclass(frozen=True)
class Options(mae.Masking, flags.KeyEncoder):
    """How both views of an image are cropped and distorted, and how much of the loss is MAE's."""

    augment: str = flag(
        "v3",
        "Recipe of the two random views. v3: MoCo v3's; flip: crops that are flipped half of the time, as MAE has "
        "them; or v1, v2, cifar.",
        choices=("flip", "v1", "v2", "v3", "cifar"),
    )
    mask_ratio: float = flag(
        0.5, "Share of the patches that are hidden from queries, each view's drawn anew. CAN: 0.5, CMAE: 0.75."
    )
    decoder_depth: int = flag(1, "Blocks of the decoder, which is for training alone. CAN, CMAE: 8.")
    reconstruction_weight: float = flag(
        1.0,
        "Lambda: the loss is MoCo v3's + lambda x MAE's. 0: MoCo v3 with --token_dropout; the larger, the nearer to "
        "MAE. CMAE: 1.",
    )

    def check(self):
        command.require(self, self.reconstruction_weight >= 0, "reconstruction_weight", "is 0 or more")


def kinds(inputs, options):
    """Returns an `augment.View` for each of the two views."""
    recipe = crops.recipe(inputs, options)
    return (recipe.query, recipe.key)


def views(record, seed, inputs, options):
    """Two crops of an image, float32 (S, S, 3) each, normalised."""
    return crops.host_part(record, seed, kinds(inputs, options), inputs, options)


def at_once(source, options):
    """Returns a function that does the work of `views` for all records of a batch, or None."""
    return crops.pictures_of(source, 2, options)


def on_device(inputs, options):
    """Returns the training step's part of making a batch's views, a function, or None."""
    return crops.device_part(kinds(inputs, options), inputs, options)


def model(config, options, inputs, source):
    """The `MAEMoCo` of a run."""
    from moco_tf.methods import mae_moco

    return mae_moco.model(config, options, inputs, source)
