"""Contrastive predictive coding: what patch comes further down in the image? (CPC, arXiv:1807.03748, 1905.09272).

Data: images, best of 64 pixels and more. Supervision: where a patch stands. An image is cropped, flipped half of the
time, and cut into overlapping patches. Each patch keeps one of its three channels, and is flipped, independently of
the others (CPC v2), so that no low-level trace continues from one patch to the next.
"""

import dataclasses

from moco_tf import command
from moco_tf.command import ConfigError
from moco_tf.methods import flags
from moco_tf.pretext import crops
from moco_tf.recorded import flag


@dataclasses.dataclass(frozen=True)
class Options(flags.OfFrames, flags.KeyEncoder, flags.Negatives, crops.Decoding):
    """The grid, the predicted patches, and the frame."""

    FRAMES_OF = flags.OfFrames.FRAMES_OF | {"temperature": ("queue",)}

    grid: int = flag(
        7,
        "G: patches along each side of an image, overlapping by half: a patch has 2 S / (G + 1) pixels. CPC: 7.",
    )
    ahead: tuple[int, ...] = flag(
        (),
        "How many rows further down the predicted patches are, comma-separated; not 1, whose pixels are seen already. "
        "'': all from 2 on. Greedy InfoMax: 2,3,4,5,6, CPC v2: 3.",
    )
    directions: int = flag(1, "1: patches are predicted from above. 4: from all sides. CPC: 1, CPC v2: 4.")
    crop_min: float = flag(0.0, "Least area of the random crop, as a share of the image; 0: 0.2.")
    frame: str = flag(
        "in_batch",
        "in_batch: CPC's, a prediction looks for its patch among all of the batch's, gradients to both. queue: this "
        "package's own, after MoCo: keys by a momentum encoder, and a queue of them beside the batch's. Queue, "
        "momentum and temperature have an effect there only.",
        choices=flags.FRAMES,
    )
    queue_size: int = flag(16384, "K: patches' keys in the queue, with --frame=queue.")
    dim: int = flag(64, "C: length of what is predicted, and of a patch's target. CPC v2: 64.")
    temperature: float = flag(0.07, "T, with --frame=queue; the batch's frame has none.")

    @property
    def rows_ahead(self):
        """The rows ahead that are predicted."""
        return self.ahead or tuple(range(2, self.grid))

    def check(self):
        crops.require_colors(self)
        command.require(self, self.grid >= 3, "grid", "is at least 3")
        command.require(self, 0 <= self.crop_min <= 1, "crop_min", "lies between 0 and 1")
        command.require(self, self.directions in (1, 4), "directions", "is 1 or 4")
        if not all(2 <= rows < self.grid for rows in self.ahead) or len(set(self.ahead)) < len(self.ahead):
            raise ConfigError(
                f"--ahead counts rows from 2, which no longer overlap, to {self.grid - 1} in a grid of {self.grid}, "
                f"each once; got {','.join(map(str, self.ahead))}"
            )
        if self.image_size % (self.grid + 1):
            raise ConfigError(
                f"--pretext=cpc cuts an image into {self.grid} x {self.grid} patches that overlap by half: "
                f"--image_size is a multiple of {self.grid + 1}; got {self.image_size}: take "
                f"{max(1, round(self.image_size / (self.grid + 1))) * (self.grid + 1)}, or another --grid"
            )
        if self.is_vit or self.growing_sizes:
            raise ConfigError(
                "--pretext=cpc encodes patches of one size by a ResNet; got "
                + (f"--arch={self.arch}" if self.is_vit else f"--growing_sizes={self.growing_sizes}")
            )


def views(record, seed, inputs, options):
    """One view of an image: its patches side by side, float32 (G P, G P, 3), normalised, each in one colour."""
    import tensorflow as tf

    from moco_tf.data import augment
    from moco_tf.encoders import patch_grid

    crop = augment.random_views(record, seed, (crops.flipped(options),), inputs, options.decode)[0]
    # The crop draws from `seed` itself.
    drawn = tf.random.stateless_uniform(
        (2, options.grid, options.grid), seed + tf.constant([0, 2**62], seed.dtype), alg="philox"
    )
    return (patch_grid.side_by_side(augmented(patch_grid.cut(crop, options.grid), drawn)),)


def augmented(patches, drawn):
    """Puts one channel of each patch (G, G, P, P, 3) in place of all three, and flips the patch half of the time.

    drawn: (2, G, G) in [0, 1).
    """
    import tensorflow as tf

    channel = tf.cast(3 * drawn[0], tf.int32)[..., tf.newaxis]  # G x G x 1
    grey = tf.gather(patches, channel, axis=-1, batch_dims=2)  # G x G x P x P x 1
    grey = tf.where(drawn[1][..., tf.newaxis, tf.newaxis, tf.newaxis] < 0.5, tf.reverse(grey, [3]), grey)
    return tf.repeat(grey, 3, axis=-1)


def backbone(config, options, inputs):
    """The backbone of a run, with fresh weights."""
    from moco_tf.methods import cpc

    return cpc.backbone(config, options, inputs)


def model(config, options, inputs, source):
    """The `CPC` of a run."""
    from moco_tf.methods import cpc

    return cpc.model(config, options, inputs, source)
