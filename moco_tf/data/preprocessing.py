"""What an encoder expects of its images: size, crop, mean and standard deviation, in one object.

The model carries it; views, evaluation and export read it, nothing repeats its numbers.
"""

import dataclasses

import numpy as np
import tensorflow as tf

from moco_tf.data.arrays import of_eight_bits, rgb
from moco_tf.data.encoded import decode_safely
from moco_tf.data.resize import resize, sizes


@dataclasses.dataclass(frozen=True)
class Preprocessing:
    """From 0-255 images to an encoder's input. `mean` and `std` are of red, green and blue in 0..1."""

    image_size: int = 224
    crop_ratio: float = 0.875
    mean: tuple = (0.485, 0.456, 0.406)
    std: tuple = (0.229, 0.224, 0.225)

    def __post_init__(self):
        for name in ("mean", "std"):  # JSON makes lists of them
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if self.image_size < 1:
            raise ValueError(f"image_size must be at least 1 pixel, not {self.image_size}.")
        if not 0 < self.crop_ratio <= 1:
            raise ValueError(
                f"crop_ratio is the part of the resized image that is kept: more than 0, at most 1, "
                f"not {self.crop_ratio}."
            )

    @tf.autograph.experimental.do_not_convert  # tracing takes half as long
    def __call__(self, images):
        """(N, H, W, 3) or grey (N, H, W, 1) of 0..255, any H and W -> normalised float32 (N, S, S, 3).

        The shorter side is resized to S / crop_ratio, then the centre is cut: torchvision's Resize and
        CenterCrop, to the pixel.
        """
        images = rgb(of_eight_bits(tf.convert_to_tensor(images)))
        height, width = sizes(images)[-3:-1]
        shorter = round(self.image_size / self.crop_ratio)
        resized = (_at_least(shorter, shorter * height // width), _at_least(shorter, shorter * width // height))
        offset = [_half(length - self.image_size) for length in resized]
        return self.normalize(resize(images, resized, (self.image_size, self.image_size), offset))

    @tf.autograph.experimental.do_not_convert
    def of_encoded(self, encoded):
        """An encoded image, scalar string -> normalised float32 (S, S, 3); an error where it cannot be decoded."""
        size, image = self.image_size, decode_safely(encoded)
        if round(size / self.crop_ratio) != size:
            return self(image[tf.newaxis])[0]
        # An image that has the size already needs no matrices: the same bits in less than half of the time.
        fits = tf.reduce_all(tf.shape(image)[:2] == size)
        view = tf.cond(fits, lambda: self.normalize(image), lambda: self(image[tf.newaxis])[0])
        return tf.ensure_shape(view, (size, size, 3))  # in a branch, TensorFlow runs it in any case

    def normalize(self, images):
        """0-255 of any type -> float32 of about zero mean and unit variance."""
        scale = 1 / (255 * np.array(self.std, np.float32))
        shift = np.array(self.mean, np.float32) / np.array(self.std, np.float32)
        images = tf.cast(images, tf.float32)
        width = images.shape[-2]
        if width is None:
            return images * scale - shift
        lines = tf.reshape(images, [*sizes(images)[:-2], 3 * width])  # a long last axis is what vectorises
        return tf.reshape(lines * np.tile(scale, width) - np.tile(shift, width), tf.shape(images))

    def denormalize(self, images):
        """The way back to 0-255, float32, neither rounded nor clipped."""
        return (tf.cast(images, tf.float32) * np.float32(self.std) + np.float32(self.mean)) * 255


IMAGENET = Preprocessing()
CIFAR10 = Preprocessing(image_size=32, crop_ratio=1.0, mean=(0.4914, 0.4822, 0.4465), std=(0.2023, 0.1994, 0.2010))


def _at_least(low, value):
    return max(low, value) if isinstance(value, int) else tf.maximum(low, value)


def _half(number):
    """Half of a non-negative integer; halves round to the even one, as Python's (and so torchvision's) do."""
    half = number // 2
    return half + (half % 2) * (number % 2)
