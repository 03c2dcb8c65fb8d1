"""`python -m moco_tf.evaluate.knn --encoder=DIR`: how well the nearest neighbours predict an image's class.

It needs no training and no tuning. The --train_split images with the nearest features vote on the class of each image
of --eval_split, as in the monitor of training (Wu et al. 2018). Writes the accuracies for each number of neighbours
(metrics.csv, .png) and per class (per_class.csv), the confusions, and summary.json.
"""

import dataclasses
import logging
import sys

from moco_tf import command
from moco_tf.evaluate import settings as common

log = logging.getLogger("moco_tf")


@dataclasses.dataclass(frozen=True)
class Settings(common.Encoding):
    k: tuple[int, ...] = command.flag(
        (1, 5, 10, 20, 50, 100, 200), "Numbers of neighbours that vote; the last gives the summary. The monitor: 200."
    )
    temperature: float = command.flag(0.1, "t: a neighbour's vote weighs exp(cosine / t). The monitor: 0.1.")
    on: str = command.flag(
        "features",
        "features: the backbone's; embedding: the projection, as the authors' CIFAR-10 demo has it.",
        choices=("features", "embedding"),
    )

    NAME = "knn"

    def __post_init__(self):
        super().__post_init__()
        ascending = list(self.k) == sorted(set(self.k)) and min(self.k, default=0) > 0
        command.require(self, ascending, "k", "lists numbers from 1 up in ascending order")
        command.require(self, self.temperature >= 0.01, "temperature", "is at least 0.01")


def main(arguments):
    """Runs the command; returns the process's exit status."""
    return common.run("moco_tf.evaluate.knn", __doc__, Settings, judge, arguments)


def judge(settings):
    """Classifies the images of the evaluation by their neighbours and writes the results; returns `Scores`."""
    from moco_tf.evaluate import nearest_neighbors, scores, subject

    encoder, _ = subject.encoder(settings)
    train, test = subject.labelled(settings, encoder.preprocessing)
    encoder = subject.by_engine(settings, encoder, train, test)
    bank, queries = (subject.features(settings, encoder, images, settings.on) for images in (train, test))
    subject.check_classes(bank[1], queries[1], train.class_names)
    classes = len(train.class_names)
    cosines, numbers = nearest_neighbors.nearest(bank[0], queries[0], settings.k[-1])
    results = []
    for k in settings.k:
        ranked = nearest_neighbors.rank(cosines[:, :k], bank[1][numbers[:, :k]], classes, settings.temperature)
        results.append(scores.score(ranked, queries[1], classes))
    rows = [{"k": k} | scores.accuracies(s) for k, s in zip(settings.k, results, strict=True)]
    images = {"train_images": len(bank[1]), "eval_images": len(queries[1])}
    scores.write(settings.output, results[-1], train.class_names, settings, rows, "k", **images)
    best = max(rows, key=lambda row: row["top1"])
    log.info(
        f"kNN, k {settings.k[-1]}, {len(bank[1])} images of {train.name} vote on {len(queries[1])} of {test.name}: "
        f"{results[-1]}."
        + (f" Best is k {best['k']} with {best['top1']:.1f} %." if best["k"] != settings.k[-1] else "")
        + f" {settings.output}"
    )
    return results[-1]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
