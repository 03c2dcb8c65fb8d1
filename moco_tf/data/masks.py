"""Images with masks: Pascal VOC's folders, folders `images` and `masks`, or a data set of TFDS.

A record is that of `sources.py` with "mask", an encoded PNG of the image's size whose values are numbers of classes.
The value `IGNORED` (VOC's borders) is neither learnt nor counted.
"""

import concurrent.futures
import dataclasses
import io
import logging
import os
from pathlib import Path

import numpy as np
import tensorflow as tf

from moco_tf import files
from moco_tf.command import ConfigError
from moco_tf.data import annotated, splits, tfds, voc
from moco_tf.data.folder import SUFFIXES, some
from moco_tf.data.sources import Source
from moco_tf.files import expanded, printable

log = logging.getLogger("moco_tf")
IGNORED = 255
DEPTH = 24  # the place of the byte that has a PNG's bit depth
IMAGES, MASKS, NAMES = "images", "masks", "classes.txt"
HELD_OUT = 5  # of folders without splits, every fifth image is for evaluation
VOC_CLASSES = (
    "background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow",
    "diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
)  # fmt: skip


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Masked(Source):
    """Images by number, each with a mask."""

    masks: tf.Tensor  # string (size,): files

    def only(self, numbers):
        """A source of the images with these numbers; they are numbered anew."""
        with tf.device("CPU:0"):
            masks = tf.gather(self.masks, numbers)
        return dataclasses.replace(super().only(numbers), masks=masks)

    @tf.autograph.experimental.do_not_convert
    def record(self, index):
        """The record of this number, as graph operations."""
        record = super().record(index)
        return record | {"mask": tf.io.read_file(self.masks[record["id"]])}


def find(dataset, data_dir, split, max_bad_fraction, remembered=None):
    """Finds the source of images with masks that --dataset and a split name; says what it holds.

    Args:
      dataset: a folder of Pascal VOC; a folder with images/<split>/NAME.jpg and masks/<split>/NAME.png, or
        with <split>/images and <split>/masks, or with images and masks alone; or a set of TFDS with masks. With images
        and masks alone, every fifth image is held out. classes.txt beside the folders names the classes, one per line;
        the first is number 0.
      data_dir: as `dataset.find` has it.
      remembered: a file that remembers which images can be decoded.

    Raises:
      ConfigError: there is no such data set, or its masks cannot be used as they are.
    """
    root = expanded(data_dir, dataset)
    try:
        if root.exists() and not tfds.is_prepared(root):
            return _of_folder(root, split, max_bad_fraction, remembered)
        return _of_prepared(tfds.find(dataset, data_dir, split, max_bad_fraction, _of_masks))
    except ValueError as error:
        raise ConfigError(f"--dataset={printable(dataset)}: {error}") from None


def require_pillow():
    """Refuses to begin without Pillow, which reads the numbers of palettes."""
    try:
        import PIL.Image  # noqa: F401
    except ImportError:
        raise ConfigError("masks are read by Pillow: pip install 'moco_tf[transfer]'") from None


def decode(encoded):
    """A mask's PNG -> uint8 (H, W, 1), in the graph: a palette's numbers, not its colours."""
    # `one` is bytes in a graph, and an array around them outside.
    mask = tf.numpy_function(lambda one: values(np.asarray(one).item()), [encoded], tf.uint8, stateful=False)
    return tf.ensure_shape(mask, (None, None))[..., tf.newaxis]


def values(encoded):
    """A mask's PNG -> uint8 (H, W): the numbers in the file; TensorFlow's decoder would make a palette's colours.

    Raises:
      ValueError: it is not an image of one channel with values of 0 to 255.
    """
    from PIL import Image, UnidentifiedImageError

    try:
        image = Image.open(io.BytesIO(encoded), formats=("PNG",))
        if image.mode not in ("L", "P", "1", "I", "I;16"):
            raise ValueError(f"a mask has one channel of class numbers; this one has the mode {image.mode}")
        found = np.array(image)
        if image.format == "PNG" and image.mode == "L" and (bits := encoded[DEPTH]) < 8:
            found //= 255 // (2**bits - 1)  # Pillow stretches grey of few bits up to 255
    except (UnidentifiedImageError, OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"it cannot be decoded: {files.first_line(error)}") from None
    if found.min(initial=0) < 0 or found.max(initial=0) > IGNORED:
        raise ValueError(f"a mask's values are 0 to {IGNORED}; this one has {found.min()} to {found.max()}")
    return found.astype(np.uint8)


def _of_folder(root, split, max_bad_fraction, remembered):
    parts = annotated.parts(split)
    names = _names(root)
    if any(voc.is_at(root, part) for part, _ in parts):
        paths, of_masks = voc.masks(root, parts)
        names = names or VOC_CLASSES
    else:
        paths, of_masks = _paired(root, split)
    if not paths:
        raise ValueError(f"the split {split!r} names no images")
    log.info(f"{printable(str(root))}, {split}: {len(paths)} images")
    checked = annotated.check(root, paths, remembered, max_bad_fraction)
    paths, of_masks = ([each[number] for number in checked.good] for each in (paths, of_masks))
    counts = _check(root, of_masks, checked.sizes)
    present = np.flatnonzero(counts[:IGNORED])
    if names and present.max(initial=0) >= len(names):
        raise ValueError(
            f"masks hold numbers of classes, 0 to {len(names) - 1} ({IGNORED}: ignored); those of {split!r} hold "
            f"{present.max()}: name all classes in {NAMES}, or mend the masks"
        )
    _require_two(present, split)
    names = names or tuple(str(number) for number in range(present.max() + 1))
    percent = 100 * counts / counts.sum()
    shares = ", ".join(f"{names[n]} {percent[n]:.1f} %" for n in present[:10])
    log.info(f"  Pixels: {shares}{', ...' if len(present) > 10 else ''}; ignored {percent[IGNORED]:.1f} %")
    with tf.device("CPU:0"):
        contents, of_masks = (
            tf.constant([os.path.join(os.fsencode(root), os.fsencode(path)) for path in each])
            for each in (paths, of_masks)
        )
        labels = tf.fill((len(paths),), tf.constant(-1, tf.int64))
        return Masked(f"{printable(str(root))} {split}", contents, labels, names, tf.io.read_file, masks=of_masks)


def _require_two(present, split):
    """Refuses masks with fewer than two classes, which a network that tells nothing apart would fit."""
    if len(present) < 2:
        raise ValueError(
            f"a segmenter tells two classes apart or more; the masks of {split!r} hold "
            f"{'the number ' + str(present[0]) if len(present) else 'no number'} alone ({IGNORED} is ignored): write "
            f"objects as 1, not {IGNORED}"
        )


def _names(root):
    """Returns the names in classes.txt as a tuple; empty without the file."""
    try:
        lines = Path(root, NAMES).read_text(encoding="utf-8", errors="backslashreplace").splitlines()
    except OSError:
        return ()
    return tuple(printable(line.strip()) for line in lines if line.strip())


def _paired(root, split):
    """(paths of images, paths of masks), relative to `root`, of the folders `images` and `masks`."""
    for images, masks in ((f"{IMAGES}/{split}", f"{MASKS}/{split}"), (f"{split}/{IMAGES}", f"{split}/{MASKS}")):
        if Path(root, images).is_dir() and Path(root, masks).is_dir():
            return _matched(root, images, masks)
    flat = Path(root, IMAGES)
    if not flat.is_dir() or not Path(root, MASKS).is_dir():
        raise ValueError(
            f"masks come from Pascal VOC's folders ({voc.IMAGES}, {voc.SEGMENTED}, {voc.SETS}), or stand in {MASKS}/ "
            f"by the names of the images in {IMAGES}/, a folder a split in either; {printable(str(root))} has neither"
        )
    folders = sorted(entry.name for entry in os.scandir(flat) if entry.is_dir())
    if folders:
        raise ValueError(
            f"{IMAGES} and {MASKS} both hold a folder a split; {IMAGES} has {some(folders)}; got {split!r}"
        )
    paths, masks = _matched(root, IMAGES, MASKS)
    kind = splits.split_of(split)
    if kind is None:
        raise ValueError(f"{IMAGES} and {MASKS} hold no folders of splits, so a split is train or test; got {split!r}")
    held_out = kind in splits.HELD_OUT
    log.info(f"  There are no splits: each {HELD_OUT}th image, by name, is held out for evaluation")
    keep = [(number % HELD_OUT == HELD_OUT - 1) == held_out for number in range(len(paths))]
    return tuple([path for path, kept in zip(each, keep, strict=True) if kept] for each in (paths, masks))


def _matched(root, images, masks):
    names = [name for name in os.listdir(Path(root, images)) if name.lower().endswith(SUFFIXES)]
    names = sorted(name for name in names if not name.startswith("."))
    pairs = [(os.path.join(images, name), os.path.join(masks, f"{os.path.splitext(name)[0]}.png")) for name in names]
    return [image for image, _ in pairs], [mask for _, mask in pairs]


def _check(root, paths, sizes):
    """Counts the pixels of each value, int64 (256,), in all masks; refuses a mask of another size than its image.

    Raises:
      ValueError: a mask is missing, cannot be decoded, or does not fit its image.
    """

    def look(path, size):
        name = printable(path)
        try:
            found = values(Path(root, path).read_bytes())
        except OSError as error:
            raise ValueError(f"the mask {name} cannot be read: {error.strerror}") from None
        except ValueError as error:
            raise ValueError(f"the mask {name}: {error}") from None
        if found.shape != tuple(size):
            shapes = " and ".join(f"{width} x {height}" for height, width in (size, found.shape))
            raise ValueError(f"a mask has its image's size; image and {name} have {shapes} pixels")
        return np.bincount(found.ravel(), minlength=IGNORED + 1)

    with concurrent.futures.ThreadPoolExecutor() as pool:
        return sum(pool.map(look, paths, sizes.tolist()), np.zeros(IGNORED + 1, np.int64))


def _of_masks(tfds, features, name):
    """Returns what `tfds.find` takes for a set with masks: (features to read, the classes, example -> fields)."""
    images = [key for key, one in features.items() if isinstance(one, tfds.features.Image) and key != "image"]
    masks = [key for key in images if features[key].shape[-1] == 1 and features[key].np_dtype == np.uint8]
    masks = masks if len(masks) == 1 else [key for key in masks if "mask" in key or "segmentation" in key]
    if len(masks) != 1:
        raise ValueError(
            f"masks of a TFDS set are one image of one channel beside the image; {name} has {', '.join(features)}"
        )
    return {masks[0]: True}, (), lambda example: {"mask": example[masks[0]]}


def _of_prepared(source):
    """Returns the stream with as many classes as its masks' values show; reads all masks to find out."""
    counts = np.zeros(IGNORED + 1, np.int64)
    for record in source.unchecked().as_numpy_iterator():
        counts += np.bincount(values(record["mask"]).ravel(), minlength=IGNORED + 1)
    present = np.flatnonzero(counts[:IGNORED])
    _require_two(present, source.name)
    return dataclasses.replace(source, class_names=tuple(str(number) for number in range(present.max() + 1)))
