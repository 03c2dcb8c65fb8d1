"""An encoder as an ONNX file: the signature `serving_default` with its resize, checked in ONNX Runtime."""

import logging

import numpy as np
import tensorflow as tf

from moco_tf import build, files, frozen
from moco_tf.command import ConfigError
from moco_tf.serving import model_card, saved_model, signatures

OPSET = 18
TOLERANCE = 1e-4  # of the largest value


def export_run(run_dir, path):
    """Writes the encoder of a run folder's last checkpoint; returns and raises as `export`."""
    model = build.trained(run_dir)
    return export(model, path, about=model_card.of_run(run_dir) | {"steps": model.steps_done})


def export(model, path, preprocessing=None, about=None):
    """Writes an ONNX file of `images` uint8 (N, H, W, 3), any H and W -> `features` and `embedding`.

    Args:
      model, preprocessing: as `frozen.of_model` takes them.
      path: a file to be made.
      about: what the file's property "encoder.json" is to say, a dict that JSON takes.

    Returns:
      How far ONNX Runtime is from TensorFlow: the largest max|difference| / max|value| of an output.

    Raises:
      ConfigError: the file exists, a package is missing, or ONNX Runtime does not compute the same.
    """
    try:
        import onnx
        import onnxruntime
        import tf2onnx
    except ImportError as error:
        raise ConfigError(f"ONNX needs the package {error.name}: pip install 'moco_tf[onnx]'") from None
    logging.getLogger("tf2onnx").setLevel(logging.ERROR)
    encoder = frozen.of_model(model, preprocessing)
    function, spec = signatures.of(encoder)["serving_default"]
    function = tf.function(function, input_signature=[spec])
    description = (about or {}) | saved_model.describe(encoder, [frozen.query_encoder(model)])
    with saved_model.aside(path) as file:
        try:
            converted, _ = tf2onnx.convert.from_function(function, input_signature=[spec], opset=OPSET)
            onnx.helper.set_model_props(converted, {frozen.DESCRIPTION: files.json_text(description)})
            onnx.save(converted, file)
            session = onnxruntime.InferenceSession(files.for_tensorflow(file), providers=["CPUExecutionProvider"])
        except Exception as error:  # whatever converter and runtime say of an operation that they do not know
            raise ConfigError(f"{path}: ONNX cannot express this encoder: {str(error).splitlines()[0]}") from None
        deviation = _deviation(function, session, encoder.preprocessing.image_size)
        if not deviation < TOLERANCE:
            raise ConfigError(f"{path}: ONNX Runtime deviates by {deviation:.1e} of the largest value: not written")
    return deviation


def _deviation(function, session, size):
    """The largest max|difference| / max|value| of the outputs, over two batches of random images of two sizes."""
    rng, names = np.random.default_rng(0), [output.name for output in session.get_outputs()]
    largest = 0.0
    for shape in ((1, size, size + 7, 3), (3, 2 * size + 1, size, 3)):
        images = rng.integers(0, 256, shape, np.uint8)
        expected = function(images)
        for name, answer in zip(names, session.run(None, {"images": images}), strict=True):
            value = expected[name].numpy()
            largest = max(largest, np.abs(answer - value).max() / np.abs(value).max())
    return float(largest)
