"""Frozen features of a source's images. Axes: N images, S side, C features."""

import numpy as np
import tensorflow as tf

BATCH = 256


def extract(encode, source, preprocessing, limit=None, labelled=False):
    """Encodes the central view of each image.

    Args:
      encode: a function of normalised images (N, S, S, 3) -> features (N, C).
      source: a `Source` of records.
      preprocessing: the encoder's `Preprocessing`.
      limit: if given, take at most this many records, evenly spread.
      labelled: leave out records without a label.

    Returns:
      NumPy arrays: features (N, C) float32, labels (N,) int64, -1 where unknown.
    """

    def central_view(record):
        return preprocessing.of_encoded(record["image"]), record["label"]

    batches = (
        source.in_order(limit)
        .filter(lambda record: not labelled or record["label"] >= 0)
        .map(central_view, num_parallel_calls=tf.data.AUTOTUNE)
        .batch(BATCH)
        .prefetch(tf.data.AUTOTUNE)
    )
    features, labels = [], []
    for images, batch_labels in batches:
        features.append(tf.cast(encode(images), tf.float32).numpy())
        labels.append(batch_labels.numpy())
    return np.concatenate(features), np.concatenate(labels)
