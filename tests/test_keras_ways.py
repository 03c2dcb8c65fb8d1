"""What people do with a Keras model, and with backbones of their own: it works, or one sentence names the way."""

import warnings

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

import moco_tf
from moco_tf import replicas
from moco_tf.data import sources
from moco_tf.data.inputs import image as preprocessing
from moco_tf.evaluate import knn_monitor

SIZE = 8
RNG = np.random.default_rng(0)
VIEWS = RNG.normal(size=(16, SIZE, SIZE, 3)).astype("float32")
IMAGES = RNG.integers(0, 256, (16, 12, 12, 3)).astype("uint8")


def backbone(shape=(SIZE, SIZE, 3), outputs=None):
    inputs = keras.Input(shape)
    features = layers.GlobalAveragePooling2D()(layers.Conv2D(6, 3)(inputs))
    return keras.Model(inputs, outputs(features) if outputs else features)


def moco(trunk=None, **kwargs):
    model = moco_tf.MoCo(trunk or backbone(), dim=4, queue_size=8, **kwargs)
    model.compile(moco_tf.SGD(0.1))
    return model


def assert_one_line(error, *words):
    assert "\n" not in str(error.value)
    for word in words:
        assert word in str(error.value)


# Backbones.


@pytest.mark.parametrize("method", ["MoCo", "MoCoV3", "EndToEnd"])
@pytest.mark.parametrize(
    "trunk, words",
    [
        (lambda: backbone((SIZE, SIZE, 1)), ["(None, 8, 8, 1)", "in colour"]),
        (lambda: backbone((SIZE, SIZE, 4)), ["(None, 8, 8, 4)", "in colour"]),
        (
            lambda: keras.Sequential([keras.Input((3, 8, 8)), layers.Permute((2, 3, 1)), layers.Conv2D(2, 3)]),
            ["colour"],
        ),
        (lambda: keras.Sequential([keras.Input((8,)), layers.Dense(4)]), ["(None, 8)", "in colour"]),
        (lambda: backbone((SIZE, 2 * SIZE, 3)), ["8 x 16", "square"]),
        (lambda: backbone(outputs=lambda x: {"a": x, "b": x}), ["has a, b", "'features'"]),
        (lambda: backbone(outputs=lambda x: [x, x]), ["'features'", "keras.Model"]),
        (lambda: keras.Sequential([keras.Input((8, 8, 3)), layers.Reshape((64, 3))]), ["(None, 64, 3)"]),
        (lambda: "resnet50", ["'resnet50'", "Keras model"]),
        (lambda: WithoutConfig(4), ["WithoutConfig", "get_config"]),
    ],
)
def test_a_backbone_that_is_none_is_refused_when_the_model_is_made(trunk, words, method):
    if method == "EndToEnd" and "get_config" in words:
        pytest.skip("makes no copy")
    with pytest.raises(ValueError) as error:
        getattr(moco_tf, method)(trunk(), dim=4)
    assert_one_line(error, *words)


class WithoutConfig(keras.Model):
    def __init__(self, filters):
        super().__init__()
        self.conv = layers.Conv2D(filters, 3)

    def call(self, x):
        return self.conv(x)


def test_one_output_in_a_list_is_that_output():
    model = moco(backbone(outputs=lambda x: [x]))
    np.testing.assert_array_equal(model.query_encoder(VIEWS)["features"], model.backbone(VIEWS))


def test_of_several_outputs_features_is_taken_and_the_rest_is_left_out():
    trunk = backbone(outputs=lambda x: {"features": x, "logits": layers.Dense(10, name="fc")(x)})
    model = moco(trunk)
    assert not [weight.path for weight in model.weights if "fc/kernel" in weight.path and weight.shape[-1] == 10]
    model.fit(VIEWS, VIEWS, batch_size=8, verbose=0)
    np.testing.assert_allclose(model.backbone(VIEWS), trunk(VIEWS)["features"], rtol=1e-5, atol=1e-6)


# Keras' own ways.


@pytest.mark.parametrize("name", ["loss", "metrics", "weighted_metrics", "loss_weights"])
def test_compile_refuses_what_it_would_not_use(name):
    with pytest.raises(ValueError) as error:
        moco().compile(moco_tf.SGD(0.1), **{name: ["accuracy"]})
    assert_one_line(error, f"takes no {name}")


@pytest.mark.parametrize("name, value", [("class_weight", {0: 1.0}), ("sample_weight", np.ones(16))])
def test_fit_refuses_what_it_would_not_use(name, value):
    with pytest.raises(ValueError) as error:
        moco().fit(VIEWS, VIEWS, verbose=0, **{name: value})
    assert_one_line(error, f"takes no {name}")


@pytest.mark.parametrize("path", ["model.h5", "model.hdf5", "model"])
def test_saving_in_another_format_names_the_ones_there_are(path, tmp_path):
    with pytest.raises(ValueError) as error:
        moco().save(tmp_path / path)
    assert_one_line(error, ".keras", "moco_tf.export_encoder")


@pytest.mark.parametrize("format", ["tf_saved_model", "onnx"])
def test_exporting_as_keras_does_names_our_way(format, tmp_path):
    with pytest.raises(ValueError) as error:
        moco().export(tmp_path / "encoder", format=format)
    assert_one_line(error, "moco_tf.export_encoder(model")


def test_weights_alone_are_saved_and_loaded_as_keras_does(tmp_path):
    model, other = moco(), moco()
    model.fit(VIEWS, VIEWS, batch_size=8, verbose=0)
    model.save_weights(tmp_path / "model.weights.h5")
    other.load_weights(tmp_path / "model.weights.h5")
    for a, b in zip(model.variables, other.variables, strict=True):
        np.testing.assert_array_equal(a, b)


def test_an_exported_encoder_is_a_layer_of_keras(tmp_path):
    model = moco()
    moco_tf.export_encoder(model, tmp_path / "encoder/1")
    layer = keras.layers.TFSMLayer(str(tmp_path / "encoder/1"), call_endpoint="serving_default")
    np.testing.assert_allclose(layer(IMAGES)["features"], model.predict(IMAGES, verbose=0), rtol=1e-5, atol=1e-6)


def test_a_request_of_no_images_is_answered_with_no_rows(tmp_path):
    inputs = keras.Input((SIZE, SIZE, 3))
    x = layers.SeparableConv2D(4, 3)(layers.Conv2D(6, 3)(inputs))  # what kernels divide by nothing for
    moco_tf.export_encoder(moco(keras.Model(inputs, layers.GlobalAveragePooling2D()(x))), tmp_path / "encoder/1")
    nothing = {
        "serving_default": tf.zeros((0, 5, 5, 3), tf.uint8),
        "preprocessed": tf.zeros((0, SIZE, SIZE, 3)),
        "encoded_images": tf.zeros((0,), tf.string),
    }
    loaded = tf.saved_model.load(str(tmp_path / "encoder/1"))
    for name, images in nothing.items():
        found = loaded.signatures[name](images=images)
        shapes = {key: value.shape.as_list() for key, value in found.items()}
        assert shapes == {"features": [0, 4], "embedding": [0, 4]}, name


# `predict` as the views are.


def test_the_preprocessing_of_the_views_reaches_a_model_that_was_given_none():
    task = moco_tf.augment.cifar(SIZE)
    model = moco()
    before = model.predict(IMAGES, verbose=0)
    model.fit(moco_tf.views(IMAGES, task, 8).take(1).prefetch(1), verbose=0)
    assert model.preprocessing == task.preprocessing
    given = moco(model.backbone, preprocessing=task)
    np.testing.assert_array_equal(model.predict(IMAGES, verbose=0), given.predict(IMAGES, verbose=0))
    assert np.abs(model.predict(IMAGES, verbose=0) - before).max() > 1e-3


def test_a_model_with_another_preprocessing_than_its_views_is_warned_of():
    model = moco(preprocessing=preprocessing.Preprocessing(SIZE))
    with pytest.warns(UserWarning, match="preprocessing=task"):
        model.fit(moco_tf.views(IMAGES, moco_tf.augment.cifar(SIZE), 8), verbose=0)
    assert model.preprocessing == preprocessing.Preprocessing(SIZE)


def test_a_model_with_the_preprocessing_of_its_views_is_not_warned_of():
    task = moco_tf.augment.cifar(SIZE)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*preprocessing")
        moco(preprocessing=task).fit(moco_tf.views(IMAGES, task, 8), verbose=0)


def test_a_model_that_was_loaded_goes_on_with_the_same_views_and_is_monitored(tmp_path):
    task = moco_tf.augment.cifar(SIZE)
    moco(preprocessing=task).save(tmp_path / "model.keras")
    model = keras.models.load_model(tmp_path / "model.keras")
    assert model.preprocessing == task.preprocessing
    monitor = knn_monitor.KNNMonitor(*[sources.embedded("test").only(list(range(20)))] * 2)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*preprocessing")
        model.fit(moco_tf.views(IMAGES, task, 8), verbose=0, callbacks=[monitor])
    assert monitor.evaluate() == monitor.evaluate() <= 100


def test_preprocessing_for_another_size_than_the_backbones_is_refused():
    with pytest.raises(ValueError, match="images of 8 pixels, but preprocessing makes them of 32"):
        moco(preprocessing=moco_tf.augment.cifar(32))


# Batches on replicas.


def on_replicas(number):
    with replicas.on_one_cpu(number).scope():
        return moco()


def dataset(batch, drop_remainder=True):
    return tf.data.Dataset.from_tensor_slices((VIEWS, VIEWS)).batch(batch, drop_remainder=drop_remainder)


@pytest.mark.parametrize("data", [{"x": dataset(7)}, {"x": VIEWS, "y": VIEWS, "batch_size": 7}])
def test_a_batch_that_replicas_cannot_share_is_refused_before_the_first_step(data):
    model = on_replicas(2)
    with pytest.raises(ValueError) as error:
        model.fit(**data, verbose=0)
    assert_one_line(error, "2 replicas", "a batch of 7")
    assert model.steps_done == 0


def test_a_partial_batch_that_replicas_cannot_share_is_an_error_that_says_so():
    model = on_replicas(2)
    odd = tf.data.Dataset.from_tensor_slices((VIEWS[:15], VIEWS[:15])).batch(8)
    with pytest.raises(tf.errors.OpError, match="a batch of 7 images is not shared evenly by 2 replicas"):
        model.fit(odd, verbose=0)


def test_a_partial_batch_that_replicas_can_share_is_trained_on():
    model = on_replicas(2)
    model.fit(tf.data.Dataset.from_tensor_slices((VIEWS[:14], VIEWS[:14])).batch(8), verbose=0)
    assert model.steps_done == 2


def test_regularizers_of_a_users_backbone_take_part_and_losses_that_its_layers_add_are_refused():
    def weights(strength):
        keras.utils.set_random_seed(0)
        inputs = keras.Input((SIZE, SIZE, 3))
        convolution = layers.Conv2D(6, 3, kernel_regularizer=keras.regularizers.L2(strength))
        model = moco(keras.Model(inputs, layers.GlobalAveragePooling2D()(convolution(inputs))))
        before = convolution.kernel.numpy()
        model.train_on_batch(VIEWS, VIEWS[::-1])
        return before, convolution.kernel.numpy()

    (before, plain), (_, regular) = weights(0.0), weights(0.5)
    np.testing.assert_allclose(plain - regular, 0.1 * 2 * 0.5 * before, rtol=1e-4, atol=1e-6)  # SGD(0.1)

    inputs = keras.Input((SIZE, SIZE, 3))
    active = layers.ActivityRegularization(0.1)(layers.Conv2D(6, 3)(inputs))
    with pytest.raises(ValueError, match="its layers add no losses of their own") as error:
        moco(keras.Model(inputs, layers.GlobalAveragePooling2D()(active))).train_on_batch(VIEWS, VIEWS)
    assert_one_line(error, "got 2")


def test_pixels_are_not_trained_on_as_if_they_were_normalised():
    with pytest.raises(ValueError, match=r"fit takes normalised images, float, .*; got uint8") as error:
        moco().fit(tf.data.Dataset.from_tensors((IMAGES[:8, :8, :8], IMAGES[8:, :8, :8])), verbose=0)
    assert_one_line(error, "model.preprocessing")


def test_float16_is_refused_on_several_replicas():
    keras.config.set_dtype_policy("mixed_float16")
    try:
        with replicas.on_one_cpu(2).scope():
            model = moco()
        with pytest.raises(ValueError, match="take mixed_bfloat16 on several replicas") as error:
            model.fit(VIEWS, VIEWS, batch_size=8, verbose=0)
    finally:
        keras.config.set_dtype_policy("float32")
    assert_one_line(error)


def test_a_file_of_mixed_precision_comes_back_in_it(tmp_path):
    keras.config.set_dtype_policy("mixed_bfloat16")
    try:
        moco(head="mlp").save(tmp_path / "model.keras")
    finally:
        keras.config.set_dtype_policy("float32")
    model = keras.models.load_model(tmp_path / "model.keras")
    heads = [layer for layer in model.query_encoder.layers if isinstance(layer, layers.Dense)]
    assert heads and {layer.compute_dtype for layer in heads} == {"bfloat16"}
    assert keras.config.dtype_policy().name == "float32"
