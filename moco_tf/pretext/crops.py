"""Instance discrimination, the papers' task: the views of an image are random crops of it, each distorted anew.

Data: images. Supervision: that two views come from one image. Source: MoCo v1, v2 and v3 (arXiv:1911.05722,
2003.04297, 2104.02057); `data/augment.py` has the recipes.
"""

import dataclasses
import logging

from moco_tf import command
from moco_tf.command import ConfigError
from moco_tf.recorded import flag

SMALLEST_CROP = 0.05  # of multi-crop's small views
LOOKED_AT = 256  # images among which grey ones are counted

log = logging.getLogger("moco_tf")


@dataclasses.dataclass(frozen=True)
class Decoding:
    """How the image of a view is decoded."""

    decode: str = flag(
        "exact",
        "How JPEGs are decoded for views. exact: whole; fast: photographs far larger than the views are shrunk to a "
        "half, a quarter or an eighth as they are decoded, where a crop then still has a view's pixels.",
        choices=("exact", "fast"),
    )


@dataclasses.dataclass(frozen=True)
class Cropping(Decoding):
    """How a view is cropped and distorted, and where."""

    augment: str = flag(
        "v2",
        "Recipe of the random views: v1, v2, v3 as in the papers, or cifar (the official CIFAR-10 demo).",
        choices=("v1", "v2", "v3", "cifar"),
    )
    crop_min: float = flag(
        0.0,
        "Least area of a random crop, as a share of the image; 0: the recipe's own (v1, v2: 0.2). v3: 0.2, ViTs 0.08.",
    )
    views_on: str = flag(
        "host",
        "Where views are made. host: one by one, as the pipeline goes; device: all images stay in memory, decoded, "
        "and the training step crops and distorts a batch at once: for small images of one size; both: the pipeline "
        "crops, the step distorts: for photographs, where there is a GPU. XLA compiles what the step makes.",
        choices=("host", "device", "both"),
    )

    def check(self):
        command.require(self, 0 <= self.crop_min <= 1, "crop_min", "lies between 0 and 1")
        decoded_once = self.decode == "fast" and self.views_on == "device"
        command.require(self, not decoded_once, "decode", "is exact with --views_on=device, which keeps whole images")


@dataclasses.dataclass(frozen=True)
class PlainCropping(Cropping):
    """`Cropping` for a task whose views are flipped and, by default, not distorted otherwise."""

    augment: str = flag(
        "flip",
        "flip: crops, flipped half of the time. v1, v2, v3, cifar: crops with that recipe's steps.",
        choices=("flip", "v1", "v2", "v3", "cifar"),
    )


@dataclasses.dataclass(frozen=True)
class Options(Cropping):
    """How many views there are, and how each is cropped and distorted."""

    positives: int = flag(1, "P: key views of an image beside the query view, each a key of its own. v1, v2, v3: 1.")
    small_views: int = flag(
        0,
        "M: small crops of an image that are queries as well, and look for the keys of its whole views: multi-crop "
        "(SwAV, arXiv 2006.09882: 6). With ResNets. v1, v2, v3: 0.",
    )
    small_size: int = flag(0, "Side of a small crop in pixels; 0: half of --image_size. SwAV: 96 of 224.")
    small_crop_max: float = flag(
        0.14, "Largest area of a small crop, as a share of the image; the least is 0.05. SwAV: 0.14."
    )

    def check(self):
        command.require(self, self.positives >= 1, "positives", "is at least 1 key view")
        command.require(self, self.small_views >= 0, "small_views", "is 0 or more")
        command.require(self, self.small_size >= 0, "small_size", "is 0 or more pixels")
        rule = f"lies between {SMALLEST_CROP} and 1"
        command.require(self, SMALLEST_CROP <= self.small_crop_max <= 1, "small_crop_max", rule)
        if self.small_views and self.is_vit:
            raise ConfigError(
                f"--small_views are smaller images, and {self.arch} takes one size; got {self.small_views}: leave it "
                "out, or take a ResNet"
            )


def views(record, seed, inputs, options):
    """Returns (query view, P key views, M small views) of an image, float32 (S, S, 3) each, normalised.

    Or returns unfinished views, which `on_device` finishes.

    record: a dict with "image", encoded bytes or uint8; seed: int64 (2,); inputs: the encoder's `Preprocessing`.
    """
    return host_part(record, seed, kinds(inputs, options), inputs, options)


def recipe(inputs, options):
    """Returns the recipe of --augment: its query and key are an `augment.View` each; for flip, both are `flipped`."""
    from moco_tf.data import augment

    if options.augment == "flip":
        view = flipped(options)
        return augment.InstanceDiscrimination(view, view, inputs)
    return augment.RECIPES[options.augment](inputs.image_size, crop_min=options.crop_min or None)


def flipped(options):
    """Returns the view of CMC, CPC and MAE: a crop of 0.2 of the image or more, flipped half of the time."""
    from moco_tf.data import augment

    return augment.View(crop_scale=(options.crop_min or 0.2, 1.0), steps=("flip",))


def kinds(inputs, options):
    """Returns an `augment.View` for each view, query first."""
    pair = recipe(inputs, options)
    small = dataclasses.replace(
        pair.query,
        size=options.small_size or inputs.image_size // 2,
        crop_scale=(SMALLEST_CROP, options.small_crop_max),
    )
    return (pair.query, *[pair.key] * options.positives, *[small] * options.small_views)


def plain_kind(inputs, options, leave_out=()):
    """Returns the `augment.View` of a task with one view: the query of its recipe without some steps."""
    view = recipe(inputs, options).query
    return dataclasses.replace(view, steps=tuple(step for step in view.steps if step not in leave_out))


def plain_views(record, seed, inputs, options, leave_out=()):
    """Returns one view of an image by `plain_kind`, float32 (S, S, 3), normalised.

    For tasks whose step does the rest.
    """
    return host_part(record, seed, (plain_kind(inputs, options, leave_out),), inputs, options)


def plain_at_once(source, options):
    """Returns a function that does the work of `plain_views` for all records of a batch, or None."""
    return pictures_of(source, 1, options)


def plain_on_device(inputs, options, leave_out=()):
    """Returns the training step's part of making a batch's `plain_views`, a function, or None."""
    return device_part((plain_kind(inputs, options, leave_out),), inputs, options)


def require_colors(config):
    """Raises if images are not in colour, for tasks that learn from colours.

    Raises:
      ConfigError: --channels is not 3.
    """
    if config.channels != 3:
        raise ConfigError(
            f"--pretext={config.pretext} learns from red, green and blue, --channels=3; got {config.channels}: "
            "leave it out, or take another task, such as --pretext=crops"
        )


def with_colors(source):
    """Returns the source, for tasks that learn from colours; logs how many of the first images have no colours."""
    import tensorflow as tf

    from moco_tf.data.encoded import pixels

    def grey(record):
        image = tf.cast(pixels(record["image"]), tf.int32)
        return tf.reduce_all(image == image[..., :1])

    sample = [bool(grey(record)) for _, record in source.shuffled(0).take(LOOKED_AT)]
    if number := sum(sample):
        log.warning(
            f"  Greyscale: {number} of {len(sample)} images looked at; nothing can be learnt of their colours, which "
            "are all the same"
        )
    return source


def host_part(record, seed, kinds, inputs, options):
    """Returns the views of one picture, as far as the host makes them."""
    from moco_tf.data import augment

    if options.views_on == "device":
        return tuple(augment.pictures(record, seed, len(kinds)))
    crops = augment.random_crops(record, seed, kinds, inputs.image_size, options.decode)
    if options.views_on == "both":
        return tuple(augment.of_eight_bits(crops))
    return tuple(augment.distorted(crops, kinds, inputs))


def at_once(source, options):
    """Returns a function that makes a batch's views, (numbers (N,), seeds (N, 2)) -> views; None: one by one."""
    return pictures_of(source, 1 + options.positives + options.small_views, options)


def on_device(inputs, options):
    """Returns the training step's part of making a batch's views, a function of their tuple; None: nothing."""
    return device_part(kinds(inputs, options), inputs, options)


def pictures_of(source, count, options):
    """Returns a function that gives `count` pictures of each record, for the step to crop; None: read one by one.

    Raises:
      ValueError: the images are a stream, of several sizes, or too many for the memory.
    """
    from moco_tf.data import augment, in_memory
    from moco_tf.data.sources import Source

    if options.views_on != "device":
        return None
    if not isinstance(source, Source):
        raise ValueError(f"{source.name} is read one by one; {in_memory.ADVICE}")
    images = source.decoded
    return lambda numbers, seeds: augment.pictures_at_once(images, numbers, seeds, count)


def device_part(kinds, inputs, options):
    """Returns the step's part of making a batch's views of these kinds, a function; None: nothing."""
    from moco_tf.data import augment

    def finish(views):
        of_these = kinds[: len(views)]  # a memory bank takes only the first
        if options.views_on == "device":
            views = augment.crops_of(views, of_these, inputs.image_size)
        return tuple(augment.distorted(views, of_these, inputs))

    return None if options.views_on == "host" else finish
