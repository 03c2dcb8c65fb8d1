"""The engines that compute a frozen encoder's features: --engine names one. Evaluation and search encode through it.

TensorFlow is the reference and the default. ONNX Runtime and OpenVINO compute the same network, which is converted in
memory. They are used only if they agree with TensorFlow on the first images.
"""

import dataclasses
import logging
import time

import numpy as np
import tensorflow as tf

from moco_tf.command import ConfigError
from moco_tf.data.pipeline import PROCESSORS
from moco_tf.serving import agreement, onnx_file

PART = 32  # images that an engine takes at a time; as many of the first batch are checked and timed
ROUNDS = 2  # times that each engine is timed on these images, in turn; the better time counts
SHORT = 300  # seconds: auto does not convert for a shorter encoding, as converting and timing may take a minute

log = logging.getLogger("moco_tf")


def of(encoder, engine, views, total):
    """Returns the `Encoder` with `encode` computed by an engine that agrees with TensorFlow on the first views.

    Args:
      engine: a value of --engine; "tensorflow" returns the encoder as it is.
      views: batches of (the encoder's input, ...), a tf.data.Dataset as `data.views.central` makes it.
      total: how many images will be encoded.

    Raises:
      ConfigError: the named engine lacks a package, cannot compute the encoder, or deviates.
    """
    first = [] if engine == "tensorflow" else [images[:PART] for images, *_ in views.take(1)]
    if not first:  # TensorFlow is wanted, or there is nothing to encode
        return encoder
    (images,) = first
    expected = _arrays(encoder.encode(images))
    if not all(np.isfinite(values).all() for values in expected.values()):
        return encoder  # the caller refuses the features: training has diverged
    if engine == "auto":
        return dataclasses.replace(encoder, encode=_fastest(encoder, images, expected, total))
    try:
        encode, deviation = _checked(engine, _converted(encoder), images, expected)
    except ConfigError as error:
        raise ConfigError(f"--engine={engine}: {error}; --engine=tensorflow computes any encoder") from None
    log.info(f"--engine={engine} agrees with TensorFlow: it deviates by {deviation:.1e} of the largest value.")
    return dataclasses.replace(encoder, encode=encode)


def _fastest(encoder, images, expected, total):
    """Returns the `encode` of the engine that is fastest on images (N, S, S, 3); expected: TensorFlow's outputs.

    Logs which engine it is, and the throughput of each engine.
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
        for engine in RUNTIMES:
            try:
                ways[engine], _ = _checked(engine, model, images, expected)
            except ConfigError as error:
                log.info(f"--engine=auto leaves {engine} out: {error}.")
    except ConfigError as error:
        log.info(f"--engine=auto leaves {' and '.join(RUNTIMES)} out: {error}.")
    seconds = [{engine: seconds_of(encode, images) for engine, encode in ways.items()} for _ in range(ROUNDS)]
    rates = {engine: len(images) / min(of[engine] for of in seconds) for engine in ways}
    fastest = max(rates, key=rates.get)
    text = ", ".join(f"{engine} {rate:.4g}" for engine, rate in rates.items())
    log.info(f"--engine=auto: {fastest}. Images/s of the first {len(images)}: {text}.")
    return ways[fastest]


def seconds_of(encode, images):
    """Returns the seconds that `encode` takes for images."""
    begin = time.perf_counter()
    _arrays(encode(images))
    return time.perf_counter() - begin


def _converted(encoder):
    """Returns the encoder's network as an ONNX model, in bytes; raises what `onnx_file.converted` raises."""
    spec = encoder.preprocessing.spec
    model = onnx_file.converted(tf.function(encoder.encode, input_signature=[spec], autograph=False), spec)
    try:
        return model.SerializeToString()
    except Exception as error:  # protobuf raises its own class for a model beyond 2 GB
        raise ConfigError(f"ONNX cannot hold this encoder in one piece: {error}") from None


def _checked(engine, model, images, expected):
    """Returns an engine's `encode` for an ONNX model, and its deviation from the expected outputs of the images.

    Raises:
      ConfigError: the engine's package is missing, or the engine does not take the model, or it deviates.
    """
    run = RUNTIMES[engine](model)

    def encode(images):
        images = np.asarray(images)
        parts = [run(images[first : first + PART]) for first in range(0, max(1, len(images)), PART)]
        return {name: tf.concat([part[name] for part in parts], axis=0) for name in parts[0]}

    try:
        deviation = agreement.deviation(encode(images), expected)
    except ConfigError:
        raise
    except Exception as error:  # a runtime raises any class for an operation that it cannot do
        raise ConfigError(f"it cannot compute this encoder: {' '.join(str(error).split())}") from None
    if not deviation < agreement.TOLERANCE:
        raise ConfigError(
            f"it deviates from TensorFlow by {deviation:.1e} of the largest value, where {agreement.TOLERANCE:g} is "
            "allowed"
        )
    return encode, deviation


def _arrays(outputs):
    return {name: np.asarray(values) for name, values in outputs.items()}


def _onnx_runtime(model):
    """Returns a function of arrays (N, ...) -> {name: array}, computed by ONNX Runtime."""
    session = onnx_file.session(model)
    names, (argument,) = [output.name for output in session.get_outputs()], session.get_inputs()
    return lambda images: dict(zip(names, session.run(names, {argument.name: images}), strict=True))


def _openvino(model):
    """Returns the same function computed by OpenVINO, in float32 even where the processor has shorter numbers."""
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
    except Exception as error:  # OpenVINO has one class of errors, with many lines
        raise ConfigError(f"OpenVINO does not take this encoder: {' '.join(str(error).split())}") from None
    return lambda images: {output.any_name: values for output, values in compiled(images).items()}


RUNTIMES = {"onnx": _onnx_runtime, "openvino": _openvino}  # an ONNX model in bytes -> a function that runs it
