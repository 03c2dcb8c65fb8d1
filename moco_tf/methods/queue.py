"""The dictionary as a queue (MoCo, section 3.2): the newest keys replace the oldest.

Axes: K keys, C features, N batch.
"""

import keras
import tensorflow as tf

from moco_tf.methods.dictionary import fill_with_random_unit_vectors


class Queue(keras.layers.Layer):
    """`size` keys of length `dim`, first in first out; saved with the model, never trained.

    Starts with random unit vectors, as the papers' code does.

    with_ids: keeps for each key the int64 id of its record; ids start as -1.
    """

    def __init__(self, size, dim, seed=0, with_ids=False, **kwargs):
        super().__init__(**kwargs)
        self.size = size
        dtype = "float64" if self.variable_dtype == "float64" else "float32"  # never coarser
        self.keys = self.add_weight(
            name="keys",
            shape=(size, dim),
            initializer="zeros",
            dtype=dtype,
            trainable=False,
            autocast=False,
        )
        fill_with_random_unit_vectors(self.keys, seed)
        self.pointer = self.add_weight(name="pointer", shape=(), initializer="zeros", dtype="int64", trainable=False)
        self.ids = None
        if with_ids:
            self.ids = self.add_weight(
                name="ids",
                shape=(size,),
                initializer=keras.initializers.Constant(-1),
                dtype="int64",
                trainable=False,
            )
        self.built = True

    def enqueue(self, keys, ids=None):
        """Writes any N keys (N, C) and ids (N,) at the pointer, continues at row 0 after the last, moves it by N.

        The cost is O(N), as long as only `dictionary.look_up` reads `self.keys`: once a variable was written in place,
        TensorFlow copies all of it when it is read as a tensor. Call this after the last use of `self.keys` in the
        step.
        """
        count = tf.shape(keys, out_type=tf.int64)[0]
        surplus = tf.maximum(count - self.size, 0)  # only the last `size` keys would survive
        keys = tf.cast(keys[surplus:], self.keys.dtype)
        start = (self.pointer.value + surplus) % self.size
        places = (start + tf.range(count - surplus)) % self.size
        self.keys.value.scatter_update(tf.IndexedSlices(keys, places))
        if self.ids is not None:
            self.ids.value.scatter_update(tf.IndexedSlices(ids[surplus:], places))
        self.pointer.assign((self.pointer.value + count) % self.size)
