"""Writes an encoder as an ONNX file: the signature `serving_default` with its resize, checked in ONNX Runtime.

The engines of evaluation (`evaluate/engines.py`) and `int8_file.py` also use `converted` and `session`.
"""

import logging

import numpy as np
import tensorflow as tf

from moco_tf import build, files, frozen
from moco_tf.command import ConfigError
from moco_tf.data.pipeline import PROCESSORS
from moco_tf.serving import agreement, model_card, saved_model, signatures

OPSET = 18


def export_run(run_dir, path):
    """Writes the encoder of a run folder's last checkpoint; returns and raises as `export`."""
    model = build.trained(run_dir)
    return export(model, path, about=model_card.of_run(run_dir) | {"steps": model.steps_done})


def export(model, path, preprocessing=None, about=None):
    """Writes an ONNX file of `images` uint8 (N, H, W, C), any H and W -> `features` and `embedding`.

    Args:
      model, preprocessing: as `frozen.of_model` takes them.
      path: the file to make.
      about: entries of the file's property "encoder.json", a dict for JSON.

    Returns:
      The deviation of ONNX Runtime from TensorFlow: the largest max|difference| / max|value| of an output.

    Raises:
      ConfigError: the file exists, a package is missing, or ONNX Runtime computes other values.
    """
    encoder = frozen.of_model(model, preprocessing)
    function, spec = signatures.of(encoder)["serving_default"]
    function = tf.function(function, input_signature=[spec])
    with saved_model.aside(path) as file:
        session = save(converted(function, spec), file, description(encoder, model, about))
        largest = _largest_deviation(function, session, encoder.preprocessing)
        if not largest < agreement.TOLERANCE:
            raise ConfigError(f"{path}: ONNX Runtime deviates by {largest:.1e} of the largest value: not written")
    return largest


def converted(function, spec):
    """Converts a TensorFlow function of one tensor -> {name: tensor} to an ONNX model, an `onnx.ModelProto`.

    spec: the `tf.TensorSpec` of its argument.

    Raises:
      ConfigError: a package is missing, or the function has an operation that ONNX does not know.
    """
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
        import tf2onnx
    except ImportError as error:
        raise ConfigError(f"ONNX needs the package {error.name}: pip install 'moco_tf[onnx]'") from None
    logging.getLogger("tf2onnx").setLevel(logging.ERROR)
    try:
        return tf2onnx.convert.from_function(function, input_signature=[spec], opset=OPSET)[0]
    except Exception as error:  # the converter raises any class for an operation that it does not know
        raise ConfigError(f"ONNX cannot express this encoder: {files.first_line(error)}") from None


def session(model):
    """Returns the `onnxruntime.InferenceSession` of a model, given as path or bytes, on this process's processors.

    Raises:
      ConfigError: ONNX Runtime does not take the model.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = PROCESSORS
    # Waiting threads would take the processors from the threads that decode the next images.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    try:
        return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # ONNX Runtime has a class of errors for each reason
        raise ConfigError(f"ONNX Runtime does not take this encoder: {files.first_line(error)}") from None


def save(model, file, description):
    """Writes a model with encoder.json as a property; returns the `session` of the written file."""
    import onnx

    onnx.helper.set_model_props(model, {frozen.DESCRIPTION: files.json_text(description)})
    onnx.save(model, file)
    return session(files.for_tensorflow(file))


def description(encoder, model, about):
    """Returns the contents of encoder.json for a model's `Encoder`: `about`, if given, its input and its outputs."""
    return (about or {}) | saved_model.describe(encoder, [frozen.query_encoder(model)])


def _largest_deviation(function, session, preprocessing):
    """Returns the largest deviation over two batches of random images of two sizes."""
    size, channels = preprocessing.image_size, preprocessing.channels
    rng, names = np.random.default_rng(0), [output.name for output in session.get_outputs()]
    deviations = []
    for shape in ((1, size, size + 7, channels), (3, 2 * size + 1, size, channels)):
        images = rng.integers(0, 256, shape, np.uint8)
        answer = dict(zip(names, session.run(names, {"images": images}), strict=True))
        deviations.append(agreement.deviation(answer, function(images)))
    return float(np.max(deviations))
