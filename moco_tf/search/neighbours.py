"""Finds the nearest other images of each image of an index, in blocks. Axes: N images, k neighbours of each."""

import logging

import numpy as np

from moco_tf import progress
from moco_tf.evaluate import nearest_neighbors
from moco_tf.search import vector_index

log = logging.getLogger("moco_tf")


def nearest_others(index, k):
    """Finds the k nearest other images of each image of an `Index`, the nearest first.

    Returns:
      cosines float32 (N, k), numbers int32 (N, k), -1 where an approximate index finds no more; k is at most N - 1.
    """
    count = len(index.part.images)
    k = min(k, count - 1)
    cosines, numbers = np.full((count, k), -1, np.float32), np.full((count, k), -1, np.int32)
    minutes, first = progress.Minutes(), 0
    for block in vector_index.blocks(index.part.vectors):
        near, rows = _nearest(index, block, k + 1)
        itself = rows == np.arange(first, first + len(block))[:, None]
        itself[~itself.any(axis=1), -1] = True  # among k + 1 copies, it may miss itself: drop the last one
        cosines[first : first + len(block)] = near[~itself].reshape(len(block), k)
        numbers[first : first + len(block)] = rows[~itself].reshape(len(block), k)
        first += len(block)
        if minutes.passed():
            log.info(f"  {first} of {count} images compared")
    return cosines, numbers


def _nearest(index, queries, k):
    if index.about.index_type == "flat":  # also exact; matrix products are several times faster for many queries
        return nearest_neighbors.nearest(index.part.vectors, queries, k)
    return index.search(queries, k)
