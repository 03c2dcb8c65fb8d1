"""What the replicas of a model do together. Axes: N batch.

Shuffling BN (MoCo, section 3.3): BatchNorm lets the images of one normalisation group see each other, and a
query could find its key by the company it keeps. Keys are therefore encoded in another order than queries.
"""

import tensorflow as tf


def shuffle(images, seed):
    """Puts images (N, ...) into a random order, a function of `seed` (two integers).

    Returns:
      The images and the permutation (N,) that `unshuffle` needs.
    """
    permutation = tf.random.experimental.stateless_shuffle(tf.range(tf.shape(images)[0]), seed)
    return tf.gather(images, permutation), permutation


def unshuffle(features, permutation):
    """Puts features (N, ...) of shuffled images back into the images' own order."""
    return tf.gather(features, tf.math.invert_permutation(permutation))
