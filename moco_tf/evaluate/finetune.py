"""`python -m moco_tf.evaluate.finetune --encoder=RUN --labels=10`: trains an encoder and a classifier on some labels.

--init=random starts the same network from scratch, for a fair comparison. With --labels=100 that is supervised
training. Writes the network (model.keras: normalised images -> logits), summary.json, metrics.csv, accuracies per
class, confusions and pictures.
"""

import dataclasses
import logging
import math
import sys
import time
from pathlib import Path

import numpy as np

from moco_tf import command, files, progress
from moco_tf.command import ConfigError
from moco_tf.evaluate import settings as common

EVALUATIONS = 10  # in one training, evenly spread over its epochs

log = logging.getLogger("moco_tf")


@dataclasses.dataclass(frozen=True)
class Settings(common.Settings):
    init: str = command.flag(
        "encoder", "Where the encoder's weights start: encoder, as pre-trained; random.", choices=("encoder", "random")
    )
    labels: float = command.flag(
        100.0,
        "Percent of the training images that are used: as many of each class as far as they reach, at least one, "
        "fixed by --seed; a smaller subset is a part of a larger one. Semi-supervised papers: 1, 10.",
    )
    epochs: int = command.flag(30, "Passes over these images.")
    batch_size: int = command.flag(128, "Images a step; at most as many as there are.")
    lr: float = command.flag(
        0.03, "Learning rate, for encoder and classifier; down to 0 along a cosine, at each step."
    )
    weight_decay: float = command.flag(1e-4, "L2 coefficient, as PyTorch's SGD has it.")
    crop_min: float = command.flag(0.08, "Least area of a random crop, as a share of the image. Papers: 0.08.")

    NAME = "finetune"
    RUNS_ONLY = True

    def __post_init__(self):
        super().__post_init__()
        command.require(self, 0 < self.labels <= 100, "labels", "is a percentage, more than 0 and at most 100")
        for name in ("epochs", "lr"):
            command.require(self, getattr(self, name) > 0, name, "is more than 0")
        command.require(self, self.batch_size >= 2, "batch_size", "is at least 2")
        command.require(self, self.weight_decay >= 0, "weight_decay", "is 0 or more")
        command.require(self, 0 < self.crop_min <= 1, "crop_min", "is more than 0 and at most 1")

    def resolved(self):
        settings = super().resolved()
        if self.output:
            return settings
        return dataclasses.replace(settings, output=f"{settings.output}-{self.init}-{self.labels:g}")


def main(arguments):
    """Runs the command; returns the process's exit status."""
    return common.run("moco_tf.evaluate.finetune", __doc__, Settings, judge, arguments, training=True)


def judge(settings):
    """Trains as the settings say and writes the results; returns `Scores`."""
    from moco_tf import build, run_folder
    from moco_tf.evaluate import subject

    preprocessing = build.inputs(run_folder.recorded(settings.encoder))
    subject.check_images(preprocessing)
    train, test = subject.labelled(settings, preprocessing)
    return train_and_judge(settings, train, test)


def train_and_judge(settings, train, test):
    """Trains an encoder with a classifier on labelled sources, evaluates and writes the results; returns `Scores`."""
    import tensorflow as tf

    from moco_tf import frozen
    from moco_tf.data import augment, views
    from moco_tf.evaluate import scores, subject

    started, minutes = time.monotonic(), progress.Minutes()
    numbers, labels = _numbers_and_labels(train, settings.limit)
    chosen = balanced_subset(labels, settings.labels, settings.seed)
    if len(chosen) < train.size:
        train = train.only(numbers[chosen])
    subject.check_classes(labels[chosen], labels[chosen], train.class_names)
    batch_size = min(settings.batch_size, len(chosen))
    steps = -(-len(chosen) // batch_size)
    model, preprocessing = network(settings, len(train.class_names))
    optimizer, learn = optimizer_and_step(settings, model, steps)
    encode = tf.function(lambda images: {"logits": model(images, training=False)})
    classifier = frozen.Encoder(preprocessing, encode, "classifier")
    task = augment.Labelled(preprocessing, settings.crop_min)
    share = 100 * len(chosen) / len(labels)  # more than --labels if that gives less than one image per class
    of_class = np.bincount(labels[chosen], minlength=len(train.class_names))
    log.info(
        f"{settings.init} weights, {len(chosen)} of the {len(labels)} labelled images of {train.name} ({share:.3g} %: "
        f"{_of_each_class(of_class, train.class_names)}), {settings.epochs} epochs of {steps} steps."
    )

    rows = []
    every = max(1, settings.epochs // EVALUATIONS)
    epochs = range(1, settings.epochs + 1)
    for epoch in progress.bar(settings.epochs, "epochs", "Fine-tuning", epochs):
        loss = right = seen = 0.0
        for images, of_images in views.labelled(train, task, batch_size, settings.seed, epoch):
            if len(of_images) > 1:  # one image has no variance, which BatchNorm needs
                sums = learn(images, of_images)
                loss, right, seen = loss + float(sums[0]), right + float(sums[1]), seen + len(of_images)
        loss, accuracy = loss / seen, right / seen
        if not math.isfinite(loss):
            raise ConfigError(f"the loss is {loss} in epoch {epoch} at --lr={settings.lr:g}: take a lower one")
        row = {"epoch": epoch, "step": int(optimizer.iterations), "loss": loss}
        row |= {"train_top1": round(100 * accuracy, 4), "top1": "", "top5": ""}
        if epoch % every == 0 or epoch == settings.epochs:
            logits, truth = subject.features(settings, classifier, test, "logits")
            ranked = tf.math.top_k(logits, min(5, logits.shape[1])).indices.numpy()
            result = scores.score(ranked, truth, len(train.class_names))
            row |= scores.accuracies(result)
            if minutes.passed():
                log.info(f"  epoch {epoch} of {settings.epochs}: loss {loss:.3f}, {result}")
        rows.append(row)

    output = Path(settings.output)
    subject.check_classes(labels[chosen], truth, train.class_names)
    with files.aside(output / "model.keras") as writing:
        model.save(files.for_tensorflow(writing))
    facts = {"train_images": len(chosen), "train_percent": round(share, 4), "train_images_of_class": of_class.tolist()}
    facts |= {"eval_images": len(truth), "steps": int(optimizer.iterations)}
    facts["seconds"] = round(time.monotonic() - started, 1)
    scores.write(output, result, train.class_names, settings, rows, "epoch", **facts)
    log.info(
        f"Fine-tuned from {settings.init} weights on {share:.3g} % of {train.name} ({len(chosen)} images), "
        f"judged on {len(truth)} images of {test.name}: {result}. {output}"
    )
    return result


def network(settings, classes):
    """Returns the network of normalised images -> logits (N, L), float32, and its input format.

    A BatchNorm without parameters normalises the features before the classifier: "features produced by unsupervised
    pre-training can have different distributions", and BN in new layers calibrates them (He et al. 2020, section 4.2).
    """
    import keras

    from moco_tf import build, run_folder
    from moco_tf.encoders.batch_norm import BatchNorm
    from moco_tf.methods.ema import copy_weights

    config = run_folder.recorded(settings.encoder)
    pretrained = build.trained(settings.encoder).backbone if settings.init == "encoder" else None
    keras.utils.set_random_seed(settings.seed)
    start = keras.initializers.RandomNormal(stddev=0.01, seed=settings.seed)
    with build.precision("bfloat16" if config.precision == "bfloat16" else "float32"):  # float16 needs a loss scale
        backbone = build.backbone(config)
        features = BatchNorm(affine=False, name="head_norm")(backbone.output)  # a ViT already has a layer "norm"
        logits = keras.layers.Dense(classes, kernel_initializer=start, dtype="float32", name="fc")(features)
    if pretrained:
        copy_weights(pretrained, backbone)
    return keras.Model(backbone.input, logits), build.inputs(config)


def optimizer_and_step(settings, model, steps):
    """Returns the optimizer, for `steps` per epoch, and a function that learns from a batch of images and labels (N,).

    The function returns the sum of the losses before its step, and how many images it classified correctly. (Keras'
    `fit` makes one step too many on a dataset of unknown length.)
    """
    import tensorflow as tf

    from moco_tf import schedules
    from moco_tf.optimizers import SGD

    def rate():
        return schedules.cosine(settings.lr, tf.cast(optimizer.iterations, tf.float64) / steps, settings.epochs)

    optimizer = SGD(rate, weight_decay=settings.weight_decay)
    optimizer.build(model.trainable_variables)

    @tf.function(reduce_retracing=True)
    def learn(images, labels):
        with tf.GradientTape() as tape:
            logits = model(images, training=True)
            losses = tf.nn.sparse_softmax_cross_entropy_with_logits(labels, logits)
            loss = tf.reduce_mean(losses)
        optimizer.apply(tape.gradient(loss, model.trainable_variables), model.trainable_variables)
        return tf.reduce_sum(losses), tf.reduce_sum(tf.cast(tf.argmax(logits, 1) == labels, tf.float32))

    return optimizer, learn


def balanced_subset(labels, percent, seed):
    """Returns places (M,) in labels (N,) of `percent` of the images, ascending: as balanced as the classes allow.

    Takes first one image of each class, then a second image of each class, and so on. If a class has no more images,
    images of the other classes fill its place. The subset has at least one image of each class. The subset of a
    smaller percentage is a part of the subset of a larger percentage.
    """
    shuffled = np.random.default_rng(seed).permutation(len(labels))
    by_class = np.argsort(labels[shuffled], kind="stable")
    counts = np.unique(labels, return_counts=True)[1]
    rank = np.empty(len(labels), np.int64)  # of each shuffled image among the images of its class
    rank[by_class] = np.arange(len(labels)) - np.repeat(np.cumsum(counts) - counts, counts)
    number = max(round(percent / 100 * len(labels)), len(counts))
    return np.sort(shuffled[np.argsort(rank, kind="stable")[:number]])


def _of_each_class(counts, names):
    """Says in a few words how many images were taken of each class; counts: (L,)."""
    from moco_tf.evaluate.subject import SHOWN

    taken, names = counts[counts > 0], [name for name, count in zip(names, counts, strict=True) if count]
    if len(set(taken)) == 1:
        return f"{taken[0]} of each class"
    if len(names) <= SHOWN:
        return ", ".join(f"{name} {count}" for name, count in zip(names, taken, strict=True))
    return f"from {taken.min()} ({names[taken.argmin()]}) to {taken.max()} ({names[taken.argmax()]}) of a class"


def _numbers_and_labels(source, limit):
    """Returns the numbers and the labels of a source's labelled images, at most `limit`, int64 (N,) each."""
    from moco_tf.data.sources import evenly_spread

    if hasattr(source, "labels"):
        numbers, labels = source.good, source.labels.numpy()[source.good]
    else:  # a stream has to be read for its labels
        records = source.in_order().map(lambda record: (record["id"], record["label"])).batch(4096)
        numbers, labels = (np.concatenate(part) for part in zip(*records.as_numpy_iterator(), strict=True))
    numbers, labels = numbers[labels >= 0], labels[labels >= 0]
    if limit:
        some = evenly_spread(len(labels), limit)
        numbers, labels = numbers[some], labels[some]
    return numbers, labels


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
