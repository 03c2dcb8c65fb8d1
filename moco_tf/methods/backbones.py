"""Checks what a backbone must be, and makes the key encoder from the query encoder."""

import keras
import numpy as np
import tensorflow as tf

from moco_tf.methods.ema import copy_weights
from moco_tf.methods.keras_internals import layers_of


def of_one_output(backbone):
    """Returns the backbone; if a functional backbone has several outputs, the part that gives "features".

    Raises:
      ValueError: none of the outputs has that name.
    """
    if not isinstance(backbone, keras.layers.Layer):
        raise ValueError(f"a backbone is a Keras model of images -> features; got {backbone!r}")
    outputs = getattr(backbone, "output", None)  # subclassed models have none
    if isinstance(outputs, (list, tuple)) and len(outputs) == 1:
        return keras.Model(backbone.input, outputs[0], name=backbone.name)
    if outputs is None or isinstance(outputs, keras.KerasTensor):
        return backbone
    if isinstance(outputs, dict) and "features" in outputs:
        return keras.Model(backbone.input, outputs["features"], name=backbone.name)
    names = list(outputs) if isinstance(outputs, dict) else backbone.output_names
    raise ValueError(
        f"a backbone has one output, or one of several called 'features'; this one has {', '.join(names)}: "
        "keras.Model(backbone.input, backbone.output[...]) takes one of them"
    )


def image_shape(backbone, preprocessing=None):
    """(H, W, C) of the backbone's input, None for a free side; C is 3 unless `preprocessing` says otherwise.

    A subclassed model does not state its input shape. It is built for the images that `preprocessing` (or a task's
    preprocessing) makes, or for 224 pixels.

    Raises:
      ValueError: the backbone does not take square images with C channels.
    """
    shape = getattr(backbone, "input_shape", None)  # subclassed models have none
    preprocessing = getattr(preprocessing, "preprocessing", preprocessing)
    channels = getattr(preprocessing, "channels", 3)
    if shape is None:
        size = preprocessing.image_size if preprocessing else 224
        return (size, size, channels)
    if not isinstance(shape, tuple) or len(shape) != 4 or shape[3] not in (channels, None):
        what = "in colour" if channels == 3 else f"of {channels} channels"
        raise ValueError(
            f"a backbone takes images {what}, (N, H, W, {channels}); this one takes {shape}: put layers before it "
            "that make its input of them"
        )
    if shape[1] != shape[2]:
        raise ValueError(f"a backbone takes square images, or any size; this one takes {shape[1]} x {shape[2]}")
    return (*shape[1:3], channels)


def clone(backbone):
    """Returns a model of the same build with its own weights."""
    if isinstance(backbone, (keras.Function, keras.Sequential)):
        return keras.models.clone_model(
            backbone, clone_function=lambda layer: type(layer).from_config(layer.get_config()), recursive=True
        )
    try:
        return type(backbone).from_config(backbone.get_config())
    except (NotImplementedError, TypeError):
        raise ValueError(
            f"the key encoder is made as the backbone's config says, which {type(backbone).__name__} does not give: "
            "write its get_config, or make it a functional model"
        ) from None


def start_key_encoder(query_encoder, key_encoder):
    """Makes a model of the same build a momentum encoder: it gets the query's weights, and none is trainable."""
    copy_weights(query_encoder, key_encoder)
    check_copied(query_encoder, key_encoder)
    # Per variable: `key_encoder.trainable = False` would put stock BatchNorm into inference mode.
    for variable in key_encoder.trainable_variables:
        variable.trainable = False


def check_copied(query_encoder, key_encoder):
    """Raises if a copy computes something else; checks only models with layers from outside Keras and this package.

    A layer can compute with values that are neither in its config nor in its weights.
    """
    foreign = {
        type(layer).__name__
        for layer in layers_of(query_encoder)
        if type(layer).__module__.split(".")[0] not in ("keras", "moco_tf")
    }
    if not foreign or not tf.executing_eagerly():
        return
    size = query_encoder.input_shape[1] or 64
    images = tf.random.stateless_normal((2, size, size, query_encoder.input_shape[3]), (0, 0))
    first, again, copy = (
        encoder(images, training=False)["features"].numpy() for encoder in (query_encoder, query_encoder, key_encoder)
    )
    if np.array_equal(first, again) and not np.allclose(first, copy, rtol=1e-3, atol=1e-6, equal_nan=True):
        raise ValueError(
            "the key encoder begins as a copy of the query's, but a copy of this backbone computes something else: "
            f"{', '.join(sorted(foreign))} must have all that they compute with in get_config or in their weights"
        )
