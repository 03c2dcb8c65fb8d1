"""Training steps that XLA compiles do what they do without, for each method."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

import moco_tf
from moco_tf import build, replicas, run_folder
from moco_tf.config import parse
from moco_tf.encoders import BatchNorm, vit
from moco_tf.methods import xla_passes
from moco_tf.methods.mae import MAE

SIZE, BATCH = 8, 8


def tiny():
    inputs = keras.Input((SIZE, SIZE, 3))
    x = layers.ReLU()(BatchNorm()(layers.Conv2D(6, 3, use_bias=False)(inputs)))
    return keras.Model(inputs, layers.GlobalAveragePooling2D()(x))


def moco():
    return moco_tf.MoCo(tiny(), dim=4, queue_size=20, bn_groups=2, seed=3)


def moco_v3():
    return moco_tf.MoCoV3(tiny(), dim=4, hidden_dim=8, head="resnet")


def end_to_end():
    return moco_tf.EndToEnd(tiny(), dim=4, bn_groups=2, shared="none")


def memory_bank(loss="nce"):
    return moco_tf.MemoryBank(tiny(), records=1000, dim=4, queue_size=5, loss=loss)


def batches(numbered):
    query, key = np.random.default_rng(0).normal(size=(2, 3 * BATCH, SIZE, SIZE, 3)).astype("float32")
    data = tf.data.Dataset.from_tensor_slices((query, np.arange(3 * BATCH) if numbered else key))
    return data.batch(BATCH, drop_remainder=True)


@pytest.mark.parametrize(
    "make, optimizer",
    [
        (moco, moco_tf.SGD(0.1, momentum=0.9, weight_decay=1e-3)),
        (moco_v3, moco_tf.AdamW(1e-3, weight_decay=0.1)),
        pytest.param(moco_v3, moco_tf.LARS(0.1), marks=pytest.mark.slow),
        pytest.param(end_to_end, moco_tf.SGD(0.1), marks=pytest.mark.slow),
        (memory_bank, moco_tf.SGD(0.1)),
    ],
)
def test_a_compiled_step_does_what_the_step_does(make, optimizer):
    keras.config.set_floatx("float64")
    keras.config.set_dtype_policy("float64")
    models = []
    for compiled in (False, True):
        keras.utils.set_random_seed(1)
        model = make()
        model.compile(type(optimizer).from_config(optimizer.get_config()), jit_compile=compiled)
        model.fit(batches(numbered=make is memory_bank), verbose=0, shuffle=False)
        models.append(model)
    plain, compiled = models
    assert compiled.jit_compile and not plain.jit_compile
    assert compiled.steps_done == plain.steps_done == 3
    for a, b in zip(plain.variables, compiled.variables, strict=True):
        np.testing.assert_allclose(a.numpy(), b.numpy(), rtol=1e-9, atol=1e-12, err_msg=a.path)
    images = np.random.default_rng(1).integers(0, 256, (4, 11, 13, 3), np.uint8)  # to be resized and cropped
    np.testing.assert_allclose(plain.predict(images, verbose=0), compiled.predict(images, verbose=0), atol=1e-5)


@pytest.mark.parametrize("precision", [pytest.param("mixed_bfloat16", marks=pytest.mark.slow), "mixed_float16"])
def test_a_step_in_mixed_precision_compiles(precision):
    keras.config.set_dtype_policy(precision)
    model = moco()
    model.compile(moco_tf.SGD(0.1), jit_compile=True)
    assert model.jit_compile
    before = model.query_encoder.get_weights()
    losses = model.fit(batches(numbered=False), verbose=0, shuffle=False).history["loss"]
    assert np.isfinite(losses).all()
    assert any(np.any(a != b) for a, b in zip(before, model.query_encoder.get_weights(), strict=True))


def test_a_compiled_shuffle_deals_out_as_the_shuffle_does():
    images = tf.reshape(tf.range(64.0), (64, 1))
    shuffled, permutation = replicas.shuffle(images, seed=(5, 7))
    again, compiled = tf.function(replicas.shuffle, jit_compile=True)(images, seed=(5, 7))
    np.testing.assert_array_equal(permutation, compiled)
    np.testing.assert_array_equal(shuffled, again)
    assert sorted(permutation.numpy()) == list(range(64))
    np.testing.assert_array_equal(replicas.unshuffle(shuffled, permutation), images)


def test_a_memory_bank_with_infonce_is_not_compiled():
    model = memory_bank(loss="infonce")
    with pytest.warns(UserWarning, match="jit_compile"):
        model.compile(moco_tf.SGD(0.1), jit_compile=True)
    assert not model.jit_compile
    model.fit(batches(numbered=True), verbose=0, shuffle=False)
    assert model.steps_done == 3


def test_a_file_leaves_xla_to_the_machine_that_reads_it(tmp_path):
    model = moco()
    model.compile(moco_tf.SGD(0.1), jit_compile=True)
    model.save(tmp_path / "moco.keras")
    gpu = bool(tf.config.list_physical_devices("GPU"))
    assert keras.saving.load_model(tmp_path / "moco.keras").jit_compile == gpu


def test_the_flag_says_whether_xla_compiles():
    small = ["--arch=resnet10", "--width=4", "--image_size=8", "--stem=cifar", "--queue_size=8", "--dim=4"]
    data = run_folder.Data(256)
    compiled = {xla: build.model(parse([*small, f"--xla={xla}"]), data).jit_compile for xla in ("on", "off", "auto")}
    assert compiled == {"on": True, "off": False, "auto": bool(tf.config.list_physical_devices("GPU"))}


@keras.saving.register_keras_serializable("tests")
class Counted(layers.Layer):
    """Does nothing, and counts how often TensorFlow traces it in training."""

    traced = 0

    def call(self, inputs, training=False):
        type(self).traced += bool(training)
        return inputs


def tiny_vit():
    return vit.vit(8, 1, 2, image_size=SIZE, patch_size=4, freeze_patch=False)


def counted(make=tiny):
    backbone = make()
    return keras.Model(backbone.input, Counted()(backbone.output))


def on_replicas(make, jit_compile):
    with replicas.on_one_cpu(2).scope():
        keras.utils.set_random_seed(1)
        model = make()
        model.compile(moco_tf.SGD(0.1, momentum=0.9), jit_compile=jit_compile)
    Counted.traced = 0
    model.fit(batches(numbered=isinstance(model, moco_tf.MemoryBank)), verbose=0, shuffle=False)
    return model


@pytest.mark.parametrize(
    "make, backbones",
    [
        pytest.param(lambda: moco_tf.MoCo(counted(), dim=4, queue_size=20, bn_groups=4, seed=3), 2, id="moco"),
        pytest.param(
            lambda: moco_tf.MoCoV3(counted(tiny_vit), dim=4, hidden_dim=8, head="vit"),
            2,
            id="moco_v3",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            lambda: moco_tf.EndToEnd(counted(), dim=4, shared="encoder"), 1, id="end_to_end", marks=pytest.mark.slow
        ),
        pytest.param(
            lambda: moco_tf.MemoryBank(counted(), records=1000, dim=4, queue_size=5, loss="infonce"),
            1,
            id="memory_bank",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_passes_compiled_on_replicas_do_what_they_do_without_and_are_compiled_once(make, backbones):
    keras.config.set_floatx("float64")
    keras.config.set_dtype_policy("float64")
    plain, compiled = (on_replicas(make, jit_compile) for jit_compile in (False, True))
    assert compiled.in_xla and not plain.in_xla
    assert Counted.traced == 2 * backbones  # once on each replica, in all steps
    assert compiled.steps_done == plain.steps_done == 3
    for a, b in zip(plain.variables, compiled.variables, strict=True):
        np.testing.assert_allclose(a.numpy(), b.numpy(), rtol=1e-9, atol=1e-10, err_msg=a.path)


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(moco_v3, id="BatchNorm over all replicas"),
        pytest.param(lambda: moco_tf.MoCo(no_kernel_of_xla(), dim=4, queue_size=20), id="a layer without XLA"),
        pytest.param(lambda: MAE(tiny_vit(), decoder_width=32), id="passes that go around the backbone"),
        pytest.param(lambda: moco_tf.MoCo(Untold(), dim=4, queue_size=20), id="a backbone not told when it trains"),
    ],
)
def test_replicas_take_xla_only_for_backbones_that_it_can_compile(make):
    with replicas.on_one_cpu(2).scope():
        model = make()
        with pytest.raises(ValueError, match="XLA compiles the passes of backbones that send nothing"):
            model.compile(moco_tf.SGD(0.1), jit_compile=True)
        model.compile(moco_tf.SGD(0.1))
    assert not model.in_xla


def test_a_query_encoder_that_sees_some_patches_is_not_said_to_be_compiled():
    model = moco_tf.MoCoV3(tiny_vit(), dim=4, hidden_dim=8, head="vit", token_dropout=0.5)
    assert model.backbones_for_xla() == [model.key_encoder.layers[1]]


@keras.saving.register_keras_serializable("tests")
class Untold(keras.Model):
    """A backbone whose `call` has no `training`."""

    input_shape = (None, 8, 8, 3)

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.convolution = keras.layers.Conv2D(4, 3)

    def call(self, images):
        return tf.reduce_mean(self.convolution(images), axis=(1, 2))

    def get_config(self):
        return super().get_config()


def no_kernel_of_xla():
    backbone = tiny()
    backbone.layers[-1].supports_jit = False
    return backbone


def test_a_backbone_that_is_no_longer_compiled_has_its_own_call():
    backbone = tiny()
    images = tf.random.stateless_normal((2, SIZE, SIZE, 3), (0, 1))
    inferred = backbone(images, training=False)
    for compiled in (True, False):
        xla_passes.set_compiled(backbone, compiled)
        assert ("call" in vars(backbone)) == compiled
        np.testing.assert_array_equal(backbone(images, training=False), inferred)
