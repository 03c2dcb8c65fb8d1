"""The rows of a dictionary, queue or bank: their initial values, and how to read a few of many.

Axes: K rows, C features, N of them read.
"""

import tensorflow as tf

BLOCK = 65_536  # rows that are drawn at a time


def fill_with_random_unit_vectors(variable, seed):
    """Gives each row of a variable (K, C) a random direction, on all replicas; holds only one block beside it."""
    size, width = variable.shape
    for first in range(0, size, BLOCK):
        last = min(first + BLOCK, size)
        drawn = tf.random.stateless_normal((last - first, width), (seed, first), dtype=variable.dtype)
        block = tf.IndexedSlices(tf.math.l2_normalize(drawn, axis=1), tf.range(first, last))
        for copy in getattr(variable.value, "values", [variable.value]):
            copy.scatter_update(block)


def look_up(dictionary, places):
    """Reads rows (N, C) at places (N,) of a tensor or variable (K, C), in O(N) even if replicas mirror the variable.

    `tf.gather` copies a mirrored variable as a whole.
    """
    if not hasattr(dictionary, "handle"):
        return tf.gather(dictionary, places)
    rows = tf.raw_ops.ResourceGather(resource=dictionary.handle, indices=places, dtype=dictionary.dtype)
    return tf.ensure_shape(rows, (*places.shape, *dictionary.shape[1:]))
