"""COCO's average precision, as pycocotools computes it."""

import contextlib
import io

import numpy as np

from moco_tf.command import ConfigError

MOST_DETECTIONS = 100  # per image


def require_pycocotools():
    """Raises if pycocotools is missing."""
    try:
        import pycocotools.cocoeval  # noqa: F401
    except ImportError:
        raise ConfigError("average precision is computed by pycocotools: pip install 'moco_tf[transfer]'") from None


def average_precision(truth, detections, classes):
    """Computes AP (IoU .50 to .95), AP50, AP75, AP50 regardless of class, and AP of each class, in percent.

    Args:
      truth: for each image (boxes (n, 4), left, top, right, bottom; classes (n,); crowds bool (n,)). Detections in a
        crowd do not count, and neither does a missed crowd.
      detections: for each image (boxes (m, 4), scores (m,), classes (m,)).
      classes: the number of classes.

    Returns:
      {"ap", "ap50", "ap75", "ap50_any_class": float, "ap_of_class": (classes,)}; NaN where there is nothing to find.
    """
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    annotations, results = [], []
    for number, (boxes, of, crowds) in enumerate(truth, start=1):
        for box, one, crowd in zip(boxes, of, crowds, strict=True):
            found = _xywh(box)
            annotations.append(
                {"id": len(annotations) + 1, "image_id": number, "category_id": int(one) + 1, "bbox": found,
                 "area": found[2] * found[3], "iscrowd": int(crowd)}
            )  # fmt: skip
    for number, (boxes, scores, of) in enumerate(detections, start=1):
        for box, score, one in zip(boxes, scores, of, strict=True):
            results.append(
                {"image_id": number, "category_id": int(one) + 1, "bbox": _xywh(box), "score": float(score)}
            )
    nothing = np.full(classes, np.nan)
    if all(annotation["iscrowd"] for annotation in annotations):
        return {"ap": np.nan, "ap50": np.nan, "ap75": np.nan, "ap50_any_class": np.nan, "ap_of_class": nothing}
    if not results:
        present = {annotation["category_id"] - 1 for annotation in annotations if not annotation["iscrowd"]}
        nothing[list(present)] = 0.0
        return {"ap": 0.0, "ap50": 0.0, "ap75": 0.0, "ap50_any_class": 0.0, "ap_of_class": nothing}
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints its progress
        coco = COCO()
        coco.dataset = {
            "images": [{"id": number} for number in range(1, len(truth) + 1)],
            "categories": [{"id": number} for number in range(1, classes + 1)],
            "annotations": annotations,
        }
        coco.createIndex()
        found = coco.loadRes(results)
        judged = COCOeval(coco, found, "bbox")
        judged.evaluate()
        judged.accumulate()
        any_class = COCOeval(coco, found, "bbox")
        any_class.params.useCats = 0
        any_class.evaluate()
        any_class.accumulate()
    precision = judged.eval["precision"][..., 0, -1]  # IoU x recall x class, for any area, with MOST_DETECTIONS
    return {
        "ap": _mean(precision),
        "ap50": _mean(precision[0]),
        "ap75": _mean(precision[5]),
        "ap50_any_class": _mean(any_class.eval["precision"][0, :, :, 0, -1]),
        "ap_of_class": np.array([_mean(precision[..., number]) for number in range(classes)]),
    }


def _xywh(box):
    left, top, right, bottom = (float(value) for value in box)
    return [left, top, right - left, bottom - top]


def _mean(precision):
    """Returns the mean in percent where there is something to find; pycocotools writes -1 elsewhere."""
    there = precision[precision > -1]
    return float(100 * there.mean()) if there.size else float("nan")
