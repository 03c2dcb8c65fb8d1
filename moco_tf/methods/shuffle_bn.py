"""Shuffling BN (MoCo, section 3.3): BatchNorm in groups of the batch, and keys encoded in another order than queries.

BatchNorm lets the images of a group see each other: a query could find its key by the other images in its group.
"""

import tensorflow as tf

from moco_tf import replicas
from moco_tf.encoders.batch_norm import BatchNorm
from moco_tf.methods import batch_norms


def groups_here(bn_groups):
    """Returns how many of the global batch's BN groups this replica has; bn_groups None: one per replica."""
    if bn_groups and bn_groups % replicas.count():
        raise ValueError(
            f"bn_groups counts groups of the global batch, a multiple of the {replicas.count()} replicas; "
            f"got {bn_groups}"
        )
    return (bn_groups or replicas.count()) // replicas.count()


def set_groups(encoder, groups):
    """Lets each BatchNorm of this replica normalise `groups` equal parts of its batch separately."""
    for layer in batch_norms.layers(encoder):
        if isinstance(layer, BatchNorm):
            layer.groups = groups
        elif groups > 1:
            raise ValueError(
                f"{groups} BN groups on one replica need BatchNorm layers that know groups; {layer.name!r} is Keras' "
                "own: build the backbone with moco_tf.encoders.BatchNorm, or leave bn_groups out"
            )


def shuffle_key_images(images, shuffle_bn, groups, seed):
    """Shuffles the images of all replicas, if `shuffle_bn` asks for it and the order has an effect.

    With one group in total the order has no effect: the function does nothing.

    Args:
      images: (n, ...) of this replica.
      groups: BN groups of this replica.
      seed: two integers; the order is a function of them.

    Returns:
      This replica's share (n, ...), and the permutation (N,) for `replicas.unshuffle`; without a shuffle, images and
      None.
    """
    if not shuffle_bn or groups * replicas.count() == 1:
        return images, None
    return replicas.shuffle(images, seed)


def check_groups(images, groups):
    """Returns this replica's batch (n, ...) unchanged; raises if not divisible into `groups` of at least 2 images."""
    if groups == 1:
        return images
    rule = f"each of the {groups} BN groups takes the same number of images, at least 2: change the batch size"
    batch = images.shape[0]
    if batch is None:  # for example a last partial batch: its size is known only when it comes
        batch = tf.shape(images)[0]
        fits = tf.debugging.assert_equal((batch % groups == 0) & (batch >= 2 * groups), True, rule)
        with tf.control_dependencies([fits]):  # before BatchNorm fails to divide it
            return tf.identity(images)
    if batch % groups or batch < 2 * groups:
        raise ValueError(f"{rule}; got {batch}")
    return images
