"""A copy of an encoder computes what the encoder computes, whatever its layers keep beside their weights."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

import moco_tf
from moco_tf.checkpoint import Checkpoints
from moco_tf.methods.ema import copy_weights

RNG = np.random.default_rng(0)
IMAGES = RNG.normal(100, 50, (8, 32, 32, 3)).astype("float32")
# A member of each family of keras.applications, the smallest.
FAMILIES = (
    "ConvNeXtTiny",
    "DenseNet121",
    "EfficientNetB0",
    "EfficientNetV2B0",
    "InceptionResNetV2",
    "InceptionV3",
    "MobileNet",
    "MobileNetV2",
    "MobileNetV3Small",
    "NASNetMobile",
    "ResNet50",
    "ResNet50V2",
    "VGG16",
    "Xception",
)


def adapted(size=32):
    norm = layers.Normalization(axis=-1)
    norm.adapt(IMAGES)
    inputs = keras.Input((size, size, 3))
    return keras.Model(inputs, layers.GlobalAveragePooling2D()(layers.Conv2D(4, 3)(norm(inputs))))


def features(encoder, images=IMAGES):
    return encoder(images, training=False)["features"].numpy()


def assert_copied(model, images=IMAGES):
    np.testing.assert_array_equal(features(model.query_encoder, images), features(model.key_encoder, images))


METHODS = {
    "MoCo": lambda backbone: moco_tf.MoCo(backbone, dim=4, queue_size=8),
    "MoCoV3": lambda backbone: moco_tf.MoCoV3(backbone, dim=4, hidden_dim=4),
    "EndToEnd": lambda backbone: moco_tf.EndToEnd(backbone, dim=4, shared="none"),
}


@pytest.mark.parametrize("method", METHODS)
def test_an_adapted_normalization_is_copied_whole(method):
    model = METHODS[method](adapted())
    assert_copied(model)
    assert abs(features(model.key_encoder)).mean() < 10  # of images with a mean of 100


def test_an_adapted_normalization_survives_saving_and_loading(tmp_path):
    model = METHODS["MoCo"](adapted())
    model.compile(moco_tf.SGD(0.1))
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert_copied(loaded)
    np.testing.assert_array_equal(features(loaded.query_encoder), features(model.query_encoder))


def test_an_adapted_normalization_survives_a_checkpoint(tmp_path):
    model = METHODS["MoCo"](adapted())
    fresh = METHODS["MoCo"](keras.models.clone_model(model.backbone))  # adapted to nothing
    for one in (model, fresh):
        one.compile(moco_tf.SGD(0.1))
    Checkpoints(tmp_path, model).save()
    Checkpoints(tmp_path, fresh).restore_last()
    assert_copied(fresh)
    np.testing.assert_array_equal(features(fresh.query_encoder), features(model.query_encoder))


def test_weights_that_are_copied_bring_what_is_derived_from_them():
    source, target = adapted(), adapted()
    source.layers[1].adapt(IMAGES + 1000)
    copy_weights(source, target)
    np.testing.assert_array_equal(source(IMAGES), target(IMAGES))


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_the_key_encoder_of_an_application_of_keras_begins_as_the_querys(family):
    backbone = getattr(keras.applications, family)(weights=None, include_top=False, input_shape=(96, 96, 3))
    for layer in backbone.layers:
        if isinstance(layer, layers.Normalization) and layer.input_mean is None:
            layer.adapt(IMAGES)
    images = RNG.normal(100, 50, (2, 96, 96, 3)).astype("float32")
    assert_copied(moco_tf.MoCo(backbone, dim=4, queue_size=8), images)


def test_an_application_of_keras_with_an_adapted_layer_is_copied_whole():
    backbone = keras.applications.EfficientNetB0(weights=None, include_top=False, input_shape=(32, 32, 3))
    next(layer for layer in backbone.layers if isinstance(layer, layers.Normalization)).adapt(IMAGES)
    assert_copied(moco_tf.MoCo(backbone, dim=4, queue_size=8))


class Offset(layers.Layer):
    """Keeps what it adds in neither config nor weights."""

    offset = 0.0

    def call(self, x):
        return x + self.offset


class Noise(layers.Layer):
    def call(self, x):
        return x + tf.random.normal(tf.shape(x))


def with_layer(layer):
    inputs = keras.Input((8, 8, 3))
    return keras.Model(inputs, layers.GlobalAveragePooling2D()(layer(inputs)))


@pytest.mark.parametrize("method", METHODS)
def test_a_layer_that_cannot_be_copied_is_refused_by_name(method):
    layer = Offset()
    layer.offset = 1.0
    with pytest.raises(ValueError, match="a copy of this backbone computes something else: Offset must have"):
        METHODS[method](with_layer(layer))


class OfOneSize(keras.Model):
    """Subclassed, and built for images of one size only."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.flatten, self.dense = layers.Flatten(), layers.Dense(4)

    def call(self, images):
        return self.dense(self.flatten(images))


def test_a_subclassed_backbone_of_one_size_is_copied():
    model = moco_tf.MoCo(OfOneSize(), dim=4, queue_size=8, preprocessing=moco_tf.Preprocessing(12))
    assert_copied(model, IMAGES[:, :12, :12])


@pytest.mark.parametrize("layer", [Offset, Noise])
def test_layers_of_a_users_own_that_can_be_copied_or_are_random_are_taken(layer):
    moco_tf.MoCo(with_layer(layer()), dim=4, queue_size=8)
