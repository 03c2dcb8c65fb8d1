"""Exported encoders say what `predict` says, to every reader, and hold nothing else."""

import json
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf
from absl import flags
from keras import layers

import moco_tf
from moco_tf import frozen
from moco_tf.command import ConfigError
from moco_tf.data.inputs.image import Preprocessing
from moco_tf.encoders import resnet, vit
from moco_tf.serving import saved_model

HERE = Path(__file__).parent
SIZE = 16
SIZES = ((21, 34), (40, 16))
CLOSE = 1e-4  # max|difference| / max|value|
CLOSE_IN = {"openvino": 1e-3}


def own_backbone():
    """What a user may bring: stock BatchNorm, a 4-D output."""
    return keras.Sequential(
        [
            keras.Input((SIZE, SIZE, 3)),
            layers.Conv2D(6, 3, strides=2),
            layers.BatchNormalization(),
            layers.ReLU(),
            layers.Conv2D(8, 3),
        ]
    )


def models():
    keras.utils.set_random_seed(3)
    small = {"dim": 5, "queue_size": 8}
    preprocessing = Preprocessing(SIZE, mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.25))
    yield "resnet", moco_tf.MoCo(resnet.resnet10(image_size=SIZE, width=4), head="mlp", **small)
    yield "own", moco_tf.MoCo(own_backbone(), preprocessing=preprocessing, **small)
    yield "vit", moco_tf.MoCoV3(vit.vit(12, 2, 3, image_size=SIZE, patch_size=8), head="vit", dim=5, hidden_dim=6)


def stir(model):
    """Moves all weights off their initial zeros and ones, so that none can be left out unnoticed."""
    rng = np.random.default_rng(5)
    for variable in model.query_encoder.variables:
        variable.assign(variable + np.abs(rng.normal(0, 0.1, variable.shape)))
    return model


def photographs(number, height, width):
    coarse = np.random.default_rng(number).uniform(0, 255, (number, 4, 5, 3))
    return tf.cast(tf.image.resize(coarse, (height, width)), tf.uint8).numpy()


def png(images):
    return np.array([tf.io.encode_png(image).numpy() for image in images])


CASES = [
    (signature, prepare(photographs(number, *size)), photographs(number, *size))
    for signature, prepare in (("serving_default", lambda images: images), ("encoded_images", png))
    for size in SIZES
    for number in (1, 7)
]


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """{name: (model, SavedModel's folder)}."""
    folder = tmp_path_factory.mktemp("exported")
    found = {}
    for name, model in models():
        found[name] = stir(model), folder / name / "1"
        moco_tf.export_encoder(found[name][0], found[name][1])
    return found


def expected(model, images):
    projection = model.query_encoder(model.preprocessing(images), training=False)["projection"].numpy()
    embedding = projection / np.linalg.norm(projection, axis=1, keepdims=True)
    return {"features": model.predict(images, verbose=0), "embedding": embedding}


def deviation(found, wanted):
    assert found.keys() == wanted.keys()
    assert all(found[name].shape == value.shape for name, value in wanted.items())
    return max(np.abs(found[name] - value).max() / np.abs(value).max() for name, value in wanted.items())


# Readers: (SavedModel's folder, model, cases, a folder to work in) -> outputs for each case.


def in_fresh_python(path, model, cases, folder):
    np.savez(folder / "inputs.npz", **{str(i): images for i, (_, images, _) in enumerate(cases)})
    program = """
import json, sys
sys.modules["moco_tf"] = sys.modules["keras"] = None
import numpy as np, tensorflow as tf
path, names, inputs, outputs = sys.argv[1:]
loaded, inputs, results = tf.saved_model.load(path), np.load(inputs), {}
for i, name in enumerate(json.loads(names)):
    for key, value in loaded.signatures[name](images=tf.constant(inputs[str(i)])).items():
        results[f"{i}/{key}"] = value.numpy()
np.savez(outputs, **results)
"""
    names = json.dumps([signature for signature, _, _ in cases])
    command = [sys.executable, "-c", program, str(path), names, "inputs.npz", "outputs.npz"]
    subprocess.run(command, cwd=folder, check=True, capture_output=True)
    return _outputs(folder, len(cases))


def c_api(path, model, cases, folder):
    library = Path(tf.__file__).parent
    if not (library / "libtensorflow_cc.so.2").exists():
        pytest.skip("this TensorFlow has no libtensorflow_cc.so.2")
    proto = _meta_graph(path)
    runs = [
        {
            "input": next(iter(proto.signature_def[signature].inputs.values())).name,
            "outputs": {name: info.name for name, info in proto.signature_def[signature].outputs.items()},
        }
        for signature, _, _ in cases
    ]
    (folder / "request.json").write_text(json.dumps({"library": str(library), "model": str(path), "runs": runs}))
    np.savez(folder / "inputs.npz", **{str(i): images for i, (_, images, _) in enumerate(cases)})
    command = [sys.executable, str(HERE / "c_api.py"), "request.json", "inputs.npz", "outputs.npz"]
    done = subprocess.run(command, cwd=folder, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return _outputs(folder, len(cases))


def _meta_graph(path):
    from tensorflow.core.protobuf import saved_model_pb2

    return saved_model_pb2.SavedModel.FromString((path / "saved_model.pb").read_bytes()).meta_graphs[0]


def _outputs(folder, number):
    with np.load(folder / "outputs.npz") as file:
        return [
            {name.split("/")[1]: file[name] for name in file if name.startswith(f"{i}/")} for i in range(number)
        ]  # fmt: skip


def saved_model_cli(path, model, cases, folder):
    from tensorflow.python.tools import saved_model_cli as cli

    found = []
    for signature, images, _ in cases:
        np.save(folder / "images.npy", images)
        arguments = {"dir": path, "tag_set": "serve", "signature_def": signature, "outdir": folder,
                     "inputs": f"images={folder}/images.npy"}  # fmt: skip
        flags.FLAGS(["saved_model_cli", "--overwrite", *(f"--{name}={value}" for name, value in arguments.items())])
        cli.run()
        found.append({name: np.load(folder / f"{name}.npy") for name in ("features", "embedding")})
    return found


def openvino(path, model, cases, folder):
    ov = pytest.importorskip("openvino", reason="openvino is not installed: pip install 'moco_tf[engines]'")
    compiled = ov.Core().compile_model(ov.Core().read_model(path), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return [_by_name(compiled(images)) if name == "serving_default" else None for name, images, _ in cases]


def _by_name(answer):
    return {name: value for output, value in answer.items() for name in output.get_names()}


def onnx_runtime(path, model, cases, folder):
    for package in ("onnx", "tf2onnx", "onnxruntime"):
        pytest.importorskip(package, reason=f"{package} is not installed: pip install 'moco_tf[onnx]'")
    import onnxruntime

    from moco_tf.serving import onnx_file

    assert onnx_file.export(model, folder / "encoder.onnx") < CLOSE
    session = onnxruntime.InferenceSession(folder / "encoder.onnx")
    names = [output.name for output in session.get_outputs()]
    return [
        dict(zip(names, session.run(names, {"images": images}), strict=True)) if name == "serving_default" else None
        for name, images, _ in cases
    ]


READERS = (in_fresh_python, c_api, saved_model_cli, openvino, onnx_runtime)
# Of each model and each reader some every day; all of them with -m slow.
EVERY_DAY = {
    "resnet": (in_fresh_python, openvino, onnx_runtime),
    "own": (saved_model_cli,),
    "vit": (c_api,),
}


@pytest.mark.parametrize(
    "name, reader",
    [
        pytest.param(name, reader, marks=() if reader in often else pytest.mark.slow)
        for name, often in EVERY_DAY.items()
        for reader in READERS
    ],
)
def test_every_reader_finds_what_predict_finds(exported, tmp_path, name, reader):
    model, path = exported[name]
    answers = reader(path, model, CASES, tmp_path)
    deviations = [
        deviation(answer, expected(model, pixels))
        for answer, (_, _, pixels) in zip(answers, CASES, strict=True)
        if answer is not None  # a reader without string tensors
    ]
    assert len(deviations) >= 4
    print(f"{name} by {reader.__name__}: {np.max(deviations):.1e}")
    assert np.max(deviations) < CLOSE_IN.get(reader.__name__, CLOSE)


@pytest.mark.slow
@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("name", ["resnet50", "vit_tiny"])
def test_every_reader_finds_what_predict_finds_at_full_size(tmp_path, name, reader):
    keras.utils.set_random_seed(1)
    if name == "resnet50":
        model = moco_tf.MoCo(resnet.resnet50(), head="mlp", queue_size=8)
    else:
        model = moco_tf.MoCoV3(vit.vit_tiny(), head="vit", hidden_dim=512)
    path = tmp_path / "1"
    moco_tf.export_encoder(model, path)
    images = photographs(7, 250, 301)
    cases = [("serving_default", images, images), ("encoded_images", png(images[:1]), images[:1])]
    answers = reader(path, model, cases, tmp_path)
    found = [deviation(a, expected(model, c[2])) for a, c in zip(answers, cases, strict=True) if a is not None]
    print(f"{name} by {reader.__name__}: {max(found):.1e}")
    assert max(found) < CLOSE_IN.get(reader.__name__, CLOSE)


def test_normalised_images_give_what_pixels_give(exported):
    model, path = exported["own"]
    images = photographs(3, 30, 30)
    encoder = frozen.read(path.parent)
    assert encoder.preprocessing == model.preprocessing
    for encode in (encoder.encode, frozen.of_model(model).encode):
        found = {name: value.numpy() for name, value in encode(encoder.preprocessing(images)).items()}
        assert deviation(found, expected(model, images)) < CLOSE


def test_a_batch_of_jpeg_and_png_of_mixed_sizes_gives_what_each_gives_alone(exported):
    model, path = exported["resnet"]
    signature = tf.saved_model.load(str(path)).signatures["encoded_images"]
    jpegs = [tf.io.encode_jpeg(image).numpy() for size in SIZES for image in photographs(2, *size)]
    files = [*jpegs, *png(photographs(1, 50, 20))]
    found = signature(images=tf.constant(files))["features"].numpy()
    for file, features in zip(files, found, strict=True):
        pixels = tf.io.decode_image(file, channels=3) if file not in jpegs else tf.io.decode_jpeg(
            file, channels=3, dct_method="INTEGER_ACCURATE"
        )  # fmt: skip
        alone = model.predict(pixels[np.newaxis], verbose=0)[0]
        assert np.abs(features - alone).max() / np.abs(alone).max() < CLOSE


HUGE = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR" + 2 * (30_000).to_bytes(4, "big") + b"\x08\x02\0\0\0"  # 2.7 GB of pixels


def bad_batch():
    good = png(photographs(3, 20, 30))
    return [good[0], b"no image", good[1], good[2][:60], HUGE, b""], [1, 3, 4, 5]


def test_an_image_that_cannot_be_decoded_is_named_by_its_index(exported):
    images, _ = bad_batch()
    signature = tf.saved_model.load(str(exported["own"][1])).signatures["encoded_images"]
    with pytest.raises(tf.errors.InvalidArgumentError, match=r"in the batch of 6: \[1 3 4 5\]"):
        signature(images=tf.constant(images))
    jpeg = tf.io.encode_jpeg(photographs(1, 30, 20)[0]).numpy()  # JPEGs alone go a way of their own
    with pytest.raises(tf.errors.InvalidArgumentError, match=r"in the batch of 2: \[1\]"):
        signature(images=tf.constant([jpeg, jpeg[: len(jpeg) // 2]]))
    assert signature(images=tf.constant([images[0]]))["features"].shape == (1, 8)
    assert signature(images=tf.constant([], tf.string))["features"].shape == (0, 8)


def test_or_its_rows_are_zeros_and_the_others_as_ever(exported, tmp_path):
    model, _ = exported["own"]
    kernel, bias = np.random.default_rng(0).normal(size=(8, 3)).astype("float32"), np.ones(3, "float32")
    saved_model.export_classifier(model, kernel, bias, tmp_path / "1", ("a", "b", "c"), on_bad_image="zeros")
    signatures = tf.saved_model.load(str(tmp_path / "1")).signatures
    images, bad = bad_batch()
    found = {name: value.numpy() for name, value in signatures["encoded_images"](images=tf.constant(images)).items()}
    good = [0, 2]
    assert found.pop("valid").tolist() == [i in good for i in range(6)]
    alone = signatures["encoded_images"](images=tf.constant([images[i] for i in good]))
    for name, value in found.items():
        np.testing.assert_allclose(value[good], alone[name], rtol=1e-5)
        assert (value[bad] == (-1 if name == "label" else 0)).all()
    all_bad = signatures["encoded_images"](images=tf.constant([b"", b"x"]))
    assert not all_bad["valid"].numpy().any() and not all_bad["features"].numpy().any()


def test_a_classifier_is_softmax_of_the_features_times_its_kernel(exported, tmp_path):
    model, _ = exported["own"]
    rng = np.random.default_rng(1)
    kernel, bias = rng.normal(size=(8, 4)).astype("float32"), rng.normal(size=4).astype("float32")
    saved_model.export_classifier(model, kernel, bias, tmp_path / "1", "abcd")
    images = photographs(5, 30, 20)
    found = tf.saved_model.load(str(tmp_path / "1")).signatures["serving_default"](images=tf.constant(images))
    logits = model.predict(images, verbose=0) @ kernel + bias
    odds = np.exp(logits - logits.max(1, keepdims=True))
    np.testing.assert_allclose(found["probabilities"], odds / odds.sum(1, keepdims=True), rtol=1e-4, atol=1e-6)
    assert found["label"].numpy().tolist() == logits.argmax(1).tolist()
    assert json.loads((tmp_path / "1/encoder.json").read_text())["class_names"] == list("abcd")


def test_nothing_else_is_inside(exported):
    for model, path in exported.values():
        stored = tf.train.load_checkpoint(str(path / "variables/variables")).get_variable_to_shape_map()
        stored.pop("_CHECKPOINTABLE_OBJECT_GRAPH")
        own = [int(np.prod(v.shape)) for v in model.query_encoder.variables]
        assert sorted(int(np.prod(shape)) for shape in stored.values()) == sorted(own)


@pytest.mark.slow
def test_a_resnet50s_variables_are_those_of_backbone_and_head(tmp_path):
    model = moco_tf.MoCo(resnet.resnet50(), head="mlp", queue_size=4096)
    moco_tf.export_encoder(model, tmp_path / "1")
    size = (tmp_path / "1/variables/variables.data-00000-of-00001").stat().st_size
    own = 4 * sum(int(np.prod(v.shape)) for v in model.query_encoder.variables)
    print(f"{size} bytes stored, {own} of backbone and head: {size / own - 1:+.3%}")
    assert abs(size / own - 1) < 0.02


def test_the_warm_up_file_replays(exported):
    logs = pytest.importorskip(
        "tensorflow_serving.apis.prediction_log_pb2",
        reason="tensorflow-serving-api is not installed: pip install 'moco_tf[serving]'",
    )
    _, path = exported["own"]
    signatures = tf.saved_model.load(str(path)).signatures
    records = list(tf.data.TFRecordDataset(str(path / "assets.extra/tf_serving_warmup_requests")))
    requests = [logs.PredictionLog.FromString(record.numpy()).predict_log.request for record in records]
    assert [request.model_spec.signature_name for request in requests] == list(signatures)
    for request in requests:
        inputs = {name: tf.constant(tf.make_ndarray(value)) for name, value in request.inputs.items()}
        assert signatures[request.model_spec.signature_name](**inputs)["features"].shape == (1, 8)


def test_a_foreign_saved_model_is_read_by_its_signature(tmp_path, capsys):
    class Foreign(tf.Module):
        @tf.function(input_signature=[tf.TensorSpec((None, 12, 12, 3), tf.float32, "images")])
        def encode(self, images):
            features = tf.reduce_mean(images, axis=(1, 2))
            return {"features": features, "embedding": tf.math.l2_normalize(features, axis=1)}

    module = Foreign()
    tf.saved_model.save(module, str(tmp_path / "3"), {"preprocessed": module.encode})
    (tmp_path / "20").mkdir()  # half a version
    encoder = frozen.read(tmp_path)
    assert encoder.preprocessing == Preprocessing(12) and encoder.name == str(tmp_path / "3")
    assert "ImageNet's mean, std and crop, at 12 pixels" in capsys.readouterr().out
    np.testing.assert_allclose(encoder.encode(np.ones((2, 12, 12, 3)))["features"], np.ones((2, 3)), rtol=2e-7)


def test_what_cannot_be_read_is_refused_in_one_line(tmp_path):
    def refusal(path):
        with pytest.raises(ConfigError) as error:
            frozen.read(path)
        assert "\n" not in str(error.value)
        return str(error.value)

    assert "does not exist" in refusal(tmp_path / "nowhere")
    assert "holds no SavedModel" in refusal(tmp_path)
    (tmp_path / "1").mkdir()
    (tmp_path / "1/saved_model.pb").write_bytes(b"rubbish")
    assert "TensorFlow cannot read it" in refusal(tmp_path)
    tf.saved_model.save(tf.Module(), str(tmp_path / "2"))
    assert "lacks the signature `preprocessed`" in refusal(tmp_path)


def test_what_cannot_be_written_is_refused_and_leaves_nothing(exported, tmp_path):
    model, path = exported["own"]
    kernel, bias = np.zeros((8, 3), "float32"), np.zeros(3, "float32")
    for wrong, write in {
        "ends in its version": lambda: moco_tf.export_encoder(model, tmp_path / "encoder"),
        "ends in its version, a whole number": lambda: moco_tf.export_encoder(model, tmp_path / "é"),
        "exists": lambda: moco_tf.export_encoder(model, path),
        "is one of error, zeros": lambda: moco_tf.export_encoder(model, tmp_path / "1", on_bad_image="skip"),
        r"is \(8, classes\)": lambda: saved_model.export_classifier(model, kernel[:5], bias, tmp_path / "1"),
        "as many biases and names": lambda: saved_model.export_classifier(model, kernel, bias, tmp_path / "1", ["a"]),
    }.items():
        with pytest.raises(ValueError, match=wrong):
            write()
    assert not list(tmp_path.iterdir())


def test_a_failed_export_leaves_no_version(exported, tmp_path, monkeypatch):
    monkeypatch.setattr(saved_model.warm_up, "write", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        moco_tf.export_encoder(exported["own"][0], tmp_path / "1")
    assert not list(tmp_path.iterdir())


def test_a_plain_model_of_features_is_exported_with_the_features_as_embedding(tmp_path):
    backbone = own_backbone()
    preprocessing = Preprocessing(SIZE)
    moco_tf.export_encoder(backbone, tmp_path / "1", preprocessing)
    images = photographs(2, 20, 20)
    found = tf.saved_model.load(str(tmp_path / "1")).signatures["serving_default"](images=tf.constant(images))
    features = backbone(preprocessing(images)).numpy().mean(axis=(1, 2))
    np.testing.assert_allclose(found["features"], features, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(
        found["embedding"], features / np.linalg.norm(features, axis=1, keepdims=True), rtol=1e-4, atol=1e-6
    )
