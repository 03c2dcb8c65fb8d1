"""Checks the image files that annotations (boxes or masks) name, before training.

`coco.py` and `voc.py` read people's annotation files. `boxes.py` and `masks.py` make sources of them.
"""

import dataclasses
import logging
import os
from pathlib import Path
from typing import NamedTuple

import numpy as np

from moco_tf.data import manifest
from moco_tf.data.check import remarks
from moco_tf.data.folder import UNREADABLE, Besides, Listing, size_and_time, some
from moco_tf.files import printable

log = logging.getLogger("moco_tf")


class Checked(NamedTuple):
    """The annotated images that can be decoded."""

    good: np.ndarray  # their numbers, int64 (N,)
    sizes: np.ndarray  # their height and width, int64 (N, 2)


def check(root, paths, remembered, max_bad_fraction):
    """Reads all image files once, or only those that the manifest does not know; says how many are left out.

    Args:
      root: the folder that holds all images.
      paths: the images' paths, relative to `root`.
      remembered: the manifest's path (`manifest.check_files`).
      max_bad_fraction: the fraction of the images that may be undecodable.

    Returns:
      `Checked`.

    Raises:
      ValueError: a file is missing, or too many cannot be decoded.
    """
    stats = [size_and_time(os.path.join(root, path)) for path in paths]
    missing = [path for path, (size, _) in zip(paths, stats, strict=True) if size == UNREADABLE]
    if missing:
        raise ValueError(
            f"{len(missing)} of {len(paths)} annotated images are not in {printable(root)}: {some(missing)}; put them "
            "there, or take them out of the annotations"
        )
    sizes, times = np.array(stats, np.int64).T
    listing = Listing(Path(root), (), list(paths), sizes, times, Besides(), Path(root))
    checked = manifest.check_files(listing, remembered)
    if refusal := manifest.too_many_bad(checked.bad, len(paths), max_bad_fraction):
        raise ValueError(refusal)
    for sentence in remarks(checked.verdicts):
        log.info(f"  {sentence}")
    if checked.bad:
        names = some([name for name, _ in checked.bad])
        log.warning(f"  Left out, as they cannot be decoded: {len(checked.bad)} images, {names}")
    good = [number for number, verdict in enumerate(checked.verdicts) if not verdict.problem]
    decoded = [(checked.verdicts[number].height, checked.verdicts[number].width) for number in good]
    return Checked(np.array(good, np.int64), np.array(decoded, np.int64).reshape(-1, 2))


def parts(split):
    """The parts of a split, (sub-folder, name) pairs: "VOC2007/trainval+VOC2012/trainval" has two."""
    return [(os.path.dirname(part), os.path.basename(part)) for part in split.split("+")]


def with_more_classes(source, names):
    """Returns the source with the classes `names`, which begin with its own, so that class numbers stay.

    Raises:
      ValueError: `names` does not begin with the source's classes.
    """
    if tuple(names[: len(source.class_names)]) != tuple(source.class_names):
        raise ValueError(f"{source.name} has the classes {', '.join(source.class_names)}, not {', '.join(names)}")
    return dataclasses.replace(source, class_names=tuple(names))
