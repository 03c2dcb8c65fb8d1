"""Encoders in 8 bits: `--quantize=int8`."""

import json
from types import SimpleNamespace

import keras
import numpy as np
import pytest
import tensorflow as tf

import moco_tf
from moco_tf import build, frozen
from moco_tf.command import ConfigError
from moco_tf.data import sources
from moco_tf.data.inputs.image import Preprocessing
from moco_tf.encoders import vit
from moco_tf.serving import export_encoder, int8_file, onnx_file

for package in ("onnx", "tf2onnx", "onnxruntime"):
    pytest.importorskip(package, reason=f"{package} is not installed: pip install 'moco_tf[onnx]'")

PREPROCESSING = Preprocessing(32, 1.0)


def small_network(channels=3):
    keras.utils.set_random_seed(0)
    layers = keras.layers
    images = keras.Input((32, 32, channels))
    x = layers.MaxPooling2D()(layers.Conv2D(16, 3, 2, activation="relu")(images))
    x = layers.ReLU()(x + layers.Conv2D(16, 3, padding="same")(x))
    return keras.Model(images, layers.GlobalAveragePooling2D()(x))


@pytest.fixture(scope="module")
def network():
    return small_network()


@pytest.fixture(scope="module")
def source():
    return sources.embedded("train").only(np.arange(0, 10_000, 100))


@pytest.fixture(scope="module")
def exported(network, source, tmp_path_factory):
    """The file in 8 bits, and its `Agreement`."""
    path = tmp_path_factory.mktemp("int8") / "encoder.onnx"
    return path, int8_file.export(network, path, source, 32, preprocessing=PREPROCESSING)


def types(path):
    import onnx

    model = onnx.load(path)
    return [node.op_type for node in model.graph.node], {i.data_type for i in model.graph.initializer}


def test_convolutions_and_what_lies_between_are_of_8_bits(exported):
    import onnx

    nodes, of_weights = types(exported[0])
    assert nodes.count("Conv") == 2 and nodes.count("QuantizeLinear") >= 4 and onnx.TensorProto.INT8 in of_weights


def test_features_of_pixels_of_any_size_point_where_float32s_do(network, exported):
    path, agreement = exported
    assert agreement.images == 32 and 0.99 < agreement.mean < 1 and agreement.lowest <= agreement.mean
    session, encoder = onnx_file.session(str(path)), frozen.of_model(network, PREPROCESSING)
    coarse = np.random.default_rng(0).uniform(0, 255, (20, 4, 5, 3))
    for height, width in ((40, 51), (32, 32)):
        images = tf.cast(tf.image.resize(coarse, (height, width)), tf.uint8).numpy()
        found = dict(
            zip(("features", "embedding"), session.run(["features", "embedding"], {"images": images}), strict=True)
        )
        expected = encoder.encode(PREPROCESSING(images))
        for name, values in found.items():
            assert int8_file.cosines(values, expected[name].numpy()).mean() > 0.97
    (named,) = session.get_modelmeta().custom_metadata_map.values()
    about = json.loads(named)
    assert about["quantized"] == "int8" and about["calibrated_on"] == "32 images of embedded train"


def test_the_images_that_judge_are_others_than_those_that_calibrate(network, source, tmp_path, monkeypatch):
    seen = {}
    monkeypatch.setattr(int8_file, "_quantised", lambda encoder, images: seen.update(calibrate=images))
    monkeypatch.setattr(int8_file, "_after_pixels", lambda encoder, network: None)
    monkeypatch.setattr(onnx_file, "save", lambda *arguments: None)

    def judge(encoder, session, images):
        seen.update(judge=images)
        return int8_file.Agreement(0.5, 0.4, len(images))

    monkeypatch.setattr(int8_file, "_agreement", judge)
    with pytest.raises(ConfigError, match=r"cosine .* 0\.5000 .* of 20 other images.* less than --least_cosine=0\.99"):
        int8_file.export(network, tmp_path / "a.onnx", source, 20, preprocessing=PREPROCESSING)
    assert not list(tmp_path.iterdir())
    assert len(set(seen["calibrate"])) == len(set(seen["judge"])) == 20
    assert not set(seen["calibrate"]) & set(seen["judge"])
    with pytest.raises(ConfigError, match=r"takes 16 images or more, judging as many others; .* has 20"):
        int8_file.export(network, tmp_path / "b.onnx", source.only(np.arange(20)), preprocessing=PREPROCESSING)


def test_what_agrees_less_than_asked_is_not_written(network, source, tmp_path):
    with pytest.raises(ConfigError, match=r"encoder\.onnx is not written: cosine .* 0\.9\d+ in the mean"):
        int8_file.export(network, tmp_path / "encoder.onnx", source, 16, least=1.0, preprocessing=PREPROCESSING)
    assert not list(tmp_path.iterdir())


def test_an_embedding_that_agrees_less_than_the_features_is_what_counts(source, tmp_path):
    keras.utils.set_random_seed(0)
    layers, images = keras.layers, keras.Input((32, 32, 3))
    scaled = layers.Conv2D(8, 3, 2)(images) * np.array([1, 1, 60, 60, 60, 60, 60, 60], np.float32)
    features = layers.GlobalAveragePooling2D()(scaled)  # the six large ones set the steps of 8 bits
    projection = layers.Dense(4, kernel_initializer=keras.initializers.Constant(np.eye(8, 4) * [1, 1, 0, 0]))(features)
    model = keras.Model(images, {"features": features, "projection": projection})
    with pytest.raises(ConfigError, match=r"not written: cosine .* less than --least_cosine"):
        int8_file.export(model, tmp_path / "a.onnx", source, 32, preprocessing=PREPROCESSING)


def test_an_encoder_in_bfloat16_is_refused_in_a_line(source, tmp_path):
    keras.config.set_dtype_policy("mixed_bfloat16")
    try:
        model = small_network()
    finally:
        keras.config.set_dtype_policy("float32")
    with pytest.raises(ConfigError, match=r"cannot (quantise|express) this encoder"):
        int8_file.export(model, tmp_path / "a.onnx", source, 16, preprocessing=PREPROCESSING)


def test_a_transformers_products_with_weights_are_of_8_bits_and_its_sums_are_not(source, tmp_path):
    keras.utils.set_random_seed(0)
    model, path = vit.vit(32, depth=1, heads=2, image_size=32, patch_size=8), tmp_path / "vit.onnx"
    agreement = int8_file.export(model, path, source, 32, preprocessing=PREPROCESSING)
    assert agreement.mean > 0.99
    import onnx

    graph = onnx.load(path).graph
    makers = {output: node.op_type for node in graph.node for output in node.output}
    inputs = [[makers.get(name) for name in node.input] for node in graph.node if node.op_type == "MatMul"]
    assert inputs.count(["DequantizeLinear"] * 2) >= 4  # in each block: q, k and v, the projection, the MLP's two
    assert any("DequantizeLinear" not in of for of in inputs)  # of two things that depend on the image
    sums = [[makers.get(name) for name in node.input] for node in graph.node if node.op_type == "Add"]
    assert not any(of == ["DequantizeLinear"] * 2 for of in sums)


def test_the_cosine_is_taken_from_the_mean_of_what_is_expected():
    rng = np.random.default_rng(0)
    expected = rng.normal(size=(5, 3)) + 100
    found = expected + rng.normal(size=(5, 3))
    centre = expected.sum(axis=0) / 5
    for value, a, b in zip(int8_file.cosines(found, expected), found - centre, expected - centre, strict=True):
        assert value == pytest.approx(a @ b / np.sqrt((a @ a) * (b @ b)))
    assert int8_file.cosines(found, expected).min() < 0.95  # from the origin all are above .999
    assert np.isnan(int8_file.cosines(found * np.nan, expected)).all()


def test_the_command_says_agreement_and_size(network, monkeypatch, tmp_path, capsys):
    config = SimpleNamespace(dataset="embedded", data_dir="", train_split="test", max_bad_fraction=0.05, exif=False)
    monkeypatch.setattr(int8_file.run_folder, "recorded", lambda path: config)
    monkeypatch.setattr(build, "trained", lambda path: keras.Model(network.input, network.output))
    monkeypatch.setattr(int8_file.model_card, "of_run", lambda path: {})
    monkeypatch.setattr(keras.Model, "steps_done", 7, raising=False)
    path = tmp_path / "encoder.onnx"
    arguments = ["--run_dir=x", f"--output={path}", "--format=onnx", "--quantize=int8", "--calibration_images=16"]
    assert export_encoder.main(arguments) == 0
    printed = capsys.readouterr().out
    assert (
        "Calibrates with embedded, as x/config.flags says." in printed
        and f"Wrote {path}, 0." in printed
        and " MiB, in 8 bits: cosine with float32's features and embedding 0.9" in printed
    )
    again = [*arguments, f"--output={tmp_path / 'other.onnx'}"]
    assert export_encoder.main([*again, f"--calibrate={tmp_path / 'none'}"]) == 2
    assert capsys.readouterr().err.count("\n") == 1

    def gone(*arguments, **more):
        raise tf.errors.NotFoundError(None, None, "a.jpg; No such file or directory")

    monkeypatch.setattr(int8_file, "export", gone)
    assert export_encoder.main(again) == 2
    printed = capsys.readouterr().err
    assert "embedded test: " in printed and "a.jpg" in printed and printed.count("\n") == 1


@pytest.mark.parametrize("channels", [1, 2])
def test_grey_images_and_arrays_calibrate_encoders_of_their_channels(channels, monkeypatch, tmp_path):
    rng = np.random.default_rng(0)
    for number in range(40):
        image = np.kron(rng.integers(0, 256, (4, 5, channels), np.uint8), np.ones((8, 8, 1), np.uint8))
        if channels == 1:
            (tmp_path / f"{number}.png").write_bytes(tf.io.encode_png(image).numpy())
        else:
            np.save(tmp_path / f"{number}.npy", image)
    config = SimpleNamespace(dataset=str(tmp_path), data_dir="", train_split="", max_bad_fraction=0.05, exif=False)
    trained = moco_tf.MoCo(
        small_network(channels), dim=4, queue_size=8, preprocessing=PREPROCESSING.of_channels(channels)
    )
    monkeypatch.setattr(int8_file.run_folder, "recorded", lambda path: config)
    monkeypatch.setattr(build, "trained", lambda path: trained)
    monkeypatch.setattr(int8_file.model_card, "of_run", lambda path: {})
    for calibrate in ("", str(tmp_path)):
        path = tmp_path / f"{len(calibrate)}.onnx"
        agreement = int8_file.export_run(tmp_path, path, calibrate, 20, 0.9)
        assert agreement.images == 20 and agreement.mean > 0.9
    assert onnx_file.session(str(path)).get_inputs()[0].shape[-1] == channels


@pytest.mark.parametrize(
    "arguments, line",
    [
        (["--quantize=int8"], "--quantize goes with --format=onnx; got int8"),
        (["--quantize=int4"], "int8"),
        (["--calibrate=photos"], "--calibrate belongs to --quantize=int8; got photos"),
        (["--least_cosine=0.9", "--format=onnx"], "--least_cosine belongs to --quantize=int8; got 0.9"),
        (["--format=onnx", "--quantize=int8", "--least_cosine=2"], "--least_cosine is a cosine, -1 to 1; got 2.0"),
        (
            ["--format=onnx", "--quantize=int8", "--calibration_images=15"],
            "--calibration_images is 16 or more; got 15",
        ),
    ],
)
def test_wrong_flags_end_in_one_line(arguments, line, monkeypatch, capsys):
    monkeypatch.setattr(export_encoder.run_folder, "recorded", lambda path: object())
    assert export_encoder.main(["--run_dir=x", "--output=x.onnx", *arguments]) == 2
    printed = capsys.readouterr().err
    assert line in printed and printed.count("\n") == 1
