"""Colorization: which colours does a grey picture have? (Zhang, Isola and Efros 2016, arXiv:1603.08511)

The plane of a and b of CIE Lab is cut into squares of ten. The squares that sRGB reaches are the classes. The decoder
gives a distribution over them for each pixel of a picture of a quarter of the side.

Axes: n images of this replica, S side, s = S / 4, Q classes.
"""

import functools

import keras
import numpy as np
import tensorflow as tf

from moco_tf import encoders
from moco_tf.data.views import central
from moco_tf.encoders import color_spaces
from moco_tf.methods.reconstruction import Reconstruction

STEP = 10  # of the squares, in units of a and b
NEAREST = 5  # classes among which a pixel's colour is divided
SIGMA = 5.0  # of the Gaussian that divides a colour among its classes, and that smooths the frequencies
SHRINKS = 4
COLORLESS = 5.0  # images without a pixel whose |a| or |b| is above it have weight 0
COUNTED = 1000  # images whose colours are counted


def backbone(config, options, inputs):
    """The backbone of a run: it takes RGB and sees luminance."""
    return encoders.of_config(config, before=lambda images: color_spaces.luminance(images, inputs))


def model(config, options, inputs, source):
    """The `Colorize` of a run."""
    return Colorize(
        backbone(config, options, inputs),
        rebalance=options.rebalance,
        bn_groups=options.bn_groups,
        preprocessing=inputs,
        seed=config.seed,
    )


@keras.saving.register_keras_serializable("moco_tf")
class Colorize(Reconstruction):
    """The loss is the weighted mean cross-entropy with each pixel's soft class. See `Reconstruction`.

    Args:
      rebalance: lambda of `class_weights`; 0.5 in the paper.

    Attributes:
      weights_of_classes: float variable (Q,), the weight of a pixel of each class; a run counts the colours of its
        images before it begins.
    """

    def __init__(self, backbone, rebalance=0.5, **settings):
        super().__init__(backbone, channels=len(classes()), shrinks=SHRINKS, **settings)
        self.rebalance = rebalance
        self.weights_of_classes = self.add_weight(
            name="weights_of_classes", shape=(len(classes()),), initializer="ones", trainable=False, autocast=False
        )

    def before_epoch(self, epoch, source):
        """Before the first epoch, counts the colours of a source's images."""
        if epoch:
            return
        counts = np.zeros(len(classes()))
        for images, *_ in central(source.in_order(COUNTED), self.preprocessing):
            near, _ = nearest_classes(colors(images, self.preprocessing))
            counts += np.bincount(near[..., 0].numpy().ravel(), minlength=len(counts))
        self.weights_of_classes.assign(class_weights(counts, self.rebalance))

    def corrupted(self, images, draw):
        """Returns the images, whose colours the encoder drops, and their colours (n, s, s, 2)."""
        return images, colors(images, self.preprocessing)

    def loss_of(self, predicted, images, of_images):
        near, shares = nearest_classes(tf.cast(of_images, predicted.dtype))  # n x s x s x 5 each
        log_predicted = tf.gather(tf.nn.log_softmax(predicted), near, batch_dims=3)
        losses = -tf.reduce_sum(shares * log_predicted, axis=3)
        weights = tf.gather(self.weights_of_classes.value, near[..., 0])
        colored = tf.reduce_any(tf.abs(of_images) > COLORLESS, axis=(1, 2, 3))
        return tf.reduce_mean(weights * losses, axis=(1, 2)) * tf.cast(colored, predicted.dtype)

    def get_config(self):
        return super().get_config() | {"rebalance": self.rebalance}


@functools.cache
def classes():
    """Returns the centres (Q, 2) of the squares of a and b that colours of sRGB reach, in order."""
    values = np.linspace(0, 1, 52, dtype=np.float32)
    rgb = np.stack(np.meshgrid(values, values, values), axis=-1).reshape(-1, 3)
    with tf.device("CPU:0"), tf.init_scope():
        reached = color_spaces.lab(tf.constant(rgb))[:, 1:].numpy()
    return np.unique(np.round(reached / STEP), axis=0).astype(np.float32) * STEP


def colors(images, preprocessing):
    """Returns a and b of normalised RGB images (n, S, S, 3), each the mean of 4 x 4 pixels: float32 (n, s, s, 2)."""
    rgb = tf.clip_by_value(preprocessing.denormalize(images) / 255, 0.0, 1.0)
    return tf.nn.avg_pool2d(color_spaces.lab(rgb)[..., 1:], SHRINKS, SHRINKS, "VALID")


def nearest_classes(of_pixels):
    """The five nearest classes of colours (..., 2), nearest first, int32 (..., 5), and their shares of the colour."""
    centers = tf.constant(classes(), of_pixels.dtype)
    squares = tf.reduce_sum((of_pixels[..., tf.newaxis, :] - centers) ** 2, axis=-1)  # ... x Q
    negative, near = tf.math.top_k(-squares, NEAREST)
    return near, tf.nn.softmax(negative / (2 * SIGMA**2))


def class_weights(counts, rebalance):
    """Returns the weight of a pixel of each class, (Q,), from its count: 1 / ((1 - l) p + l / Q), 1 on average.

    l: `rebalance`. p: the shares of the classes, smoothed by a Gaussian over a and b.
    """
    centers = classes().astype(np.float64)
    squares = ((centers[:, np.newaxis] - centers[np.newaxis]) ** 2).sum(axis=2)
    kernel = np.exp(-squares / (2 * SIGMA**2))
    smoothed = (kernel / kernel.sum(axis=0)) @ (counts / counts.sum())
    weights = 1 / ((1 - rebalance) * smoothed + rebalance / len(centers))
    return weights / (weights * smoothed).sum()
