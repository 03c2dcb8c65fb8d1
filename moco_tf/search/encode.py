"""Encodes image files as vectors of unit length, with the facts of each image. Axes: N images, D numbers."""

import numpy as np
import tensorflow as tf

from moco_tf.command import ConfigError
from moco_tf.data import folder
from moco_tf.data.errors import of_the_system
from moco_tf.data.folder import UNKNOWN
from moco_tf.data.inputs.image import Preprocessing
from moco_tf.data.manifest import check_files
from moco_tf.data.sources import evenly_spread
from moco_tf.data.views import central
from moco_tf.evaluate import engines, subject
from moco_tf.evaluate.extract import stream
from moco_tf.files import printable
from moco_tf.methods.losses import unit_length
from moco_tf.search import parts


def open_encoder(settings):
    """Returns the `Encoder` that --encoder names.

    Raises:
      ConfigError: the encoder does not take single images.
    """
    encoder, _ = subject.encoder(settings)
    if type(encoder.preprocessing) is not Preprocessing:
        raise ConfigError(f"search takes encoders of single images; {printable(settings.encoder)} is of another input")
    return encoder


def by_engine(encoder, engine, listing, numbers):
    """Returns the encoder, computed by --engine, for the files of a `folder.Listing` with these numbers.

    A few of the files, evenly spread, check and time the engine. If none of them can be decoded, TensorFlow stays.
    """
    if engine == "tensorflow" or not numbers:
        return encoder
    some = [numbers[place] for place in evenly_spread(len(numbers), engines.PART)]
    checked = check_files(next(folder.divided(listing, some, len(some))))
    if len(checked.bad) == len(some):
        return encoder
    views = _views(encoder.preprocessing, checked)
    return engines.of(encoder, engine, views, len(numbers))


def function(encoder, on):
    """Returns a function of normalised images (N, S, S, C) -> (N, D + 2): unit-length vectors, brightness, contrast.

    on: which of the encoder's outputs.
    """

    @tf.function(reduce_retracing=True)
    def rows(images, outputs):
        grey = tf.reduce_mean(encoder.preprocessing.denormalize(images), axis=-1)
        mean, variance = tf.nn.moments(grey, axes=(1, 2))
        return tf.concat([unit_length(outputs), tf.stack([mean, tf.sqrt(variance)], axis=1)], axis=1)

    return lambda images: rows(images, encoder.encode(images)[on])


def encode_listing(encode, preprocessing, listing):
    """Encodes the files of a `folder.Listing`.

    Args:
      encode: a function that `function` returned.

    Returns:
      A list of `parts.Image`, a list of `parts.Broken`, and the vectors of the `parts.Image`, float32 (N, D).

    Raises:
      ConfigError: a vector is not finite.
    """
    checked = check_files(listing)
    facts = list(zip(listing.files, listing.sizes.tolist(), listing.times.tolist(), checked.verdicts, strict=True))
    broken = [
        parts.Broken(path, size, UNKNOWN if of_the_system(verdict.problem) else time, verdict.problem)
        for path, size, time, verdict in facts
        if verdict.problem
    ]
    good = [fact for fact in facts if not fact[-1].problem]
    rows = [encode(tf.zeros((1, *preprocessing.spec.shape[1:]))).numpy()[:0]]  # gives the width if no file is good
    if good:
        batches = _views(preprocessing, checked)
        rows += [rows_of for rows_of, _, _ in stream(encode, batches, len(good))]
    rows = np.concatenate(rows)
    subject.check_finite(rows)
    images = [
        parts.Image(*file, verdict.height, verdict.width, *np.round(facts_of, 2).tolist())
        for (*file, verdict), facts_of in zip(good, rows[:, -2:].astype(float), strict=True)
    ]
    return images, broken, rows[:, :-2]


def _views(preprocessing, checked):
    """Returns batches of the central views of the good files of a `manifest.Checked`, by `data.views.central`."""
    return central(preprocessing.records_of(checked.source()).in_order(), preprocessing)
