"""Writes images with boxes in COCO's layout; tree_crowns.py and composite_scenes.py call it."""

import numpy as np

from moco_tf import files


def write(folder, split, pictures, categories):
    """Writes images/<split>/<name>.png and annotations/instances_<split>.json into a folder.

    pictures: (name, PIL image, boxes (B, 4) as left, top, width, height, their category numbers (B,)) of each image;
      an image without boxes is a background.
    categories: {number: name}; numbers begin at 1.

    Returns:
      (number of images, number of boxes).
    """
    place = folder / "images" / split
    place.mkdir(parents=True)
    images, annotations = [], []
    for number, (name, image, boxes, labels) in enumerate(pictures, 1):
        image.save(place / f"{name}.png")
        images.append({"id": number, "file_name": f"{name}.png", "width": image.width, "height": image.height})
        for box, label in zip(np.asarray(boxes).tolist(), labels, strict=True):
            annotation = {"id": len(annotations) + 1, "image_id": number, "category_id": int(label), "bbox": box}
            annotations.append(annotation | {"area": box[2] * box[3], "iscrowd": 0})
    (folder / "annotations").mkdir(exist_ok=True)
    named = [{"id": number, "name": name} for number, name in categories.items()]
    content = {"images": images, "annotations": annotations, "categories": named}
    files.write_json(folder / f"annotations/instances_{split}.json", content)
    return len(images), len(annotations)
