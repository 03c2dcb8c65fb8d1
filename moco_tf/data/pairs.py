"""A source of images with a depth map each: `name.png` (or any format) and, beside it, `name.depth.png`."""

import dataclasses
import logging
import os

import numpy as np
import tensorflow as tf

from moco_tf.data.encoded import PNG, decode, decode_depth, header
from moco_tf.data.errors import ERRORS, reason
from moco_tf.data.sources import Source, evenly_spread
from moco_tf.files import printable

log = logging.getLogger("moco_tf")
ENDING = b".depth.png"
LOOKED_AT = 64  # pairs whose sizes are compared before a run begins
TOLD_APART = 32  # of 255: a smaller span of depths gives a warning


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Pairs(Source):
    """Pairs by number. A record's "image" is uint8 (H, W, 4): red, green, blue, and depth of 0..255."""

    depths: tf.Tensor  # string (size,): files
    depth_max: float  # what `decode_depth` takes

    def only(self, numbers):
        """A source of the pairs with these numbers; they are numbered anew."""
        with tf.device("CPU:0"):
            depths = tf.gather(self.depths, numbers)
        return dataclasses.replace(super().only(numbers), depths=depths)

    @tf.autograph.experimental.do_not_convert
    def record(self, index, image=None):
        """The record of this number, as graph operations."""
        record = super().record(index, image)
        image = decode(record["image"])
        depth = decode_depth(self.read(self.depths[record["id"]]), self.depth_max)
        same = tf.debugging.Assert(
            tf.reduce_all(tf.shape(image)[:2] == tf.shape(depth)[:2]),
            [self.contents[record["id"]], "and its depth map have several sizes:", tf.shape(image), tf.shape(depth)],
        )
        with tf.control_dependencies([same]):
            return record | {"image": tf.ensure_shape(tf.concat([image, depth], axis=-1), (None, None, 4))}


def of_images(source, depth_max):
    """The `Pairs` of a folder's images; says how many there are, and which images have no depth map.

    Raises:
      ValueError: the images are not files, none has a depth map, or a depth map has another size than its image.
    """
    if source.orientations is not None:
        raise ValueError("--exif does not turn images with depth maps; moco_tf.data.convert writes images upright")
    if source.paths is None:
        raise ValueError(f"depth maps stand beside images in a folder, --dataset=DIR; {source.name} has none")
    paths = source.paths.numpy()
    numbers, depths, alone = [], [], []
    good = {paths[number]: number for number in source.good.tolist()}
    for path, number in good.items():
        if path.endswith(ENDING):
            continue
        if (depth := os.path.splitext(path)[0] + ENDING) in good:
            numbers.append(number)
            depths.append(depth)
        else:
            alone.append(path)
    if not numbers:
        first = f"; {printable(os.fsdecode(alone[0]))} has none" if alone else ""
        raise ValueError(f"the depth map of name.png is name.depth.png, beside it, a PNG{first}")
    if alone:
        first = printable(os.fsdecode(alone[0]))
        log.warning(f"  Left out: {len(alone)} images without a readable depth map, {first} first")
    of_files = source.only(np.array(numbers))
    fields = {field.name: getattr(of_files, field.name) for field in dataclasses.fields(Source)}
    with tf.device("CPU:0"):
        pairs = Pairs(**fields, depths=tf.constant(depths), depth_max=depth_max)
    shown = evenly_spread(pairs.size, LOOKED_AT)
    try:
        for number in shown:
            _check(*(pairs.read(files[number]) for files in (pairs.contents, pairs.depths)), pairs.depths[number])
        looked_at = [pairs.record(number)["image"][..., 3].numpy() for number in shown]
    except ERRORS as error:
        raise ValueError(reason(error)) from None
    low, high = (int(extreme(list(map(extreme, looked_at)))) for extreme in (np.min, np.max))
    log.info(
        f"  Pairs of an image and its depth map: {pairs.size}; all bits of the depth maps are read: from {low} to "
        f"{high} of 255 in those looked at"
    )
    if high - low < TOLD_APART:
        log.warning("  Depths are hardly told apart; --depth_max says which counts as farthest")
    return pairs


def _check(image, depth, file):
    """Refuses a depth map, `file`, that is not a PNG or has another size than its image; both are encoded bytes."""
    (_, *of_image), (kind, *of_depth) = (map(int, header(encoded)) for encoded in (image, depth))
    if kind != PNG or of_image != of_depth:
        name = printable(os.fsdecode(file.numpy()))
        sizes = " and ".join(f"{width} x {height}" for height, width in (of_image, of_depth))
        raise ValueError(f"a depth map is a PNG of its image's size; image and {name} have {sizes} pixels")
