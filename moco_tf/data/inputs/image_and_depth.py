"""What an encoder of images with depth maps expects: a fourth channel beside red, green and blue."""

import dataclasses
import typing

import tensorflow as tf

from moco_tf.data import pairs
from moco_tf.data.inputs.image import IMAGENET, Preprocessing, sheet


@dataclasses.dataclass(frozen=True)
class ImageAndDepth(Preprocessing):
    """`Preprocessing` of images with four channels of 0..255; the last channel is depth."""

    channels_of_files: typing.ClassVar = 3  # depth has a file of its own

    mean: tuple = (*IMAGENET.mean, 0.5)
    std: tuple = (*IMAGENET.std, 0.25)
    depth_max: float = 0.0  # what 255 stands for, in the units of the files; 0: the largest value that they can hold

    def records_of(self, source):
        """The `Pairs` of a folder's images; raises as `pairs.of_images` does."""
        return pairs.of_images(source, self.depth_max)

    def shown(self, images):
        """Images (..., 4) without their depth, (..., 3)."""
        return images[..., :3]

    def picture(self, views):
        """Returns the `sheet` of views, (N, S, S, 4) each: a row in colour for each view, and below it its depth."""
        shown = [self.denormalize(view) for view in views]
        return sheet([row for view in shown for row in (view[..., :3], tf.repeat(view[..., 3:], 3, axis=-1))])
