"""Learning rates as pure functions of the epoch (fractional, from 0), float64 scalars."""

import math

import tensorflow as tf


def steps(base, epoch, drops, factor=0.1):
    """`base` times `factor` for each epoch of `drops` that has been reached (MoCo v1: 120 and 160 of 200)."""
    epoch = tf.convert_to_tensor(epoch, tf.float64)
    passed = tf.reduce_sum(tf.cast(epoch >= tf.constant(drops, tf.float64), tf.float64))
    return base * tf.pow(tf.constant(factor, tf.float64), passed)


def cosine(base, epoch, epochs):
    """`base` down to 0 along a half cosine over `epochs` (MoCo v2)."""
    epoch = tf.convert_to_tensor(epoch, tf.float64)
    return base * (1.0 + tf.cos(math.pi * tf.minimum(epoch / epochs, 1.0))) / 2.0


def warm_up(rate, base, epoch, epochs):
    """A line from 0 up to `base` over the first `epochs`, then `rate` (Goyal et al. 2017, arXiv:1706.02677)."""
    epoch = tf.convert_to_tensor(epoch, tf.float64)
    return tf.where(epoch < epochs, base * epoch / max(epochs, 1e-9), rate)
