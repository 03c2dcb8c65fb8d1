"""Pascal VOC's folders: JPEGImages, Annotations, SegmentationClass, ImageSets (Everingham et al. 2010)."""

import os
import xml.etree.ElementTree
from pathlib import Path

import numpy as np

from moco_tf.files import printable

IMAGES, ANNOTATIONS, SETS = "JPEGImages", "Annotations", "ImageSets"
SEGMENTED, AUGMENTED = "SegmentationClass", "SegmentationClassAug"  # the second by Hariharan et al. 2011 (train_aug)
ENDINGS = (".jpg", ".jpeg", ".png", ".JPG", ".JPEG", ".PNG")


def is_at(root, part=""):
    return Path(root, part, IMAGES).is_dir()


def boxes(root, parts):
    """Like `coco.read`, for the (sub-folder, split) pairs `parts`; difficult objects are regions of a crowd.

    Coordinates in files count from 1 and include the last pixel, so 1 is subtracted from left and top.
    """
    paths, sizes, found = [], [], []
    for part, split in parts:
        for name in _listed(root, part, "Main", split):
            paths.append(_image(root, part, name))
            size, objects = _annotation(Path(root, part, ANNOTATIONS, f"{name}.xml"))
            sizes.append(size)
            found.append(objects)
    names = tuple(sorted({one[0] for objects in found for one in objects}))
    numbers = {name: number for number, name in enumerate(names)}
    return (
        paths,
        sizes,
        [np.array([one[1] for one in objects], np.float64).reshape(-1, 4) for objects in found],
        [np.array([numbers[one[0]] for one in objects], np.int64) for objects in found],
        [np.array([one[2] for one in objects], bool) for objects in found],
        tuple(printable(name) for name in names),
    )


def masks(root, parts):
    """(paths of the images, paths of their masks, both relative to `root`) of the (sub-folder, split) pairs."""
    paths, of_masks = [], []
    for part, split in parts:
        augmented = "aug" in split and Path(root, part, AUGMENTED).is_dir()
        for name in _listed(root, part, "Segmentation", split):
            paths.append(_image(root, part, name))
            of_masks.append(os.path.join(part, AUGMENTED if augmented else SEGMENTED, f"{name}.png"))
    return paths, of_masks


def _listed(root, part, kind, split):
    """The names of a split's images."""
    file = Path(root, part, SETS, kind, f"{split}.txt")
    try:
        lines = file.read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    except OSError as error:
        there = ", ".join(sorted(path.stem for path in file.parent.glob("*.txt"))) or "none"
        raise ValueError(
            f"the split {split!r} is listed in {printable(str(file))}, which cannot be read ({error.strerror}); there "
            f"are {there}"
        ) from None
    return [line.split()[0] for line in lines if line.strip()]


def _image(root, part, name):
    """Returns the path of an image; the list does not tell its ending."""
    paths = [os.path.join(part, IMAGES, name + ending) for ending in ENDINGS]
    return next((path for path in paths if os.path.exists(os.path.join(root, path))), paths[0])


def _annotation(file):
    """Reads a file: ((height, width), zeros if it has none; [(class, (left, top, right, bottom), difficult)])."""
    try:
        root = xml.etree.ElementTree.parse(file).getroot()
        objects, size = [], tuple(int(root.findtext(f"size/{side}", "0")) for side in ("height", "width"))
        for one in root.iter("object"):
            corners = [float(one.find("bndbox").find(side).text) for side in ("xmin", "ymin", "xmax", "ymax")]
            difficult = one.findtext("difficult", "0").strip() == "1"
            box = (corners[0] - 1, corners[1] - 1, *corners[2:])
            objects.append((one.findtext("name").strip(), box, difficult))
        return size, objects
    except OSError as error:
        raise ValueError(f"{printable(str(file))} cannot be read: {error.strerror}") from None
    except (xml.etree.ElementTree.ParseError, AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"{printable(str(file))} is not as VOC has it: {error}") from None
