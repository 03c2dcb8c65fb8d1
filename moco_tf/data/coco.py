"""COCO's annotation files: a JSON with images, annotations and categories (cocodataset.org, "Data format")."""

import json
import os
from pathlib import Path

import numpy as np

from moco_tf.files import printable

# Where people keep the file of a split, relative to the data set's folder.
FILES = ("annotations/instances_{}.json", "annotations/{}.json", "{}.json", "{}/_annotations.coco.json")
IMAGES = ("{}", "images/{}", "images", "")  # and its images' folder


def file_of(root, split):
    """The annotation file of a split, or None."""
    return next((path for path in (Path(root, name.format(split)) for name in FILES) if path.exists()), None)


def read(file, root, split):
    """Reads the boxes of an annotation file.

    Returns:
      (paths of the images relative to `root`; each image's height and width from the file, zeros where it has none;
      each image's boxes: left, top, right, bottom in pixels, float64 (n, 4); the classes of each image's boxes, int64
      (n,); which of each image's boxes are regions of a crowd, bool (n,); the classes' names).

    Raises:
      ValueError: it is not a COCO file, or names an unknown image or category.
    """
    name = printable(str(file))
    try:
        # Outlines are most of the file: they are dropped while it is read.
        content = json.loads(Path(file).read_text(encoding="utf-8"), object_hook=_without_outline)
        images, categories = content["images"], sorted(content["categories"], key=lambda category: category["id"])
        numbers = {category["id"]: number for number, category in enumerate(categories)}
        names = tuple(printable(category["name"]) for category in categories)
        places = {image["id"]: place for place, image in enumerate(images)}
        files = [os.fspath(image["file_name"]) for image in images]
        for what, count, different in (
            ("image ids", len(images), len(places)),
            ("category ids", len(categories), len(numbers)),
            ("category names", len(names), len(set(names))),
        ):
            if different < count:
                raise ValueError(f"{what} are different ones; {count - different} of {count} occur twice")
        sizes = [(int(image.get("height") or 0), int(image.get("width") or 0)) for image in images]
        boxes, classes, crowds = ([[] for _ in images] for _ in range(3))
        for annotation in content.get("annotations", ()):
            place, category = places.get(annotation["image_id"]), numbers.get(annotation["category_id"])
            if place is None or category is None:
                known = "image_id" if place is None else "category_id"
                raise ValueError(
                    f"annotation {annotation.get('id')} names {known} {annotation[known]}, which the file does not "
                    "list"
                )
            left, top, width, height = map(float, annotation["bbox"])
            boxes[place].append((left, top, left + width, top + height))
            classes[place].append(category)
            crowds[place].append(bool(annotation.get("iscrowd", 0)))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{name} is not a JSON file: {error}") from None
    except KeyError as error:
        raise ValueError(f"{name} is not as COCO has it: {error.args[0]!r} is missing") from None
    except (TypeError, AttributeError, OverflowError) as error:
        raise ValueError(f"{name} is not as COCO has it: {error}") from None
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
    folder = _folder_of(files, root, split) if files else ""
    paths = [os.path.normpath(os.path.join(folder, file)) for file in files]
    shaped = [np.array(of_image, np.float64).reshape(-1, 4) for of_image in boxes]
    return (
        paths,
        sizes,
        shaped,
        [np.array(c, np.int64) for c in classes],
        [np.array(c, bool) for c in crowds],
        names,
    )


def _without_outline(value):
    value.pop("segmentation", None)
    return value


def _folder_of(files, root, split):
    """Returns the first folder that has any of the files, or the first of all folders if none has."""
    folders = [name.format(split) for name in IMAGES]
    sample = files[:: max(1, len(files) // 20)]
    return next(
        (folder for folder in folders if any(Path(root, folder, file).exists() for file in sample)), folders[0]
    )
