"""Relative position: where does a patch stand beside another one? (Doersch et al. 2015, arXiv:1505.05192).

Data: images, best of 64 pixels and more. Supervision: where a patch stands. A crop is cut into 3 x 3 tiles as in
"Revisiting Self-Supervised Visual Representation Learning" (arXiv:1901.09005). Each tile has a random place in its
cell, so that neighbours do not touch, and is standardised by itself. Two thirds of the images are grey, because colour
fringes show how far a tile is from the lens's centre.
"""

import dataclasses

from moco_tf import command
from moco_tf.command import ConfigError
from moco_tf.methods import flags
from moco_tf.pretext import crops
from moco_tf.recorded import flag

GREY_SHARE = 0.66  # of arXiv:1901.09005
SMALLEST = 4  # pixels of a tile's side

UNUSED = ("dim", "temperature")


@dataclasses.dataclass(frozen=True)
class Tiles(flags.BNGroups, crops.Decoding):
    """How an image is cut into 3 x 3 tiles."""

    tile_size: int = flag(
        0,
        "Side of a tile in pixels; 0: three quarters of a third of --image_size, or less, so that it has a pixel of "
        "room. arXiv 1901.09005: 64 of 255.",
    )
    gap: int = flag(
        2,
        "Least distance of neighbouring tiles in pixels, even; their places vary as far as that allows. Position: "
        "half a tile, 48 of 96; jigsaw: none.",
    )
    grey_share: float = flag(GREY_SHARE, "Share of the images whose colours are taken away. arXiv 1901.09005: 0.66.")
    crop_min: float = flag(0.0, "Least area of the random crop, as a share of the image; 0: 0.2.")

    def tile(self, image_size):
        """Side of a tile, in pixels."""
        cell = image_size // flags.TILES
        return self.tile_size or min(3 * cell // 4, cell - self.gap - 1)

    def check(self):
        command.require(self, 0 <= self.crop_min <= 1, "crop_min", "lies between 0 and 1")
        command.require(self, 0 <= self.grey_share <= 1, "grey_share", "is a share, from 0 to 1")
        command.require(self, self.gap >= 0 and self.gap % 2 == 0, "gap", "is an even number of pixels from 0 up")
        command.require(self, self.tile_size >= 0, "tile_size", "is 0 or more pixels")
        cell, tile = self.image_size // flags.TILES, self.tile(self.image_size)
        most = cell - self.gap - 1  # leaves a tile two places
        if not SMALLEST <= tile <= most:
            raise ConfigError(
                f"an image of {self.image_size} pixels has cells of {cell}, in which tiles of {SMALLEST} to {most} "
                f"pixels lie at random places, {self.gap} apart (--gap); got {tile}: take a larger --image_size, or "
                "another --tile_size"
            )
        if self.is_vit or self.growing_sizes:
            raise ConfigError(
                f"--pretext={self.pretext} encodes tiles, and later whole images, by one ResNet; got "
                + (f"--arch={self.arch}" if self.is_vit else f"--growing_sizes={self.growing_sizes}")
            )


@dataclasses.dataclass(frozen=True)
class Options(Tiles):
    """The tiles; each question is about the middle tile and one other."""


def views(record, seed, inputs, options):
    """One view of an image: its tiles side by side, float32 (3 s, 3 s, 3), each of zero mean and unit variance."""
    import tensorflow as tf

    from moco_tf.data import augment
    from moco_tf.encoders import patch_grid

    view = dataclasses.replace(
        crops.flipped(options), steps=("grayscale", "flip"), grayscale_probability=options.grey_share
    )
    crop = augment.random_views(record, seed, (view,), inputs, options.decode)[0]
    # The crop draws from `seed` itself.
    drawn = tf.random.stateless_uniform(
        (2, flags.TILES, flags.TILES), seed + tf.constant([0, 2**62], seed.dtype), alg="philox"
    )
    return (patch_grid.side_by_side(standardized(cut(crop, drawn, options.tile(inputs.image_size), options.gap))),)


def cut(image, drawn, side, gap):
    """Cuts tiles (3, 3, side, side, C) from an image (S, S, C), each at a random place in its cell, S // 3 wide.

    drawn: (2, 3, 3) in [0, 1): how far down and to the right. Tiles stay gap / 2 away from the ends of their cells.
    """
    import tensorflow as tf

    cell = image.shape[0] // flags.TILES
    room = cell - side - gap
    offsets = gap // 2 + tf.cast(drawn * (room + 1), tf.int32)  # 2 x 3 x 3
    tiles = []
    for row in range(flags.TILES):
        for column in range(flags.TILES):
            begin = (cell * row + offsets[0, row, column], cell * column + offsets[1, row, column], 0)
            tiles.append(tf.slice(image, begin, (side, side, image.shape[-1])))
    return tf.reshape(tf.stack(tiles), (flags.TILES, flags.TILES, side, side, image.shape[-1]))


def standardized(tiles):
    """Scales each tile (..., s, s, C) to zero mean and unit variance over its pixels, channel by channel."""
    import tensorflow as tf

    mean, variance = tf.nn.moments(tiles, axes=[-3, -2], keepdims=True)
    return (tiles - mean) / tf.maximum(tf.sqrt(variance), 1e-2)  # a uniform tile stays uniform


def model(config, options, inputs, source):
    """The `Position` of a run."""
    from moco_tf.methods import position

    return position.model(config, options, inputs, source)
