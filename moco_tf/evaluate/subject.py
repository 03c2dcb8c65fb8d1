"""Opens what the commands of evaluation need: the encoder, labelled images, and the encoder's features of them."""

import logging
from pathlib import Path

import numpy as np

from moco_tf import build, frozen, run_folder
from moco_tf.command import ConfigError
from moco_tf.data import dataset
from moco_tf.data.sources import numbered_alike
from moco_tf.evaluate import engines
from moco_tf.evaluate.extract import extract, views_of

LABELS = {"images": "a folder has a sub-folder for each class", "sentences": "a line is label<TAB>sentence"}
SHOWN = 10  # classes that a log line names

log = logging.getLogger("moco_tf")


def encoder(settings):
    """Returns the `Encoder` that --encoder names, and its model, which is None for a SavedModel."""
    if run_folder.recorded(settings.encoder) is None:
        return frozen.read(settings.encoder), None
    model = build.trained(settings.encoder)
    return frozen.of_model(model), model


def by_engine(settings, encoder, *sources):
    """Returns the encoder, computed by --engine, for the images of these sources, at most --limit of each."""
    if settings.engine == "tensorflow":
        return encoder
    views = views_of(sources[0], encoder.preprocessing, settings.limit)
    total = sum(min(settings.limit or source.size, source.size) for source in sources)
    return engines.of(encoder, settings.engine, views, total)


def source(settings, split, preprocessing):
    """Opens a split for an encoder with this `preprocessing`; lists a folder's files in a file beside the results.

    Raises:
      ConfigError: there is no such split, or the encoder cannot read its contents.
    """
    name = "".join(c if c.isalnum() else "_" for c in split[:50])  # file names have at most 255 bytes
    manifest = Path(settings.output) / f"{name}_images.csv"
    where = settings.dataset, settings.data_dir, split
    channels = preprocessing.channels_of_files
    found = dataset.find(*where, settings.max_bad_fraction, exif=settings.exif, channels=channels).open(manifest)
    if preprocessing.unit != found.unit:
        raise ConfigError(f"{found.name} holds {found.unit}, and --encoder is of {preprocessing.unit}")
    try:
        return preprocessing.records_of(found)
    except ValueError as error:
        raise ConfigError(f"--dataset={settings.dataset}: {error}") from None


def labelled(settings, preprocessing):
    """Returns the sources (training, evaluation) of labelled images, for an encoder with this `preprocessing`.

    Raises:
      ConfigError: as `source`; or a source has no labels, or there are fewer than two classes.
    """
    sources = [source(settings, split, preprocessing) for split in (settings.train_split, settings.eval_split)]
    for images in sources:
        if not images.labelled:
            raise ConfigError(
                f"--dataset={settings.dataset}: judging needs labels, and the {images.unit} of {images.name} have "
                f"none: {LABELS[images.unit]}"
            )
    train, test = numbered_alike(*sources)
    if len(names := train.class_names) < 2:
        raise ConfigError(f"--dataset={settings.dataset}: telling classes apart needs two; there is {names[0]!r} only")
    if same := train.shared_with(test):
        log.warning(
            f"{same} of the {test.size} {test.unit} of {test.name} are among those of {train.name}: this is accuracy "
            f"on what was learnt, not on new {test.unit}."
        )
    return train, test


def check_images(preprocessing):
    """Refuses an encoder of sentences, for commands that crop or show what they judge."""
    if preprocessing.unit == "sentences":
        raise ConfigError(
            "this command crops or shows images, and --encoder is of sentences; moco_tf.evaluate.knn, linear_probe, "
            "features and sts take sentences"
        )


def features(settings, encoder, images, on="features"):
    """Returns features (N, C) float32 and labels (N,) of the labelled images of a source, at most --limit.

    on: which of the `Encoder`'s outputs.

    Raises:
      ConfigError: no image is labelled, or a feature is not finite.
    """
    encode = lambda views: encoder.encode(views)[on]  # noqa: E731
    vectors, labels = extract(encode, images, encoder.preprocessing, settings.limit, labelled=True)
    if not len(labels):
        raise ConfigError(f"of the images taken of {images.name} none has a label: try a larger --limit")
    check_finite(vectors, images.unit)
    return vectors, labels


def check_finite(vectors, unit="images"):
    """Refuses features (N, C) with numbers that are not finite."""
    bad = int((~np.isfinite(vectors).all(axis=1)).sum())
    if bad:
        raise ConfigError(
            f"--encoder gives features that are not finite for {bad} of {len(vectors)} {unit}: its training has "
            "diverged; take an earlier checkpoint, or train at a lower --lr"
        )


def check_classes(labels, eval_labels, class_names):
    """Warns which classes of the evaluation have no training image; refuses fewer than two classes to learn.

    Raises:
      ConfigError: the training labels (N,) have only one class.
    """
    learnt = np.unique(labels)
    if len(learnt) < 2:
        raise ConfigError(f"telling classes apart needs two; all {len(labels)} images are {class_names[learnt[0]]!r}")
    missing = np.setdiff1d(eval_labels, learnt)
    if len(missing):
        names = ", ".join(class_names[label] for label in missing[:SHOWN])
        count = int(np.isin(eval_labels, missing).sum())
        log.warning(
            f"{len(missing)} classes have no image to learn from: {names}{', ...' if len(missing) > SHOWN else ''}. "
            f"Their {count} images of the evaluation count as wrong."
        )
