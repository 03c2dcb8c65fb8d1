"""Encoding by other libraries than TensorFlow: --engine."""

import dataclasses
import json
import sys

import keras
import numpy as np
import pytest
import tensorflow as tf

from moco_tf import command, frozen
from moco_tf.command import ConfigError
from moco_tf.data import sources, views
from moco_tf.data.inputs.image import Preprocessing
from moco_tf.encoders import resnet, vit
from moco_tf.evaluate import engines, features, finetune, knn, linear_probe, look, settings
from moco_tf.search import build, index
from moco_tf.serving import agreement, saved_model

CLOSE = 1e-4  # of the largest value


def require(engine):
    for package in settings.ENGINES[engine][0]:
        pytest.importorskip(package, reason=f"{package} is not installed: pip install 'moco_tf[engines]'")


def small():
    """A network that takes little time to convert, and to write."""
    keras.utils.set_random_seed(0)
    layers = keras.layers
    return keras.Sequential(
        [keras.Input((16, 16, 3)), layers.Conv2D(8, 3, 2, activation="relu"), layers.GlobalAveragePooling2D()]
    )


def network(name):
    keras.utils.set_random_seed(0)
    if name == "vit":
        return vit.vit(16, depth=1, heads=2, image_size=32, patch_size=16)
    model = resnet.resnet10(width=4, image_size=32)
    rng = np.random.default_rng(0)
    for weight in model.weights:
        if "moving_mean" in weight.path:  # statistics that are not 0 and 1
            weight.assign(rng.normal(0, 0.1, weight.shape))
        elif "moving_variance" in weight.path:
            weight.assign(rng.uniform(0.5, 1.5, weight.shape))
    return model


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """The folder of a small encoder's SavedModel."""
    folder = tmp_path_factory.mktemp("encoder")
    saved_model.export_encoder(small(), folder / "1", Preprocessing(16))
    return folder


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """40 images and 8 of another split, in two classes."""
    folder, rng = tmp_path_factory.mktemp("photos"), np.random.default_rng(1)
    for split, count in (("train", 40), ("test", 8)):
        for number in range(count):
            path = folder / split / "ab"[number % 2] / f"{number:02d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            coarse = rng.integers(0, 256, (5, 6, 3)).astype(np.uint8)
            path.write_bytes(tf.io.encode_png(coarse.repeat(8, 0).repeat(8, 1)).numpy())
    return folder


@pytest.fixture
def said(capsys):
    """What has been printed since, when called."""
    command.log_to_screen()
    return lambda: capsys.readouterr().out


def batches_of(images):
    return tf.data.Dataset.from_tensors((images, 0, 0))


@pytest.mark.parametrize("engine", ["onnx", "openvino"])
@pytest.mark.parametrize("name", ["resnet", "vit"])
def test_another_engine_gives_what_tensorflow_gives(engine, name, said):
    require(engine)
    encoder = frozen.of_model(network(name), Preprocessing(32))
    images = tf.random.stateless_normal((engines.PART + 5, 32, 32, 3), (0, 1))
    other = engines.of(encoder, engine, batches_of(images[:3]), 3)
    assert f"--engine={engine} agrees with TensorFlow" in said()
    for some in (images, images[:1]):  # more than it takes at a time, and one
        found, expected = other.encode(some), encoder.encode(some)
        assert found.keys() == expected.keys()
        for output, values in expected.items():
            assert found[output].shape == values.shape and found[output].dtype == tf.float32
            assert np.abs(found[output] - values).max() < CLOSE * np.abs(values).max()
    assert other.identity == encoder.identity and other.encode is not encoder.encode


def test_tensorflow_is_the_encoder_itself():
    encoder = frozen.of_model(small(), Preprocessing(16))
    assert engines.of(encoder, "tensorflow", None, 10) is encoder


@pytest.fixture
def timed(monkeypatch):
    """An encoder, and a function that sets the images/s that its engines are found to have, in auto."""
    encoder = frozen.of_model(keras.Sequential([keras.Input((4, 4, 3)), keras.layers.Flatten()]), Preprocessing(4))
    monkeypatch.setattr(engines, "_converted", lambda encoder: b"")
    ran = []

    def stand_in(name, error):
        """For a runtime: gives what TensorFlow gives, off by `error`."""

        def run(images):
            ran.append(name)
            return {n: values.numpy() * (1 + error) for n, values in encoder.encode(images).items()}

        return lambda model: run

    def set(tensorflow, errors=(0.0, 0.0), **rates):
        stand_ins = {name: stand_in(name, error) for name, error in zip(rates, errors, strict=True)}
        monkeypatch.setattr(engines, "RUNTIMES", stand_ins)

        def seconds_of(encode, images):
            ran.clear()
            encode(images)
            return len(images) / (rates[ran[0]] if ran else tensorflow)

        monkeypatch.setattr(engines, "seconds_of", seconds_of)

    return encoder, set


def test_auto_takes_the_fastest_and_says_what_each_does(timed, said):
    encoder, set = timed
    images = tf.ones((engines.PART, 4, 4, 3))
    set(10, onnx=14, openvino=12)
    chosen = engines.of(encoder, "auto", batches_of(images), 10 * engines.SHORT)
    assert chosen.encode is not encoder.encode
    assert said() == "--engine=auto: onnx. Images/s of the first 32: tensorflow 10, onnx 14, openvino 12.\n"
    set(15, onnx=14, openvino=12)
    assert engines.of(encoder, "auto", batches_of(images), 10**6).encode is encoder.encode
    assert "--engine=auto: tensorflow." in said()


def test_auto_leaves_out_an_engine_that_deviates(timed, said):
    encoder, set = timed
    set(10, onnx=20, errors=(1e-3,))
    assert engines.of(encoder, "auto", batches_of(tf.ones((2, 4, 4, 3))), 10**6).encode is encoder.encode
    out = said()
    assert "leaves onnx out: it deviates from TensorFlow by 1.0e-03 of the largest value" in out
    assert "Images/s of the first 2: tensorflow 10." in out


def test_auto_converts_nothing_for_what_tensorflow_does_in_five_minutes(timed, said, monkeypatch):
    encoder, set = timed
    set(10, onnx=14, openvino=12)
    monkeypatch.setattr(engines, "_converted", None)  # is not called
    images = batches_of(tf.ones((engines.PART, 4, 4, 3)))
    assert engines.of(encoder, "auto", images, 10 * engines.SHORT - 1).encode is encoder.encode
    assert "--engine=auto: tensorflow, 10 images/s." in said()


def test_auto_goes_on_with_tensorflow_where_onnx_has_no_such_operation(said, monkeypatch):
    require("onnx")
    monkeypatch.setattr(engines, "SHORT", 0)

    class Own(keras.layers.Layer):
        def call(self, images):
            return tf.linalg.eigvalsh(images[..., 0])

    images = keras.Input((4, 4, 3))
    model = keras.Model(images, keras.layers.Flatten()(Own()(images)))
    encoder = frozen.of_model(model, Preprocessing(4))
    views = batches_of(tf.ones((2, 4, 4, 3)) / 4)
    assert engines.of(encoder, "auto", views, 10).encode is encoder.encode
    assert "--engine=auto leaves onnx" in (out := said()) and "--engine=auto: tensorflow. Images/s" in out
    with pytest.raises(
        ConfigError, match=r"--engine=onnx: ONNX .* this encoder: .*; --engine=tensorflow computes any"
    ):
        engines.of(encoder, "onnx", views, 10)


def test_an_engine_that_deviates_is_refused_and_leaves_no_features(saved, photos, tmp_path, capsys, monkeypatch):
    require("onnx")
    monkeypatch.setattr(agreement, "TOLERANCE", 0.0)
    arguments = [f"--encoder={saved}", f"--dataset={photos}", f"--output={tmp_path / 'features'}"]
    assert features.main([*arguments, "--engine=onnx"]) == 2
    printed = capsys.readouterr().err
    assert "--engine=onnx: it deviates from TensorFlow by" in printed and printed.count("\n") == 1
    assert features.main(arguments) == 0


def test_weights_that_are_not_finite_are_left_to_the_refusal_of_features():
    model = keras.Sequential([keras.Input((4, 4, 3)), keras.layers.Flatten(), keras.layers.Dense(2)])
    model.layers[-1].bias.assign([np.nan, 0])
    encoder = frozen.of_model(model, Preprocessing(4))
    assert engines.of(encoder, "onnx", batches_of(tf.ones((2, 4, 4, 3))), 2) is encoder


def test_commands_encode_through_the_engine_and_features_of_two_engines_are_kept_apart(
    saved, photos, tmp_path, capsys
):
    require("onnx")
    common = [f"--encoder={saved}", f"--dataset={photos}"]
    arrays = {}
    for engine in ("tensorflow", "onnx"):
        assert features.main([*common, f"--output={tmp_path / engine}", f"--engine={engine}"]) == 0
        assert json.loads((tmp_path / engine / "features.json").read_text())["engine"] == engine
        arrays[engine] = np.load(tmp_path / engine / "features-00000.npz")
    assert knn.main([*common, f"--output={tmp_path / 'knn'}", "--engine=onnx"]) == 0
    assert capsys.readouterr().out.count("--engine=onnx agrees with TensorFlow") == 2
    expected, found = (arrays[engine]["features"] for engine in ("tensorflow", "onnx"))
    assert 0 < np.abs(found - expected).max() < CLOSE * np.abs(expected).max()
    assert np.array_equal(arrays["onnx"]["ids"], arrays["tensorflow"]["ids"])

    before = tmp_path / "tensorflow/features.json"  # as earlier versions wrote it
    before.write_text(json.dumps({n: v for n, v in json.loads(before.read_text()).items() if n != "engine"}))
    assert features.main([*common, f"--output={tmp_path / 'tensorflow'}"]) == 0
    assert features.main([*common, f"--output={tmp_path / 'tensorflow'}", "--engine=onnx"]) == 2
    assert "of another engine (there 'tensorflow', here 'onnx'): choose another folder" in capsys.readouterr().err


def test_an_index_is_built_through_the_engine(saved, photos, tmp_path, capsys):
    require("onnx")
    pytest.importorskip("faiss", reason="faiss is not installed: pip install 'moco_tf[search]'")
    vectors = {}
    for engine in ("tensorflow", "onnx"):
        arguments = [f"--encoder={saved}", f"--images={photos}", f"--output={tmp_path / engine}"]
        assert build.main([*arguments, f"--engine={engine}"]) == 0
        vectors[engine] = np.asarray(index.read(tmp_path / engine).part.vectors, np.float32)
    assert capsys.readouterr().out.count("--engine=onnx agrees with TensorFlow") == 1
    assert np.abs(vectors["onnx"] - vectors["tensorflow"]).max() < 1e-3  # they are kept in 16 bits
    again = [f"--encoder={saved}", f"--images={photos}", f"--output={tmp_path / 'onnx'}", "--engine=tensorflow"]
    assert build.main(again) == 0  # nothing is new


@pytest.mark.parametrize("kind", [features.Settings, knn.Settings, linear_probe.Settings, look.Settings])
def test_a_missing_package_is_one_line_before_any_work(kind, monkeypatch):
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(ConfigError, match=r"--engine=openvino needs the package openvino: pip install .*\[engines\]'"):
        kind(encoder="x", engine="openvino")
    kind(encoder="x", engine="auto")


def test_search_refuses_a_missing_package_and_an_engine_that_there_is_not(saved, photos, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "tf2onnx", None)
    arguments = [f"--encoder={saved}", f"--images={photos}", "--output=x"]
    for engine, line in (
        ("onnx", "needs the package tf2onnx: pip install 'moco_tf[onnx]'"),
        ("torch", "onnx|openvino"),
    ):
        assert build.main([*arguments, f"--engine={engine}"]) == 2
        printed = capsys.readouterr().err
        assert line in printed and printed.count("\n") == 1


def test_fine_tuning_which_changes_its_encoder_has_no_engine(capsys):
    assert "engine" not in {field.name for field in dataclasses.fields(finetune.Settings)}
    assert finetune.main(["--encoder=x", "--engine=onnx"]) == 2
    assert "Unknown command line flag 'engine'" in capsys.readouterr().err


def test_the_views_that_check_an_engine_are_those_that_are_encoded(saved):
    source = sources.embedded("test")
    encoder = frozen.read(saved)
    (images, *_), *_ = views.central(source.in_order(3), encoder.preprocessing)
    seen = []
    encode = lambda images: seen.append(images.numpy()) or encoder.encode(images)  # noqa: E731
    watched = dataclasses.replace(encoder, encode=encode)
    engines.of(watched, "auto", views.central(source.in_order(3), encoder.preprocessing), 3)
    assert len(seen) == 2 and np.array_equal(seen[0], images)
