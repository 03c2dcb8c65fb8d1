"""Writes the requests that TF Serving replays when it loads a model, so that the first user does not wait for set-up.

The requests are messages of tensorflow-serving-api, a package that only clients need. `saved_model.py` writes their
few fields without the package, and the tests read them with it. Encoding:
https://protobuf.dev/programming-guides/encoding.
"""

import tensorflow as tf

from moco_tf import files

FILE = "assets.extra/tf_serving_warmup_requests"


def write(folder, requests):
    """Writes a SavedModel's warm-up file.

    Args:
      folder: the SavedModel's, a Path.
      requests: (signature, {input's name: array}) pairs, at most 1000.
    """
    (folder / FILE).parent.mkdir()
    with tf.io.TFRecordWriter(files.for_tensorflow(folder / FILE)) as file:
        for signature, inputs in requests:
            file.write(prediction_log(signature, inputs))


def prediction_log(signature, inputs):
    """Returns a serialised `PredictionLog` of one request."""
    model_spec = _field(1, b"encoder") + _field(3, signature.encode())
    request = _field(1, model_spec)
    for name, value in inputs.items():
        request += _field(2, _field(1, name.encode()) + _field(2, tf.make_tensor_proto(value).SerializeToString()))
    return _field(6, _field(1, request))  # predict_log, request


def _field(number, payload):
    """Returns a field of bytes: its number with the wire type 2, the length, the bytes."""
    return _varint(number << 3 | 2) + _varint(len(payload)) + payload


def _varint(number):
    low, rest = number & 127, number >> 7
    return bytes([low | 128]) + _varint(rest) if rest else bytes([low])
