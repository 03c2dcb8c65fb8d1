"""Frozen features of a source's images. Axes: N images, S side, C features."""

import logging
import time

import numpy as np
import tensorflow as tf

from moco_tf import progress
from moco_tf.data.views import central

log = logging.getLogger("moco_tf")


def extract(encode, source, preprocessing, limit=None, labelled=False, views=None):
    """Encodes the central view of each image.

    Args:
      encode: a function of normalised images (N, S, S, 3) -> features (N, C).
      source: a `Source` of records.
      preprocessing: the encoder's `Preprocessing`.
      limit: if given, take at most this many records, evenly spread.
      labelled: leave out records without a label.
      views: what `views_of` returns for the same arguments, if the caller has it already.

    Returns:
      NumPy arrays: features (N, C) float32, labels (N,) int64, -1 where unknown.
    """
    views = views or views_of(source, preprocessing, limit, labelled)
    most = min(limit or source.size, source.size)
    features, labels, count = np.empty((0, 0), np.float32), np.empty(most, np.int64), 0
    for batch, of_batch, _ in stream(encode, views, most):
        if not count:
            features = np.empty((most, batch.shape[1]), np.float32)  # a list of batches would need the memory twice
        features[count : count + len(batch)] = batch
        labels[count : count + len(batch)] = of_batch
        count += len(batch)
    return features[:count], labels[:count]


def views_of(source, preprocessing, limit=None, labelled=False):
    """Returns the central views of a source's images, as `extract` takes them."""
    records = source.in_order(limit).filter(lambda record: not labelled or record["label"] >= 0)
    return central(records, preprocessing)


def stream(encode, batches, total):
    """Yields NumPy batches (features (N, C) float32, labels (N,), ids (N,)); shows a bar, or logs a line a minute."""
    started, minutes = time.monotonic(), progress.Minutes()
    done = 0
    with progress.bar(total, "images", "Encoding") as bar:
        for images, labels, ids in batches:
            yield tf.cast(encode(images), tf.float32).numpy(), labels.numpy(), ids.numpy()
            done += len(ids)
            bar.update(len(ids))
            if bar.disable and minutes.passed():
                rate = done / (time.monotonic() - started)
                log.info(f"  {done} of {total} images encoded, {rate:.0f} images/s")
