"""Masked autoencoder: predict the hidden patches of an image from the visible ones (MAE, arXiv:2111.06377).

Data: images. Supervision: their own pixels. The view is one crop of an image, flipped half of the time and not
distorted otherwise. A ViT sees a quarter of its patches.
"""

import dataclasses

from moco_tf import command
from moco_tf.command import ConfigError
from moco_tf.methods.flags import VITS
from moco_tf.pretext import crops
from moco_tf.recorded import flag

UNUSED = ("dim", "hidden_dim", "temperature", "growing_sizes")
GREY = 128.0  # of hidden patches in a picture

views, at_once, on_device = crops.plain_views, crops.plain_at_once, crops.plain_on_device


@dataclasses.dataclass(frozen=True)
class Masking(crops.Cropping):
    """Which patches are hidden, and the decoder that predicts them."""

    arch: str = flag("vit_small", "A ViT, whose patches can be hidden. MAE: vit_base and larger.")
    patch_size: int = flag(16, "Side of the patches, in pixels; --image_size is a multiple of it. MAE: 16.")
    freeze_patch: bool = flag(
        False,
        "Leave the ViT's patch projection as it was drawn; pixels are predicted better when it learns. MAE: off.",
    )
    mask_ratio: float = flag(0.75, "Share of the patches that are hidden, drawn anew for each image. MAE: 0.75.")
    decoder_depth: int = flag(2, "Blocks of the decoder, which is for training alone. MAE: 8.")
    decoder_width: int = flag(128, "Width of the decoder, a multiple of 32, which each of its heads has. MAE: 512.")
    norm_targets: bool = flag(
        True, "Bring the pixels of each patch that is to be predicted to mean 0 and variance 1. MAE: on in its best."
    )

    def check(self):
        if self.arch not in VITS:  # no choices of the flag, which would refuse a recipe's --arch that is overridden
            raise ConfigError(
                f"--pretext={self.pretext} hides patches, which a ViT has; got --arch={self.arch}: take "
                f"--arch={', '.join(VITS)}"
            )
        command.require(self, 0 < self.mask_ratio < 1, "mask_ratio", "is a share, more than 0 and less than 1")
        patches = (self.image_size // self.patch_size) ** 2
        if max(1, round((1 - self.mask_ratio) * patches)) == patches:
            raise ConfigError(
                f"--mask_ratio hides at least one of an image's {patches} patches and leaves one; got "
                f"{self.mask_ratio:g}: take a smaller --patch_size than {self.patch_size}, or another ratio"
            )
        if self.norm_targets and self.patch_size**2 * self.channels < 2:
            raise ConfigError(
                "--norm_targets divides by the deviation within a patch, which one number does not have; got "
                f"--patch_size={self.patch_size}: take larger patches, or --nonorm_targets"
            )
        command.require(self, self.decoder_depth >= 0, "decoder_depth", "is 0 or more")
        holds = self.decoder_width > 0 and self.decoder_width % 32 == 0
        command.require(self, holds, "decoder_width", "is a multiple of 32")


@dataclasses.dataclass(frozen=True)
class Options(crops.PlainCropping, Masking):
    """How the one view of an image is cropped."""


def picture(views, inputs, options):
    """Returns the views as a picture: each crop, and below it what the encoder sees at step 0 with --seed=0."""
    from moco_tf.data.inputs.image import sheet

    rows = []
    for place, view in enumerate(views):
        images = inputs.shown(inputs.denormalize(view))
        rows += [images, hidden_in_grey(images, options, seed=(0, place))]
    return sheet(rows)


def hidden_in_grey(images, options, seed):
    """Makes the hidden patches of images (N, S, S, 3) of 0..255 grey."""
    import tensorflow as tf

    from moco_tf.encoders import decoders, vit
    from moco_tf.methods import some_patches

    size = options.patch_size
    side = images.shape[1] // size
    kept = some_patches.number_kept(side**2, 1 - options.mask_ratio)
    _, hidden = decoders.places(vit.patches_kept(images.shape[0], side**2, kept, seed), side**2)  # N x L
    hidden = tf.repeat(tf.repeat(tf.reshape(hidden, (-1, side, side, 1)), size, axis=1), size, axis=2)
    return tf.where(hidden, GREY, images)


def model(config, options, inputs, source):
    """The `MAE` of a run."""
    from moco_tf.methods import mae

    return mae.model(config, options, inputs, source)
