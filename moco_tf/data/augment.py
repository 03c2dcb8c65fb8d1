"""The random views of the papers, as data: which steps, in which order, how strong and how often.

A recipe (`v1`, `v2`, `v3`, `cifar`) is a pretext task: a function `(record, seed) -> (query view, key view)`.
All that is random in a view is drawn in one call from the record's seed, so a view is a function of its seed. The
semantics are torchvision's, which the papers used.
"""

import dataclasses
import functools
import typing

import numpy as np
import tensorflow as tf

from moco_tf.data import image_ops
from moco_tf.data.encoded import pixels
from moco_tf.data.inputs.image import CIFAR10, IMAGENET, Preprocessing

CROP_TRIES = 10
CROP_ASPECT = (3 / 4, 4 / 3)  # width / height
OPERATIONS = (image_ops.brightness, image_ops.contrast, image_ops.saturation, image_ops.hue)  # of the jitter
WITHOUT_COLOR = 2  # how many of them need no colours


@dataclasses.dataclass(frozen=True)
class View:
    """One random view: a resized crop, then `steps` in their order, each with its probability."""

    crop_scale: tuple = (0.2, 1.0)  # part of the image's area
    steps: tuple = ("jitter", "grayscale", "blur", "flip")
    jitter: tuple = (0.4, 0.4, 0.4, 0.1)  # brightness, contrast, saturation: 1 +- this; hue: +- this, in turns
    jitter_probability: float = 0.8
    grayscale_probability: float = 0.2
    blur_sigma: tuple = (0.1, 2.0)  # pixels
    blur_probability: float = 0.5
    solarize_probability: float = 0.2
    flip_probability: float = 0.5
    size: int | None = None  # S, its side in pixels; None: the encoder's

    def distort(self, image, draws):
        """Applies all steps after the crop: float32 (S, S, C), values 0..255 -> the same. draws: `Draws` of this view.

        Also takes a batch, (N, S, S, C), with draws of (N, ...). It then computes every step for every image, for XLA.
        Saturation, hue and greyscale need colours and are left out where C is not 3.
        """
        in_color = image.shape[-1] == 3
        for step in self.steps:
            if step == "grayscale" and not in_color:
                continue
            if step == "jitter":
                drawn = draws.jitter < self.jitter_probability
                image = _if(drawn, lambda x: color_jitter(x, self.jitter, draws.factors, draws.order), image)
            elif step == "grayscale":
                image = _if(draws.grayscale < self.grayscale_probability, image_ops.grayscale, image)
            elif step == "blur":
                low, high = self.blur_sigma
                blur = functools.partial(image_ops.gaussian_blur, sigma=low + (high - low) * draws.sigma, largest=high)
                image = _if(draws.blur < self.blur_probability, blur, image)
            elif step == "solarize":
                image = _if(draws.solarize < self.solarize_probability, image_ops.solarize, image)
            elif step == "flip":
                image = _if(draws.flip < self.flip_probability, image_ops.flip, image)
            else:
                raise ValueError(f"A step of a view is jitter, grayscale, blur, solarize or flip, not {step!r}.")
        return image


@dataclasses.dataclass(frozen=True)
class InstanceDiscrimination:
    """The pretext task of the papers: query and key are two random views of one image."""

    query: View
    key: View
    preprocessing: Preprocessing

    def __call__(self, record, seed):
        """record: a dict with "image"; seed: int64 (2,). Returns (query, key), float32 (S, S, 3), normalised."""
        return tuple(random_views(record, seed, (self.query, self.key), self.preprocessing))


@dataclasses.dataclass(frozen=True)
class Labelled:
    """The views on which classifiers are trained: a function `(record, seed) -> view`, normalised (S, S, 3)."""

    preprocessing: Preprocessing
    crop_min: float = 0.08  # as in all papers

    def __call__(self, record, seed):
        view = View(crop_scale=_crop_scale(self.crop_min, 0.08), steps=("flip",))
        return random_views(record, seed, (view,), self.preprocessing)[0]


class Unfinished(typing.NamedTuple):
    """A view, or a batch of views, in the making: the picture that it is cut out of, or the crop before distortion."""

    image: tf.Tensor  # (..., H, W, C), values 0..255, float32 or uint8
    uniforms: tf.Tensor  # (..., UNIFORMS), of which `Draws` are parts


@tf.autograph.experimental.do_not_convert  # tracing takes half as long
def random_views(record, seed, views, preprocessing, decode="exact"):
    """Returns a list with a normalised view, float32 (S, S, 3), for each `View`; seed, decode: see `random_crops`."""
    return distorted(random_crops(record, seed, views, preprocessing.image_size, decode), views, preprocessing)


@tf.autograph.experimental.do_not_convert
def random_crops(record, seed, views, size, decode="exact"):
    """Returns the crop, float32 (S, S, 3), for each `View` as a list of `Unfinished`; seed: int64 (2,).

    decode: "exact", or "fast": large JPEGs are shrunk as they are decoded.
    """
    uniforms = draw(seed, len(views))
    scales = np.array([view.crop_scale for view in views], np.float32).T[..., np.newaxis]  # 2 x views x 1

    def boxes(height, width):  # of all views at once: with small images, the number of operations takes the time
        found = random_resized_crop_box(height, width, scales, draws_of(uniforms).crop)
        return [tf.unstack(box) for box in tf.unstack(found)]

    sides = [view.size or size for view in views]
    crops = image_ops.crops(record["image"], boxes, sides if decode == "fast" else None)
    crops = [image_ops.resized(crop, side) for crop, side in zip(crops, sides, strict=True)]
    return [Unfinished(crop, own) for crop, own in zip(crops, tf.unstack(uniforms), strict=True)]


def of_eight_bits(crops):
    """Rounds the crops' images to uint8, which leaves a quarter of the bytes to carry to a device."""
    return [crop._replace(image=tf.cast(tf.round(crop.image), tf.uint8)) for crop in crops]


@tf.autograph.experimental.do_not_convert
def pictures(record, seed, views):
    """Like `random_crops`, but cuts nothing yet: returns the picture, uint8 (H, W, C), for each of `views` views."""
    picture = pixels(record["image"])
    return [Unfinished(picture, own) for own in tf.unstack(draw(seed, views))]


@tf.autograph.experimental.do_not_convert
def pictures_at_once(images, numbers, seeds, views):
    """Like `pictures`, for the records with these numbers (N,) of all `images`, uint8 (R, H, W, C); seeds: (N, 2)."""
    uniforms = tf.map_fn(lambda seed: draw(seed, views), seeds, fn_output_signature=tf.float32)
    images = tf.gather(images, numbers)
    return [Unfinished(images, own) for own in tf.unstack(uniforms, num=views, axis=1)]


@tf.autograph.experimental.do_not_convert
def crops_of(pictures, views, size):
    """Cuts crops, float32 (N, S, S, 3), out of batches of `pictures` of one size; returns a list of `Unfinished`."""
    crops = []
    for (images, uniforms), view in zip(pictures, views, strict=True):
        height, width = tf.unstack(tf.shape(images)[1:3])
        boxes = random_resized_crop_box(height, width, view.crop_scale, draws_of(uniforms).crop)  # N x 4
        crops.append(Unfinished(image_ops.resized_crops(images, boxes, view.size or size), uniforms))
    return crops


@tf.autograph.experimental.do_not_convert
def distorted(crops, views, preprocessing):
    """Distorts and normalises crops; returns the list of views, float32 (..., S, S, 3)."""
    return [
        preprocessing.normalize(view.distort(tf.cast(crop.image, tf.float32), draws_of(crop.uniforms)))
        for crop, view in zip(crops, views, strict=True)
    ]


def v1(size=224, crop_min=0.2):
    """MoCo v1 (He et al. 2020): strong jitter, always; no blur."""
    view = View(
        crop_scale=_crop_scale(crop_min, 0.2),
        steps=("grayscale", "jitter", "flip"),
        jitter=(0.4, 0.4, 0.4, 0.4),
        jitter_probability=1.0,
    )
    return InstanceDiscrimination(view, view, dataclasses.replace(IMAGENET, image_size=size))


def v2(size=224, crop_min=0.2):
    """MoCo v2 (Chen et al. 2020): SimCLR's blur, weaker jitter."""
    view = View(crop_scale=_crop_scale(crop_min, 0.2))
    return InstanceDiscrimination(view, view, dataclasses.replace(IMAGENET, image_size=size))


def v3(size=224, crop_min=0.2):
    """MoCo v3 (Chen et al. 2021): BYOL's two different views. `crop_min` 0.2 is for ResNets, 0.08 for ViTs."""
    view = View(
        crop_scale=_crop_scale(crop_min, 0.2),
        steps=("jitter", "grayscale", "blur", "solarize", "flip"),
        jitter=(0.4, 0.4, 0.2, 0.1),
    )
    return InstanceDiscrimination(
        query=dataclasses.replace(view, blur_probability=1.0, solarize_probability=0.0),
        key=dataclasses.replace(view, blur_probability=0.1, solarize_probability=0.2),
        preprocessing=dataclasses.replace(IMAGENET, image_size=size),
    )


def cifar(size=32, crop_min=0.08):
    """The authors' CIFAR-10 demo: small images are not blurred."""
    view = View(crop_scale=_crop_scale(crop_min, 0.08), steps=("flip", "jitter", "grayscale"))
    return InstanceDiscrimination(view, view, dataclasses.replace(CIFAR10, image_size=size))


RECIPES = {"v1": v1, "v2": v2, "v3": v3, "cifar": cifar}


class Draws(typing.NamedTuple):
    """The uniform numbers in [0, 1) behind one view. A view that leaves out a step leaves its numbers unused."""

    crop: tf.Tensor  # (..., 2 * CROP_TRIES + 2): areas, aspects, top, left
    factors: tf.Tensor  # (..., 4), of the jitter's operations
    order: tf.Tensor  # (..., 4), sorted to give their order
    jitter: tf.Tensor  # the rest are (...)
    grayscale: tf.Tensor
    blur: tf.Tensor
    sigma: tf.Tensor
    solarize: tf.Tensor
    flip: tf.Tensor


_LENGTHS = (2 * CROP_TRIES + 2, 4, 4, 1, 1, 1, 1, 1, 1)
UNIFORMS = sum(_LENGTHS)  # numbers behind a view


def draw(seed, views):
    """Returns (views, UNIFORMS): all random numbers for the views of a record, from one int64 (2,) seed."""
    return tf.random.stateless_uniform((views, UNIFORMS), seed, alg="philox")


def draws_of(uniforms):
    """Splits uniform numbers (..., UNIFORMS) into `Draws`."""
    parts = tf.split(uniforms, _LENGTHS, axis=-1)
    return Draws(*parts[:3], *(part[..., 0] for part in parts[3:]))


def random_resized_crop_box(height, width, scale, uniforms):
    """torchvision's RandomResizedCrop: where to cut. Returns int32 (..., 4): top, left, height, width.

    Up to ten tries draw a uniform area and a log-uniform aspect; the first that fits is taken. If none fits, the box
    is the largest centred one of an allowed aspect. uniforms: (..., 2 * CROP_TRIES + 2) in [0, 1); all tries are drawn
    at once.
    """
    areas, aspects, top, left = tf.split(uniforms, [CROP_TRIES, CROP_TRIES, 1, 1], axis=-1)
    image_height, image_width = tf.cast(height, tf.float32), tf.cast(width, tf.float32)
    areas = (scale[0] + (scale[1] - scale[0]) * areas) * image_height * image_width
    low, high = np.log(CROP_ASPECT)
    aspects = tf.exp(low + (high - low) * aspects)
    widths, heights = tf.round(tf.sqrt(areas * aspects)), tf.round(tf.sqrt(areas / aspects))

    # The fallback is an eleventh try that always fits; argmax takes the first try that fits.
    narrowest, widest = CROP_ASPECT
    widths = _append(widths, tf.minimum(image_width, tf.round(image_height * widest)))
    heights = _append(heights, tf.minimum(image_height, tf.round(image_width / narrowest)))
    fits = (widths > 0) & (widths <= image_width) & (heights > 0) & (heights <= image_height)
    chosen = tf.argmax(tf.cast(fits, tf.int32), axis=-1)[..., tf.newaxis]
    box_width = tf.gather(widths, chosen, batch_dims=chosen.shape.rank - 1)  # (..., 1)
    box_height = tf.gather(heights, chosen, batch_dims=chosen.shape.rank - 1)

    centred = chosen == CROP_TRIES
    room_above, room_left = image_height - box_height, image_width - box_width
    top = tf.where(centred, tf.floor(room_above / 2), tf.floor(top * (room_above + 1)))
    left = tf.where(centred, tf.floor(room_left / 2), tf.floor(left * (room_left + 1)))
    return tf.cast(tf.concat([top, left, box_height, box_width], axis=-1), tf.int32)


def color_jitter(image, strengths, factors, order):
    """Changes brightness, contrast, saturation and hue, each by a random amount, in a random order.

    Images that are not in colour change in brightness and contrast alone, by the same amounts and in the same order.

    image: (H, W, C), or (N, H, W, C); factors, order: (4,) or (N, 4) in [0, 1). Sorting `order` gives the order of the
    operations.
    """
    operations = OPERATIONS if image.shape[-1] == 3 else OPERATIONS[:WITHOUT_COLOR]
    low = np.array([*(max(0.0, 1 - strength) for strength in strengths[:3]), -strengths[3]], np.float32)
    high = np.array([*(1 + strength for strength in strengths[:3]), strengths[3]], np.float32)
    factors = low + (high - low) * factors
    order = tf.argsort(order[..., : len(operations)], axis=-1)
    if image.shape.rank == 4:
        for which in tf.unstack(order, axis=-1):  # (N,)
            factor = tf.gather(factors, which, batch_dims=1)
            others = image_ops.brightness_contrast_or_saturation(image, which, factor)
            if image_ops.hue in operations:
                others = _where(which == operations.index(image_ops.hue), image_ops.hue(image, factor), others)
            image = others
        return image

    def operate(place, image):
        branches = [lambda op=op, factor=factors[i]: op(image, factor) for i, op in enumerate(operations)]
        return place + 1, tf.switch_case(order[place], branches)

    # A loop of TensorFlow, since tracing all operations at each place would take a second more at the start.
    return tf.while_loop(lambda place, _: place < len(operations), operate, (0, image), parallel_iterations=1)[1]


def _if(drawn, function, image):
    if image.shape.rank == 4:
        return _where(drawn, function(image), image)
    return tf.cond(drawn, lambda: function(image), lambda: image)


def _where(drawn, images, others):
    return tf.where(drawn[:, tf.newaxis, tf.newaxis, tf.newaxis], images, others)


def _append(tries, last):
    return tf.concat([tries, tf.fill([*tries.shape[:-1], 1], last)], axis=-1)


def _crop_scale(crop_min, default):
    crop_min = default if crop_min is None else crop_min
    if not 0 < crop_min <= 1:
        raise ValueError(f"crop_min is the smallest part of the area to crop: more than 0, at most 1, not {crop_min}.")
    return (crop_min, 1.0)
