"""keras-cv's RetinaNet (Lin et al. 2017, arXiv:1708.02002) on the pyramid of an encoder.

Heads, anchors, matching, losses and the choice of boxes come from keras-cv. This module builds the feature pyramid
network with BatchNorm, which the paper adds to new layers (He et al. 2020, section 4.2: the features of encoders
trained without labels have other distributions, and tuning BN calibrates them). Axes: N batch, S canvas, L classes, A
anchors.
"""

import math

import keras
import keras_cv
import numpy as np
import tensorflow as tf
from keras import layers

from moco_tf.encoders.batch_norm import BatchNorm
from moco_tf.transfer.annotated_views import NOTHING
from moco_tf.transfer.average_precision import MOST_DETECTIONS

BOXES = "xyxy"  # keras-cv's name for left, top, right, bottom in pixels
LEVELS = ("P3", "P4", "P5", "P6", "P7")
SCALES, ASPECT_RATIOS = (1.0, 2 ** (1 / 3), 2 ** (2 / 3)), (0.5, 1.0, 2.0)
PRIOR = 0.01  # probability of an object before training (section 4.1)
BACKGROUND, IGNORED = -1.0, -2.0  # keras-cv's classes of anchors on no object, and of anchors between the two
MEAN_AT_FIRST, DECAY = 100.0, 0.9  # of the moving mean of anchors on objects, as in Detectron2
LEAST_SCORE, MOST_OVERLAP = 0.05, 0.5  # of the boxes that are kept, as in Detectron2


def retinanet(trunk, classes, smallest_anchor, head_layers, pyramid_channels):
    """Builds the model: images float32 (N, S, S, 3), normalised -> {"box": (N, A, 4), "classification": (N, A, L)}.

    Args:
      trunk: what `encoders.pyramid.pyramid` returns.
      smallest_anchor: side in pixels of the anchors at P3; each level doubles it. 32 in the paper.
      head_layers: convolutions of 256 channels before the predictions of boxes and of classes.
      pyramid_channels: of each map of the feature pyramid. 256 in the paper.
    """
    return keras_cv.models.RetinaNet(
        backbone=trunk,
        num_classes=classes,
        bounding_box_format=BOXES,
        anchor_generator=keras_cv.layers.AnchorGenerator(
            bounding_box_format=BOXES,
            sizes=[smallest_anchor * 2.0**level for level in range(len(LEVELS))],
            scales=list(SCALES),
            aspect_ratios=list(ASPECT_RATIOS),
            strides=[2**level for level in range(3, 3 + len(LEVELS))],
            clip_boxes=True,
        ),
        classification_head=_head(classes, -math.log((1 - PRIOR) / PRIOR), head_layers),
        box_head=_head(4, 0.0, head_layers),
        feature_pyramid=_feature_pyramid(
            {level: trunk.output[level].shape[-1] for level in LEVELS[:3]}, pyramid_channels
        ),
        prediction_decoder=keras_cv.layers.MultiClassNonMaxSuppression(
            bounding_box_format=BOXES,
            from_logits=True,
            iou_threshold=MOST_OVERLAP,
            confidence_threshold=LEAST_SCORE,
            max_detections=MOST_DETECTIONS,
            max_detections_per_class=MOST_DETECTIONS,
        ),
    )


class Loss(tf.Module):
    """keras-cv's focal loss and smooth L1 of a batch of `annotated_views.boxed`: (model, batch) -> a scalar.

    As in Detectron2, the losses are divided by a moving mean of the number of anchors on objects. keras-cv divides by
    the batch's own number. Then the network learns nothing from a batch without objects. A batch with very few
    objects, which occurs where many images are background, has a gradient tens of times as large as other batches, and
    destroys what the network has learnt.

    Attributes:
      on_objects: the moving mean, a variable. It is part of the training's state.
    """

    def __init__(self):
        super().__init__("loss")
        self.on_objects = tf.Variable(MEAN_AT_FIRST, trainable=False, name="on_objects")
        self._of_classes = keras_cv.losses.FocalLoss(from_logits=True, reduction="sum")
        self._of_boxes = keras_cv.losses.SmoothL1Loss(reduction="sum")

    def __call__(self, model, batch):
        images = batch["image"]
        predicted = model({"images": images}, training=True)
        truth = {"boxes": batch["boxes"], "classes": tf.cast(batch["classes"], tf.float32)}
        boxes, classes = model.label_encoder(images, truth)  # (N, A, 4), (N, A): a class, BACKGROUND or IGNORED
        on_object = tf.cast(classes > BACKGROUND, tf.float32)
        counts = tf.cast(classes != IGNORED, tf.float32)
        number = tf.maximum(tf.reduce_sum(on_object), 1.0)
        mean = self.on_objects.assign(DECAY * self.on_objects + (1 - DECAY) * number)
        labels = tf.one_hot(tf.cast(classes, tf.int32), predicted["classification"].shape[-1])
        return (
            self._of_classes(labels, predicted["classification"], sample_weight=counts)
            + self._of_boxes(boxes, predicted["box"], sample_weight=on_object)
        ) / mean


def detect(model, images):
    """Images float32 (N, S, S, 3), S known, -> (boxes (N, 100, 4) on the canvas, scores (N, 100), classes (N, 100)).

    Classes are int64. The best boxes come first. Fewer than 100 boxes are padded with zeros, with the class `NOTHING`.
    """
    found = model.decode_predictions(model({"images": images}, training=False), images)
    classes = tf.cast(found["classes"], tf.int64)
    there = classes != NOTHING
    boxes = tf.where(there[..., tf.newaxis], found["boxes"], 0.0)
    return boxes, tf.where(there, found["confidence"], 0.0), classes


def _head(outputs, bias, head_layers):
    """Makes a keras-cv head that predicts `outputs` numbers for each anchor of a place and starts from `bias`."""
    return keras_cv.models.retinanet.PredictionHead(
        output_filters=len(SCALES) * len(ASPECT_RATIOS) * outputs,
        bias_initializer=keras.initializers.Constant(bias),
        num_conv_layers=head_layers,
    )


def _feature_pyramid(channels, width):
    """Builds the network P3 to P5 -> a list of P3 to P7, `width` channels each.

    It follows Lin et al. 2017 (arXiv:1612.03144), with RetinaNet's P6 and P7. channels: {level: number}, of P3 to P5.
    """
    inputs = {level: keras.Input((None, None, count), name=level) for level, count in channels.items()}
    lateral = {level: _convolution(x, width, 1, f"fpn.lateral.{level}") for level, x in inputs.items()}
    merged = {"P5": lateral["P5"]}
    for level, above in (("P4", "P5"), ("P3", "P4")):
        larger = layers.UpSampling2D(2, name=f"fpn.up.{level}")(merged[above])
        merged[level] = layers.Add(name=f"fpn.add.{level}")([lateral[level], larger])
    outputs = [_convolution(merged[level], width, 3, f"fpn.output.{level}") for level in LEVELS[:3]]
    p6 = _convolution(inputs["P5"], width, 3, "fpn.P6", strides=2)
    p7 = _convolution(layers.ReLU(name="fpn.P7.relu")(p6), width, 3, "fpn.P7", strides=2)
    return keras.Model(inputs, [*outputs, p6, p7], name="fpn")


def _convolution(x, channels, kernel, name, strides=1):
    x = layers.Conv2D(channels, kernel, strides=strides, padding="same", use_bias=False, name=name)(x)
    return BatchNorm(name=f"{name}.bn")(x)


def anchors(model, size):
    """Returns the anchors of a canvas of `size` pixels, (A, 4)."""
    return np.concatenate(
        [np.asarray(level) for level in model.anchor_generator(image_shape=(size, size, 3)).values()]
    )
