"""What a dictionary, queue or bank, begins with."""

import tensorflow as tf

from moco_tf.losses import unit_length

BLOCK = 65_536  # rows that are drawn at a time


def fill_with_random_unit_vectors(variable, seed):
    """Of a variable (number, dim), on all replicas; beside it no more than a block is held."""
    number, dim = variable.shape
    for first in range(0, number, BLOCK):
        last = min(first + BLOCK, number)
        drawn = tf.random.stateless_normal((last - first, dim), (seed, first), dtype=variable.dtype)
        block = tf.IndexedSlices(unit_length(drawn), tf.range(first, last))
        for copy in getattr(variable.value, "values", [variable.value]):
            copy.scatter_update(block)
