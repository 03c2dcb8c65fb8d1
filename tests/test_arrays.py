"""Images that come as arrays: which values, shapes and types `views` and `predict` take."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

import moco_tf
from moco_tf.data import arrays

TASK = moco_tf.augment.v2(16)
RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, (80, 20, 20, 3)).astype("uint8")
WRONG = {
    "0..1": IMAGES / 255,
    "0..1 in 16 bits": (IMAGES / 255).astype("float16"),
    "-1..1": (IMAGES / 127.5 - 1).astype("float32"),
    "mean and std": ((IMAGES / 255 - 0.45) / 0.22).astype("float32"),
    "12 bits": IMAGES.astype("uint16") * 16,
    "16 bits": IMAGES.astype("int32") * 257,
    "12 bits as floats": IMAGES.astype("float32") * 16,
    "16 bits as floats": IMAGES.astype("float32") * 257,
    "below 0": IMAGES.astype("int16") - 128,
    "not finite": np.full((4, 20, 20, 3), np.nan, "float32"),
    "booleans": IMAGES > 100,
}
RIGHT = {
    "0..255": IMAGES.astype("float32"),
    "what a filter leaves": IMAGES.astype("float32") * 1.1 - 15,
    "integers": IMAGES.astype("int64"),
    "8 bits in 16": IMAGES.astype("uint16"),
    "dark": (IMAGES // 100).astype("float32"),
    "black": np.zeros((80, 20, 20, 3), "float32"),
    "grey": IMAGES[..., :1],
}


@pytest.fixture(scope="module")
def model():
    inputs = keras.Input((16, 16, 3))
    return moco_tf.MoCo(keras.Model(inputs, layers.GlobalAveragePooling2D()(inputs)), dim=4, queue_size=8)


def ways(images):
    """Every way in which images come in as arrays."""
    dataset = tf.data.Dataset.from_tensor_slices(images)
    yield "views of an array", lambda model: moco_tf.views(images, TASK, 4)
    yield "views of images", lambda model: moco_tf.views(dataset, TASK, 4)
    yield "views of batches", lambda model: moco_tf.views(dataset.batch(4), TASK, 4)
    yield "views of records", lambda model: moco_tf.views(dataset.map(lambda image: {"image": image}), TASK, 4)
    yield "views with labels", lambda model: moco_tf.views(dataset.map(lambda image: (image, 1)), TASK, 4)
    yield "predict of an array", lambda model: model.predict(images, verbose=0)
    yield "predict of a tensor", lambda model: model.predict(tf.constant(images), verbose=0)
    yield "predict of a list", lambda model: model.predict(list(images), verbose=0)
    yield "predict of batches", lambda model: model.predict(dataset.batch(4), verbose=0)
    yield "predict with labels", lambda model: model.predict(dataset.map(lambda x: (x, 1)).batch(4), verbose=0)


@pytest.mark.parametrize("name", WRONG)
def test_images_of_another_range_are_refused_wherever_they_come_in(name, model):
    for way, call in ways(WRONG[name]):
        with pytest.raises(ValueError, match=r"from 0 to 255; the first \d+ have .* to ") as error:
            call(model)
            pytest.fail(way)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", RIGHT)
def test_images_that_may_be_0_to_255_are_taken(name, model):
    every = dict(ways(RIGHT[name]))
    for way in every if name == "0..255" else ("views of an array", "predict of an array"):
        every[way](model)


def test_integers_beyond_8_bits_that_come_late_are_an_error_and_no_image():
    late = np.concatenate([IMAGES.astype("int32"), IMAGES.astype("int32") * 9])
    with pytest.raises(tf.errors.InvalidArgumentError, match="images have values from 0 to 255; these have"):
        for _ in moco_tf.views(late, TASK, 80):
            pass


def test_grey_images_are_encoded_as_images_of_three_equal_channels(model):
    grey = IMAGES[:4, ..., :1]
    colour = np.repeat(grey, 3, axis=-1)
    np.testing.assert_array_equal(model.predict(grey, verbose=0), model.predict(colour, verbose=0))
    for a, b in zip(moco_tf.views(grey, TASK, 4), moco_tf.views(colour, TASK, 4), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(
    "images, message",
    [
        (IMAGES[0], "one image is"),
        (IMAGES[..., 0], "grey ones are"),
        (np.repeat(IMAGES, 2, axis=-1)[..., :4], r"not \(80, 20, 20, 4\)"),
        (["a.jpg", "b.jpg"], "predict takes batches of images"),
        ([IMAGES[0], IMAGES[0][:5]], r"these have \(5, 20, 3\), \(20, 20, 3\)"),
        (tf.data.Dataset.from_tensor_slices(IMAGES), "one image is"),
    ],
)
def test_what_predict_does_not_take_gets_a_sentence(images, message, model):
    with pytest.raises(ValueError, match=message):
        model.predict(images, verbose=0)


def test_no_images_have_no_features(model):
    assert model.predict(IMAGES[:0], verbose=0).shape == (0, 3)


def test_only_the_first_floats_are_looked_at_but_all_integers():
    later = np.concatenate([IMAGES[:64].astype("float32"), IMAGES[:64].astype("float32") / 255])
    arrays.check_array(later)
    with pytest.raises(ValueError, match="0 to 4080"):
        arrays.check_array(np.concatenate([IMAGES, IMAGES]).astype("uint16") * 16)
