"""Computes accuracies from ranked classes and writes them to files. Axes: N images, L classes. All in percent."""

import csv
import dataclasses
import io
from pathlib import Path

import numpy as np

from moco_tf import files
from moco_tf.evaluate import plots


@dataclasses.dataclass(frozen=True, eq=False)
class Scores:
    """How accurate a classifier's ranking of classes is.

    Attributes:
      top1, top5: accuracies; top5 is None with 5 classes or fewer.
      of_class: (L,) accuracy of each class, NaN where it has no image; counts: (L,) images of each class.
      confusions: (M, 3) integers: class, predicted class (-1: none), how often; only pairs that occur.
    """

    top1: float
    top5: float | None
    of_class: np.ndarray
    counts: np.ndarray
    confusions: np.ndarray

    def __str__(self):
        return f"top-1 {self.top1:.1f} %" + ("" if self.top5 is None else f", top-5 {self.top5:.1f} %")


def score(ranked, labels, classes):
    """Returns the `Scores` of ranked classes (N, up to 5), best first, -1 for none, against labels (N,)."""
    hits = ranked == labels[:, None]
    counts = np.bincount(labels, minlength=classes)
    with np.errstate(invalid="ignore"):
        of_class = 100 * np.bincount(labels, weights=hits[:, 0], minlength=classes) / counts
    pairs, times = np.unique(np.stack([labels, ranked[:, 0]], 1), axis=0, return_counts=True)
    top5 = 100 * float(np.mean(hits.any(axis=1))) if classes > 5 else None
    return Scores(100 * float(np.mean(hits[:, 0])), top5, of_class, counts, np.column_stack([pairs, times]))


def accuracies(scores):
    """Returns the accuracies as columns of metrics.csv, a dict; blank where there is no top-5."""
    return {"top1": round(scores.top1, 4), "top5": "" if scores.top5 is None else round(scores.top5, 4)}


def write(folder, scores, class_names, settings, rows, over, **facts):
    """Writes each command's results: summary.json, metrics.csv and its plot, per_class.csv, confusions.csv and .png.

    Args:
      settings: of the command; facts: further entries of summary.json.
      rows: of metrics.csv, a list of dicts; over: the column over which their accuracies are plotted.
    """
    folder = Path(folder)
    summary = {
        "command": settings.NAME,
        "encoder": settings.encoder,
        "top1": round(scores.top1, 4),
        "top5": None if scores.top5 is None else round(scores.top5, 4),
        **facts,
        "images_of": settings.images,
        "class_names": list(class_names),
        "settings": dataclasses.asdict(settings),
    }
    write_rows(folder / "metrics.csv", rows)
    per_class = [
        {"class": name, "images": int(count), "top1": round(float(of_class), 4) if count else ""}
        for name, count, of_class in zip(class_names, scores.counts, scores.of_class, strict=True)
    ]
    write_rows(folder / "per_class.csv", per_class)
    names = [*class_names, ""]  # the last one: -1, no class
    confusions = [{"class": names[a], "taken_for": names[b], "times": int(n)} for a, b, n in scores.confusions]
    write_rows(folder / "confusions.csv", confusions)
    plots.curves(folder / "metrics.png", rows, over, *(name for name in rows[0] if "top" in name))
    plots.confusion(folder / "confusion.png", scores.confusions, scores.counts, class_names)
    files.write_json(folder / "summary.json", summary)


def write_rows(path, rows):
    """Writes a CSV file of dicts with the same keys, in one step."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    files.write_text(path, text.getvalue())
