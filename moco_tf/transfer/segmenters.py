"""Networks that give each pixel a class: the paper's FCN-16s, and keras-cv's DeepLabV3+.

Each network maps images float32 (N, S, S, 3), normalised -> logits (N, S, S, L).
"""

import keras
import keras_cv
import tensorflow as tf
from keras import layers

from moco_tf.data.masks import IGNORED
from moco_tf.encoders.batch_norm import BatchNorm
from moco_tf.encoders.resnet import KAIMING_NORMAL

CHANNELS, DILATION = 256, 6


def fcn(trunk, classes, size):
    """Builds FCN-16s as in MoCo's appendix: two dilated 3x3 convolutions on conv5, then a classifier of each place.

    It has "two extra 3x3 convolutions of 256 channels, with BN and ReLU, and then a 1x1 convolution"; the extra
    convolutions have dilation 6 (He et al. 2020, arXiv:1911.05722, appendix A.5; Long et al. 2015). The stride is 16,
    and a bilinear resize makes the full size.
    """
    images = keras.Input((size, size, 3), name="images")
    x = trunk(images)["P5"]  # N x S/16 x S/16 x C
    for index in (1, 2):
        x = layers.Conv2D(
            CHANNELS,
            3,
            padding="same",
            dilation_rate=DILATION,
            use_bias=False,
            kernel_initializer=keras.initializers.VarianceScaling(**KAIMING_NORMAL),
            name=f"fcn.conv{index}",
        )(x)
        x = layers.ReLU(name=f"fcn.relu{index}")(BatchNorm(name=f"fcn.bn{index}")(x))
    start = keras.initializers.RandomNormal(stddev=0.01)
    x = layers.Conv2D(classes, 1, kernel_initializer=start, name="fcn.classifier")(x)
    return keras.Model(images, layers.Resizing(size, size, name="fcn.resize")(x), name="fcn")


def deeplab(trunk, classes, size):
    """Builds keras-cv's DeepLabV3+ (Chen et al. 2018, arXiv:1802.02611) on P2 and P5, at a quarter of the resolution.

    Its last layers are built here and return logits, as the library's own end in a softmax. The layers before them use
    Keras' BatchNorm, whose statistics move by 1 % per step.
    """
    head = keras.Sequential(
        [
            layers.Conv2D(CHANNELS, 1, use_bias=False, name="deeplab.conv"),
            BatchNorm(name="deeplab.bn"),
            layers.ReLU(name="deeplab.relu"),
            layers.Conv2D(classes, 1, name="deeplab.classifier"),
        ],
        name="deeplab.head",
    )
    model = keras_cv.models.DeepLabV3Plus(num_classes=classes, backbone=trunk, segmentation_head=head)
    images = keras.Input((size, size, 3), name="images")
    return keras.Model(images, layers.Resizing(size, size, name="deeplab.resize")(model(images)), name="deeplab")


def loss(model, batch):
    """Returns the cross-entropy, a scalar, over a batch of `annotated_views.masked` without pixels of `IGNORED`."""
    logits = model(batch["image"], training=True)
    mask = tf.cast(batch["mask"][..., 0], tf.int32)
    counted = tf.cast(mask != IGNORED, tf.float32)
    each = tf.nn.sparse_softmax_cross_entropy_with_logits(tf.where(mask == IGNORED, 0, mask), logits)
    return tf.reduce_sum(each * counted) / tf.maximum(tf.reduce_sum(counted), 1.0)


def of_own_size(logits, scaled, size):
    """Returns the class of each pixel of an image at its own size: logits (S, S, L) of the canvas -> int64 (H, W).

    scaled: height and width of the image on the canvas; size: its own height and width, H and W.
    """
    own = logits[: scaled[0], : scaled[1]]
    return tf.argmax(tf.image.resize(own, size), axis=-1)  # to the same size, resizing changes nothing
