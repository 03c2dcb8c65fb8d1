"""`python -m moco_tf.evaluate.linear_probe --encoder=DIR`: a linear classifier on frozen features.

--lr=auto (the default) encodes each image once and trains classifiers at many learning rates side by side. It takes
the learning rate that is best on a held-out tenth of the *training* images, and trains with it on all of them. With a
number, the command works as the papers do: random crops, encoded anew in every epoch, at that learning rate
(configs/linear_v1.flags, configs/linear_v3.flags). Writes the classifier (probe.npz), summary.json, metrics.csv,
accuracies per class, confusions and pictures; with --lr=auto rates.csv and rates.png.
"""

import dataclasses
import hashlib
import logging
import sys
import time
from pathlib import Path

from moco_tf import command, files, progress
from moco_tf.command import ConfigError
from moco_tf.evaluate import settings as common

RATES = tuple(10 ** (n / 3) for n in range(-9, 8))  # .001 to 215

log = logging.getLogger("moco_tf")


@dataclasses.dataclass(frozen=True)
class Settings(common.Encoding):
    lr: str = command.flag(
        "auto", "Learning rate, or auto: the best of many on held-out training images. v1, v2: 30; v3: R50 0.1, ViT 3."
    )
    lr_scaling: str = command.flag(
        "none", "linear: multiply --lr by batch / 256. v1, v2: none, v3: linear.", choices=("none", "linear")
    )
    lr_schedule: str = command.flag(
        "cosine", "step: x 0.1 at each of --lr_drops (v1, v2); cosine: down to 0 (v3).", choices=("step", "cosine")
    )
    lr_drops: tuple[int, ...] = command.flag((60, 80), "Epochs at which --lr_schedule=step drops. v1, v2: 60,80.")
    epochs: int = command.flag(100, "Passes over the training images. v1, v2: 100, v3: 90.")
    batch_size: int = command.flag(256, "Images a step. v1, v2: 256, v3: 1024.")
    crop_min: float = command.flag(0.08, "Least area of a random crop, with --lr=NUMBER. Papers: 0.08.")
    batch_norm: bool = command.flag(
        False,
        "Normalise the features before the classifier, without parameters: rates then depend less on the encoder.",
    )

    NAME = "linear_probe"

    def __post_init__(self):
        super().__post_init__()
        if self.lr != "auto":
            try:
                positive = 0 < float(self.lr) < float("inf")
            except ValueError:
                positive = False
            command.require(self, positive, "lr", "is a number above 0, or auto")
        for name in ("epochs", "batch_size"):
            command.require(self, getattr(self, name) > 0, name, "is more than 0")
        command.require(self, 0 < self.crop_min <= 1, "crop_min", "is more than 0 and at most 1")
        ascending = list(self.lr_drops) == sorted(self.lr_drops) and min(self.lr_drops, default=0) >= 0
        command.require(self, ascending, "lr_drops", "lists epochs from 0 up in ascending order")
        if self.limit and self.lr != "auto":
            raise ConfigError(f"--limit={self.limit} goes with --lr=auto, which keeps features; got --lr={self.lr}")

    def factors(self):
        """Returns the factors of the learning rate, one float for each epoch."""
        from moco_tf import schedules

        if self.lr_schedule == "step":
            return [float(schedules.steps(1.0, epoch, self.lr_drops)) for epoch in range(self.epochs)]
        return [float(schedules.cosine(1.0, epoch, self.epochs)) for epoch in range(self.epochs)]


def main(arguments):
    """Runs the command; returns the process's exit status."""
    return common.run("moco_tf.evaluate.linear_probe", __doc__, Settings, judge, arguments)


def judge(settings):
    """Trains the probe that the settings describe and writes the results; returns `Scores`.

    Raises:
      ConfigError: the data has no labels, ...; or a tensor of the encoder changed.
    """
    from moco_tf.evaluate import subject

    encoder, model = subject.encoder(settings)
    if settings.lr != "auto":
        subject.check_images(encoder.preprocessing)
    train, test = subject.labelled(settings, encoder.preprocessing)
    encodings = 1 if settings.lr == "auto" else settings.epochs
    encoder = subject.by_engine(settings, encoder, test, *[train] * encodings)
    before = digests(model) if model else []
    result = probe(settings, encoder, train, test)
    if model:
        changed = [name for (name, a), (_, b) in zip(digests(model), before, strict=True) if a != b]
        if changed:
            raise ConfigError(
                f"a probe leaves its encoder alone, but {', '.join(changed)} changed: please report this"
            )
        log.info(
            f"All {len(before)} tensors of the encoder, BatchNorm's statistics included, are bit-equal to before."
        )
    return result


def probe(settings, encoder, train, test, learning=None, evaluation=None):
    """Trains a probe on an `Encoder`'s features of labelled sources and writes the results; returns `Scores`.

    learning, evaluation: (features, labels) of `train` and of `test`, if they are known already.
    """
    import numpy as np

    from moco_tf.evaluate import linear_classifiers, scores, subject

    started = time.monotonic()
    classes = len(train.class_names)
    evaluation = evaluation or subject.features(settings, encoder, test)
    factors = settings.factors()
    if settings.lr == "auto":
        learning = learning or subject.features(settings, encoder, train)
        subject.check_classes(learning[1], evaluation[1], train.class_names)
        rate = _best_rate(settings, *learning, classes, factors)
        heads = linear_classifiers.LinearClassifiers(
            evaluation[0].shape[1], classes, [rate], settings.seed, settings.batch_norm
        )
        epochs = linear_classifiers.fit(heads, *learning, settings.batch_size, factors, settings.seed)
    else:
        rate = float(settings.lr) * (settings.batch_size / 256 if settings.lr_scaling == "linear" else 1)
        heads = linear_classifiers.LinearClassifiers(
            evaluation[0].shape[1], classes, [rate], settings.seed, settings.batch_norm
        )
        epochs = _of_crops(settings, encoder, train, evaluation[1], heads, factors)

    rows, minutes = [], progress.Minutes()
    shown = progress.bar(settings.epochs, "epochs", "Linear probe", zip(factors, epochs, strict=True))
    for epoch, (factor, losses) in enumerate(shown, 1):
        kernel, bias = (part[..., 0, :] for part in heads.folded())
        result = scores.score(linear_classifiers.rank(evaluation[0], kernel, bias), evaluation[1], classes)
        loss = float(losses[0])
        if not np.isfinite(loss):
            raise ConfigError(f"the loss is {loss} in epoch {epoch} at --lr={rate:g}: take a lower --lr, or auto")
        rows.append({"epoch": epoch, "loss": loss, "learning_rate": rate * factor} | scores.accuracies(result))
        if minutes.passed():
            log.info(f"  epoch {epoch} of {settings.epochs}: loss {loss:.3f}, {result}")

    output = Path(settings.output)
    files.write_arrays(output / "probe.npz", {"kernel": kernel, "bias": bias})
    facts = {"eval_images": len(evaluation[1]), "learning_rate": rate, "identity": encoder.identity}
    facts["seconds"] = round(time.monotonic() - started, 1)
    scores.write(output, result, train.class_names, settings, rows, "epoch", **facts)
    log.info(
        f"Linear probe, rate {rate:.3g}, {settings.epochs} epochs, learnt on {train.name}, judged on "
        f"{len(evaluation[1])} images of {test.name}: {result}. {output}"
    )
    return result


def _best_rate(settings, features, labels, classes, factors):
    """Returns the learning rate that is best on held-out training images; writes the accuracy of each to rates.csv."""
    from moco_tf.evaluate import linear_classifiers, plots, scores

    top1s = linear_classifiers.search(
        features,
        labels,
        classes,
        RATES,
        settings.batch_size,
        factors,
        seed=settings.seed,
        batch_norm=settings.batch_norm,
    )
    rows = [
        {"learning_rate": float(f"{rate:.4g}"), "held_out_top1": round(float(top1), 4)}
        for rate, top1 in zip(RATES, top1s, strict=True)
    ]
    output = Path(settings.output)
    scores.write_rows(output / "rates.csv", rows)
    plots.curves(output / "rates.png", rows, "learning_rate", "held_out_top1", logarithmic=True)
    best = int(top1s.argmax())
    edge = " No rate beyond it was tried: take --batch_norm." if best in (0, len(RATES) - 1) else ""
    log.info(
        f"--lr=auto: of {len(RATES)} learning rates from {RATES[0]:g} to {RATES[-1]:.0f}, {RATES[best]:.3g} is best "
        f"on held-out training images, with {top1s[best]:.1f} %.{edge}"
    )
    return RATES[best]


def _of_crops(settings, encoder, source, eval_labels, heads, factors):
    """Trains on a new random view of each image in every epoch; yields each epoch's mean losses (1,)."""
    import numpy as np

    from moco_tf.data import augment, views
    from moco_tf.evaluate import subject

    task = augment.Labelled(encoder.preprocessing, settings.crop_min)
    for epoch, factor in enumerate(factors):
        total, seen = 0.0, []
        for images, labels in views.labelled(source, task, settings.batch_size, settings.seed, epoch):
            total += heads.step(encoder.encode(images)["features"], labels, factor).numpy() * len(labels)
            seen.append(labels.numpy())
        seen = np.concatenate(seen)
        if epoch == 0:
            subject.check_classes(seen, eval_labels, source.class_names)
        yield total / len(seen)


def digests(model):
    """Lists (path, SHA-256 of the bytes) of each variable of a model; a model's two encoders have the same paths."""
    return [(v.path, hashlib.sha256(v.numpy().tobytes()).hexdigest()) for v in model.variables]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
