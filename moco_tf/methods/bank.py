"""The dictionary as a memory bank (Wu et al. 2018, arXiv:1805.01978, section 3.1): a key for each record of the data.

Axes: R records, C features, N batch, K negatives.
"""

import keras
import tensorflow as tf

from moco_tf.methods import dictionary
from moco_tf.methods.losses import log_normalizer, unit_length


class Bank(keras.layers.Layer):
    """Holds a key of length `dim` for each of `records` records; saved with the model, never trained.

    Starts with random unit vectors. Numbers of records are int64, 0 to R - 1. All draws are functions of a seed, two
    integers.
    """

    def __init__(self, records, dim, seed=0, **kwargs):
        super().__init__(**kwargs)
        self.records = records
        dtype = "float64" if self.variable_dtype == "float64" else "float32"  # never coarser
        self.keys = self.add_weight(
            name="keys",
            shape=(records, dim),
            initializer="zeros",
            dtype=dtype,
            trainable=False,
            autocast=False,
        )
        dictionary.fill_with_random_unit_vectors(self.keys, seed)
        self.built = True

    def look_up(self, numbers):
        """The keys (N, C) of records (N,)."""
        return dictionary.look_up(self.keys.value, numbers)

    def draw(self, count, seed):
        """Draws numbers (count,) uniformly from all records, with replacement."""
        return tf.random.stateless_uniform((count,), seed, maxval=self.records, dtype=tf.int64)

    def draw_others(self, count, numbers, seed):
        """Draws numbers (count,) of different records, none of them among `numbers` (N,); count <= R - N.

        They are the first records in a random order of all records. The whole order is not made: the cost is
        O(count N).
        """
        many = count + tf.shape(numbers)[0]
        # Not the key of `sources.Permutation`: with it, a step's negatives would be the images that come next.
        key = tf.random.experimental.stateless_fold_in(tf.stack([seed[0], tf.cast(seed[1], tf.int64)]), 1)
        drawn = tf.random.experimental.index_shuffle(tf.range(tf.cast(many, tf.int64)), key, self.records - 1)
        taken = tf.reduce_any(drawn[:, None] == numbers[None, :], axis=1)
        return tf.ensure_shape(tf.boolean_mask(drawn, ~taken)[:count], (count,))

    def draw_negatives(self, loss, count, numbers, seed):
        """Draws the records (count,) whose keys are negatives: with "nce" from all, else from outside the batch.

        numbers: (N,), the records of the global batch.
        """
        if loss == "nce":
            return self.draw(count, seed)
        most = self.records - (numbers.shape[0] or 1)
        if count > most:
            raise ValueError(
                f"the negatives of a batch are other records' keys: queue_size is at most {most} with "
                f"{self.records} records and {numbers.shape[0] or 1} images a batch; got {count}"
            )
        return self.draw_others(count, numbers, seed)

    def update(self, numbers, features, momentum):
        """key <- momentum * key + (1 - momentum) * feature, scaled to length 1, for records (N,); features: (N, C).

        A record that comes twice takes its first feature. The cost is O(N C + N^2). Call this after the last use of
        `self.keys` in the step, because that use needs the old keys.
        """
        # Scatter writes duplicates in no fixed order: they get the same value.
        first = tf.argmax(numbers[:, None] == numbers[None, :], axis=1)
        features = tf.gather(tf.cast(features, self.keys.dtype), first)
        moved = unit_length(momentum * self.look_up(numbers) + (1 - momentum) * features)
        self.keys.value.scatter_update(tf.IndexedSlices(moved, numbers))


def numbers_of(batch, records, what="a memory bank"):
    """Returns the numbers (n,) of a batch's records, places among `records`; what: the model's name in errors."""
    numbers = batch.get("id")
    if numbers is None or len(numbers.shape) != 1 or not numbers.dtype.is_integer:
        beside = batch["views"][1] if numbers is None and len(batch["views"]) > 1 else numbers
        got = "images alone" if beside is None else f"{beside.dtype.name} {beside.shape} beside the images"
        raise ValueError(
            f"{what} trains on (images, numbers): with each image the number of its record, an integer from 0 to "
            f"{records - 1}, which is its place there; got {got}"
        )
    return tf.cast(numbers, tf.int64)


def normalizer(log_z, step, queries, noise, temperature, records):
    """Returns log Z of NCE: estimated in the first step, from the queries (N, C) of all replicas; then constant."""
    return tf.cond(step == 0, lambda: log_normalizer(queries, noise, temperature, records), lambda: tf.identity(log_z))
