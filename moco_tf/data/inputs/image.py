"""What an encoder of images expects: size, crop, mean and standard deviation, in one object.

The model carries this object. Views, evaluation and export read it, and nothing repeats its numbers. It says how a
record becomes the encoder's input, which signatures a server gets, and how inputs are shown as a picture.
"""

import dataclasses
import typing
from collections.abc import Callable

import numpy as np
import tensorflow as tf

from moco_tf.data import arrays, encoded_batch
from moco_tf.data.encoded import decode_safely, luma
from moco_tf.data.encoded_batch import REQUEST_MEGAPIXELS
from moco_tf.data.folder import OF_IMAGES
from moco_tf.data.resize import resize, sizes


class Signature(typing.NamedTuple):
    """One way to ask a server."""

    # A batch -> the encoder's input (N, ...), and bool (N,), which of the batch can be decoded; None: all.
    of_batch: Callable
    argument: tf.TensorSpec
    example: list | np.ndarray  # a batch, which warms a server up
    about: str  # the argument, in words


PLAIN_SIZE = 32  # of images whose pixels are features
LARGE = 2**20  # pixels of a picture from which on its central view is not resized by matrices
LONG = 4  # times the shorter side: a longer picture is, as resizing it whole takes memory for what is cut off


@dataclasses.dataclass(frozen=True)
class Preprocessing:
    """Turns 0-255 images into an encoder's input.

    `mean` and `std` are the mean and standard deviation of red, green and blue in 0..1, or of each channel that the
    images have.
    """

    unit: typing.ClassVar = "images"  # what it makes inputs of

    image_size: int = 224
    crop_ratio: float = 0.875
    mean: tuple = (0.485, 0.456, 0.406)
    std: tuple = (0.229, 0.224, 0.225)

    def __post_init__(self):
        for name in ("mean", "std"):  # JSON makes lists of them
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if not len(self.mean) == len(self.std) > 0:
            raise ValueError(f"mean and std have a number for each channel, not {len(self.mean)} and {len(self.std)}.")
        if self.image_size < 1:
            raise ValueError(f"image_size must be at least 1 pixel, not {self.image_size}.")
        if not 0 < self.crop_ratio <= 1:
            raise ValueError(
                f"crop_ratio is the part of the resized image that is kept: more than 0, at most 1, "
                f"not {self.crop_ratio}."
            )

    @property
    def channels(self):
        """C, the number of channels of the images."""
        return len(self.mean)

    @property
    def channels_of_files(self):
        """How many channels are read from a file."""
        return self.channels

    def of_channels(self, number):
        """Returns the same for images of `number` channels; each has the average of `mean` and that of `std`."""
        if number == self.channels:
            return self
        one_for_all = {name: (round(float(np.mean(getattr(self, name))), 6),) * number for name in ("mean", "std")}
        return dataclasses.replace(self, **one_for_all)

    @property
    def spec(self):
        """The encoder's input."""
        return tf.TensorSpec((None, self.image_size, self.image_size, self.channels), tf.float32, "images")

    def check_fits(self, shape):
        """Refuses an encoder whose input has another `shape`, (H, W, C)."""
        if shape[0] not in (None, self.image_size):
            raise ValueError(
                f"the backbone takes images of {shape[0]} pixels, but preprocessing makes them of "
                f"{self.image_size}: build the one or the other for the same size"
            )

    def records_of(self, source):
        """Returns what the encoder reads of a source of images: its images, with C channels."""
        return source.read_as(self.channels)

    def plain(self):
        """Returns what kNN uses without an encoder: a name, the inputs, a function from a batch to features (N, C)."""
        small = dataclasses.replace(self, image_size=min(PLAIN_SIZE, self.image_size))
        return "raw pixels", small, lambda images: tf.reshape(images, (len(images), -1))

    @tf.autograph.experimental.do_not_convert  # tracing takes half as long
    def __call__(self, images):
        """(N, H, W, C) of 0..255, any H and W -> normalised float32 (N, S, S, C); takes grey images, too, if C is 3.

        The shorter side is resized to S / crop_ratio, then the centre is cut out, as torchvision's
        Resize and CenterCrop do, to the pixel.
        """
        images = self.with_channels(arrays.of_eight_bits(tf.convert_to_tensor(images)))
        resized, offset = self._layout(*sizes(images)[-3:-1])
        return self.normalize(resize(images, resized, (self.image_size, self.image_size), offset))

    def _layout(self, height, width):
        """Height and width of a resized image, and where in it the centre begins."""
        shorter = round(self.image_size / self.crop_ratio)
        resized = (_at_least(shorter, shorter * height // width), _at_least(shorter, shorter * width // height))
        return resized, [_half(length - self.image_size) for length in resized]

    def with_channels(self, images):
        """Returns the tensor (..., H, W, C), or raises an error; grey images become RGB."""
        if self.channels == 3:
            return arrays.rgb(images)
        if images.shape[-1] not in (self.channels, None):
            raise ValueError(
                f"Images have {self.channels} channels, (N, H, W, {self.channels}), not {tuple(images.shape)}."
            )
        return tf.ensure_shape(images, (*images.shape[:-1], self.channels))

    @tf.autograph.experimental.do_not_convert
    def of_encoded(self, encoded):
        """An encoded image, scalar string -> normalised float32 (S, S, C); an error where it cannot be decoded."""
        return self._central(decode_safely(encoded, self.channels))

    def _central(self, image):
        """uint8 (H, W, C) -> normalised float32 (S, S, C)."""
        sides = tf.shape(image)[:2]
        is_large = (tf.reduce_prod(sides) >= LARGE) & (tf.reduce_max(sides) <= LONG * tf.reduce_min(sides))
        view = tf.cond(is_large, lambda: self._central_of_large(image), lambda: self._central_by_matrices(image))
        return tf.ensure_shape(view, (self.image_size, self.image_size, self.channels))

    def _central_of_large(self, image):
        """Differs by at most 2e-3 of 255 from the matrices' result, in a tenth of the time for 12 megapixels."""
        resized, offset = self._layout(*sizes(image)[:2])
        whole = tf.image.resize(self.with_channels(image), resized, antialias=True)
        size = (self.image_size, self.image_size, self.channels)
        return self.normalize(tf.slice(whole, (*offset, 0), size))

    def _central_by_matrices(self, image):
        """The same as calling this object with the image."""
        size = self.image_size
        if round(size / self.crop_ratio) != size:
            return self(image[tf.newaxis])[0]
        # An image that has the size already needs no matrices: the same bits in less than half of the time.
        fits = tf.reduce_all(tf.shape(image)[:2] == size)
        view = tf.cond(fits, lambda: self.normalize(image), lambda: self(image[tf.newaxis])[0])
        return tf.ensure_shape(view, (size, size, self.channels))  # in a branch, TensorFlow runs it in any case

    @tf.autograph.experimental.do_not_convert
    def of_record(self, record):
        """The central view of a record with an "image", float32 (S, S, C)."""
        image = record["image"]
        return self.of_encoded(image) if image.dtype == tf.string else self._central(image)

    def signatures(self, request_megapixels=REQUEST_MEGAPIXELS):
        """{name: `Signature`}: what a server takes; the first is its default. Files of images have 1 or 3 channels.

        request_megapixels: the most that the encoded images of a request may have together.
        """
        size, channels = self.image_size, self.channels
        black = np.zeros((1, size, size, channels), np.uint8)
        kinds = {
            "serving_default": Signature(
                lambda images: (self(images), None),
                tf.TensorSpec((None, None, None, channels), tf.uint8, "images"),
                black,
                f"uint8 (N, H, W, {channels}), any H and W",
            ),
            "encoded_images": Signature(
                lambda images: self.of_encoded_batch(images, request_megapixels),
                tf.TensorSpec((None,), tf.string, "images"),
                [tf.io.encode_jpeg(black[0, ..., :3]).numpy()] if channels in OF_IMAGES else [],
                "string (N,): JPEG or PNG files, of any sizes" + (", read as grey" if channels == 1 else ""),
            ),
            "preprocessed": Signature(
                lambda images: (images, None),
                self.spec,
                black.astype(np.float32),
                f"float32 (N, {size}, {size}, {channels}), normalised",
            ),
        }
        return {name: kind for name, kind in kinds.items() if channels in OF_IMAGES or name != "encoded_images"}

    def of_encoded_batch(self, images, request_megapixels=REQUEST_MEGAPIXELS):
        """Encoded images of any sizes -> the encoder's input; one bad image spoils no other.

        Args:
          images: string (N,).
          request_megapixels: the most that the images may have together; more is an error.

        Returns:
          Normalised float32 (N, S, S, C), zeros where an image cannot be decoded; bool (N,): which images can be.
        """
        size, channels = self.image_size, self.channels
        spec = tf.TensorSpec((size, size, channels), tf.float32)

        def view(image):  # (H, W, 3)
            return self((image if channels == 3 else luma(image))[tf.newaxis])[0]

        return encoded_batch.views(images, view, spec, request_megapixels)

    def normalize(self, images):
        """0-255 of any type -> float32 of about zero mean and unit variance."""
        scale = 1 / (255 * np.array(self.std, np.float32))
        shift = np.array(self.mean, np.float32) / np.array(self.std, np.float32)
        images = tf.cast(images, tf.float32)
        width = images.shape[-2]
        if width is None:
            return images * scale - shift
        lines = tf.reshape(images, [*sizes(images)[:-2], self.channels * width])  # a long last axis vectorises
        return tf.reshape(lines * np.tile(scale, width) - np.tile(shift, width), tf.shape(images))

    def denormalize(self, images):
        """Undoes `normalize`: back to 0-255, float32, neither rounded nor clipped."""
        return (tf.cast(images, tf.float32) * np.float32(self.std) + np.float32(self.mean)) * 255

    def shown(self, images):
        """Images (..., C) of 0..255 as people see them, (..., 3)."""
        return arrays.shown(images)

    def picture(self, views):
        """Returns the `sheet` of views, (N, S, S, C) each: a row for each view."""
        return sheet([self.shown(self.denormalize(view)) for view in views])


IMAGENET = Preprocessing()
CIFAR10 = Preprocessing(image_size=32, crop_ratio=1.0, mean=(0.4914, 0.4822, 0.4465), std=(0.2023, 0.1994, 0.2010))


def sheet(rows):
    """Makes a uint8 image (H, W, 3) of rows of images, (N, S, S, 3) each, 0..255; enlarges small images.

    Each row has its own S.
    """
    enlarged = max(1, 96 // rows[0].shape[1])
    rows = [tf.concat(tf.unstack(row), axis=1) for row in rows]
    width = max(row.shape[1] for row in rows)
    rows = [tf.pad(row, ((0, 0), (0, width - row.shape[1]), (0, 0)), constant_values=255.0) for row in rows]
    image = tf.cast(tf.clip_by_value(tf.round(tf.concat(rows, axis=0)), 0, 255), tf.uint8)
    return tf.repeat(tf.repeat(image, enlarged, axis=0), enlarged, axis=1)


def _at_least(low, value):
    return max(low, value) if isinstance(value, int) else tf.maximum(low, value)


def _half(number):
    """Half of a non-negative integer; halves round to the even number, as in Python (and so in torchvision)."""
    half = number // 2
    return half + (half % 2) * (number % 2)
