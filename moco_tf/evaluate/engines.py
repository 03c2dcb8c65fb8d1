"""Which library computes a frozen encoder's features: what --engine names. Evaluation and search encode through it.

TensorFlow's are the reference, and the default. ONNX Runtime and OpenVINO compute the same network, converted in
memory; either counts only if it agrees with TensorFlow on the first images.
"""

import dataclasses
import logging
import time

import numpy as np
import tensorflow as tf

from moco_tf.command import ConfigError
from moco_tf.data.pipeline import PROCESSORS
from moco_tf.serving import onnx_file

PART = 32  # images that an engine takes at a time; so many of the first batch are checked, and timed
ROUNDS = 2  # in which the engines take turns at these; the better one counts
SHORT = 300  # seconds of encoding below which auto does not convert: that and the timing may take a minute

log = logging.getLogger("moco_tf")


def of(encoder, engine, views, total):
    """The `Encoder` whose `encode` is computed by an engine, which agrees with TensorFlow on the first of the views.

    Args:
      engine: as --engine has it; "tensorflow" gives the encoder as it is.
      views: batches of (the encoder's input, ...), a tf.data.Dataset as `data.views.central` makes it.
      total: how many images are going to be encoded.

    Raises:
      ConfigError: the engine that is named lacks a package, cannot compute the encoder, or deviates.
    """
    first = [] if engine == "tensorflow" else [images[:PART] for images, *_ in views.take(1)]
    if not first:  # or nothing to encode
        return encoder
    (images,) = first
    expected = _arrays(encoder.encode(images))
    if not all(np.isfinite(values).all() for values in expected.values()):
        return encoder  # for its features to be refused: training has diverged
    if engine == "auto":
        return dataclasses.replace(encoder, encode=_fastest(encoder, images, expected, total))
    try:
        encode, deviation = _checked(engine, _converted(encoder), images, expected)
    except ConfigError as error:
        raise ConfigError(f"--engine={engine}: {error}; --engine=tensorflow computes any encoder") from None
    log.info(f"--engine={engine} agrees with TensorFlow: it deviates by {deviation:.1e} of the largest value.")
    return dataclasses.replace(encoder, encode=encode)


def _fastest(encoder, images, expected, total):
    """The `encode` of the engine that is fastest on images (N, S, S, 3), of which TensorFlow makes what is expected.

    Says which it is, and what the others do.
    """
    rate = len(images) / seconds_of(encoder.encode, images)
    if total / rate < SHORT:
        log.info(
            f"--engine=auto: tensorflow, {rate:.4g} images/s. It needs less than {SHORT // 60} minutes for "
            f"{total} images, so no other engine is tried."
        )
        return encoder.encode
    ways = {"tensorflow": encoder.encode}
    try:
        model = _converted(encoder)
        for engine in OPENED:
            try:
                ways[engine], _ = _checked(engine, model, images, expected)
            except ConfigError as error:
                log.info(f"--engine=auto leaves {engine} out: {error}.")
    except ConfigError as error:
        log.info(f"--engine=auto leaves {' and '.join(OPENED)} out: {error}.")
    seconds = [{engine: seconds_of(encode, images) for engine, encode in ways.items()} for _ in range(ROUNDS)]
    rates = {engine: len(images) / min(of[engine] for of in seconds) for engine in ways}
    fastest = max(rates, key=rates.get)
    text = ", ".join(f"{engine} {rate:.4g}" for engine, rate in rates.items())
    log.info(f"--engine=auto: {fastest}. Images/s of the first {len(images)}: {text}.")
    return ways[fastest]


def seconds_of(encode, images):
    """How long an `encode` takes for images."""
    begin = time.perf_counter()
    _arrays(encode(images))
    return time.perf_counter() - begin


def _converted(encoder):
    """The encoder's network as an ONNX model, in bytes; raises as `onnx_file.converted`."""
    spec = encoder.preprocessing.spec
    model = onnx_file.converted(tf.function(encoder.encode, input_signature=[spec], autograph=False), spec)
    try:
        return model.SerializeToString()
    except Exception as error:  # protobuf's own class, of a model beyond 2 GB
        raise ConfigError(f"ONNX cannot hold this encoder in one piece: {error}") from None


def _checked(engine, model, images, expected):
    """(An engine's `encode` for an ONNX model, its deviation from what is expected of images).

    Raises:
      ConfigError: its package is missing, it does not take the model, or it deviates.
    """
    run = OPENED[engine](model)

    def encode(images):
        images = np.asarray(images)
        parts = [run(images[first : first + PART]) for first in range(0, max(1, len(images)), PART)]
        return {name: tf.concat([part[name] for part in parts], axis=0) for name in parts[0]}

    try:
        deviation = onnx_file.deviation(encode(images), expected)
    except ConfigError:
        raise
    except Exception as error:  # whatever a runtime says of an operation that it finds it cannot do
        raise ConfigError(f"it cannot compute this encoder: {' '.join(str(error).split())}") from None
    if not deviation < onnx_file.TOLERANCE:
        raise ConfigError(
            f"it deviates from TensorFlow by {deviation:.1e} of the largest value, where {onnx_file.TOLERANCE:g} is "
            "allowed"
        )
    return encode, deviation


def _arrays(outputs):
    return {name: np.asarray(values) for name, values in outputs.items()}


def _onnx_runtime(model):
    """A function of arrays (N, ...) -> {name: array} by ONNX Runtime."""
    session = onnx_file.session(model)
    names, (argument,) = [output.name for output in session.get_outputs()], session.get_inputs()
    return lambda images: dict(zip(names, session.run(names, {argument.name: images}), strict=True))


def _openvino(model):
    """The same by OpenVINO, in float32 where the processor has shorter numbers, too."""
    try:
        import openvino
    except ImportError as error:
        raise ConfigError(f"OpenVINO needs the package {error.name}: pip install 'moco_tf[engines]'") from None
    core = openvino.Core()
    settings = {
        "INFERENCE_PRECISION_HINT": "f32",
        "INFERENCE_NUM_THREADS": PROCESSORS,
        "NUM_STREAMS": 1,
        "ENABLE_CPU_PINNING": False,  # the next images are decoded on the same processors
    }
    try:
        compiled = core.compile_model(core.read_model(model), "CPU", settings)
    except Exception as error:  # its one class of errors says many lines
        raise ConfigError(f"OpenVINO does not take this encoder: {' '.join(str(error).split())}") from None
    return lambda images: {output.any_name: values for output, values in compiled(images).items()}


OPENED = {"onnx": _onnx_runtime, "openvino": _openvino}  # an ONNX model in bytes -> what runs it
