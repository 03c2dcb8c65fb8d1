"""Gets embeddings from a TF Serving server: sends image files in batches, receives arrays.

REST needs NumPy and what `import moco_tf` needs. gRPC needs tensorflow-serving-api, which installs TensorFlow. Both
send encoded images of any size to the signature `encoded_images`; see `saved_model.py`.
"""

import base64
import contextlib
import http.client
import json
import re
import time
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np

from moco_tf import files as files_lib
from moco_tf.command import ConfigError

SIGNATURE = "encoded_images"
RESERVED = {"file", "files"}  # names in the .npz file that the client writes
MOST_BYTES, MOST_TEXT = 2**28, 2**16  # bytes of an answer, bytes of an error message
# The first bytes of the files that `data/encoded.py` reads.
STARTS = re.compile(rb"\xff\xd8\xff|\x89PNG\r\n\x1a\n|BM|GIF8|RIFF....WEBP", re.DOTALL)


class ServerError(ConfigError):
    """The server cannot be reached or refuses a request; the message is one line."""


def image_files(path):
    """Returns the image files at a path, sorted: the file, or those at any depth of a folder, by their first bytes."""
    path = Path(path)
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
    images = [file for file in files if STARTS.match(_start(file))]
    if not images:
        raise ConfigError(f"--images={path} {'holds no image' if path.exists() else 'does not exist'}")
    return images


def _start(file):
    return _read(file, 12)


def _read(file, most=-1):
    """Returns the first bytes of a file, or all bytes; refuses a file that cannot be read."""
    try:
        with open(file, "rb") as opened:
            return opened.read(most)
    except OSError as error:
        name = files_lib.printable(str(file))
        raise ConfigError(f"{name} cannot be read ({error.strerror}): allow reading it, or take it out") from None


def embed(files, predict, batch_size):
    """Sends files in batches.

    Args:
      files: paths, at least one.
      predict: a function, list of bytes -> {output's name: array (N, ...)}, that `rest`, `grpc` or `local` made.

    Returns:
      {output's name: array}, one row per file.
    """
    batches = []
    for first in range(0, len(files), batch_size):
        part = files[first : first + batch_size]
        try:
            batches.append(predict([_read(file) for file in part]))
        except ServerError as error:
            raise ServerError(_name_files(str(error), part)) from None
    try:
        return {name: np.concatenate([batch[name] for batch in batches]) for name in batches[0]}
    except (KeyError, ValueError):
        raise ServerError("the server's answers to two requests differ in their form: check the model") from None


def _rows(outputs, number):
    """Returns a server's outputs as {name: array (number, ...)}; refuses what no encoder of this package answers."""
    try:
        arrays = {str(name): _array(value) for name, value in outputs.items()}
    except (AttributeError, TypeError, ValueError):
        arrays = {}
    fit = (array.dtype.kind in "biuf" and array.shape[:1] == (number,) for array in arrays.values())
    if not arrays or not all(fit) or arrays.keys() & RESERVED:
        raise ServerError(
            f"the server does not answer with a row of numbers for each of {number} images: check --model"
        )
    return arrays


def _name_files(message, files):
    """Puts the files' names into the graph's refusal of undecodable images; returns any other message as it is."""
    by_index = re.search(r"images that cannot be decoded, by their index in the batch of \d+: \[([\d ]+)\]", message)
    if not by_index:
        return message
    bad = [int(index) for index in by_index[1].split()]
    names = ", ".join(files_lib.printable(str(files[index])) for index in bad if index < len(files))
    return f"the server cannot decode {names}: take them out, or serve an encoder exported with --on_bad_image=zeros"


def rest(server, model, timeout, version=0, label=""):
    """Makes `predict` over REST.

    Args:
      server: host:port.
      timeout: seconds that a request may take.
      version, label: which of the model's versions; 0 and "": the highest.
    """
    chosen = f"/versions/{version}" if version else f"/labels/{label}" if label else ""
    url = f"http://{server}/v1/models/{model}{chosen}:predict"

    def predict(images):
        inputs = [{"b64": base64.b64encode(image).decode()} for image in images]
        body = json.dumps({"signature_name": SIGNATURE, "inputs": {"images": inputs}}).encode()
        request = urllib.request.Request(url, body, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=timeout) as response:
                text = _whole(response, url, server, timeout)
            outputs = json.loads(text)["outputs"]
        except ServerError:
            raise
        except urllib.error.HTTPError as error:
            raise ServerError(f"{url} refuses: {_reason(error)}") from None
        except TimeoutError:
            raise ServerError(_too_slow(server, timeout)) from None
        except urllib.error.URLError as error:
            if isinstance(error.reason, TimeoutError):
                raise ServerError(_too_slow(server, timeout)) from None
            raise ServerError(f"no server answers at {server}: {_line(error.reason)}") from None
        except (OSError, ValueError, KeyError, TypeError, RecursionError, http.client.HTTPException) as error:
            kind = type(error).__name__
            raise ServerError(f"{url} does not answer as TF Serving's REST does ({kind}): check the port") from None
        return _rows(outputs, len(images))

    return predict


def _whole(response, url, server, timeout):
    """Reads an answer, at most `MOST_BYTES` within `timeout` seconds: the socket's own limit is for each part."""
    until, parts, size = time.monotonic() + timeout, [], 0
    while part := response.read1(2**20):
        parts.append(part)
        size += len(part)
        if size > MOST_BYTES:
            raise ServerError(f"{url} answers with more than {MOST_BYTES >> 20} MB: lower --batch_size")
        if time.monotonic() > until:
            raise ServerError(_too_slow(server, timeout))
    return b"".join(parts)


def _array(value):
    array = np.asarray(value)
    return array.astype(np.float32) if array.dtype == np.float64 else array


def _reason(error):
    """Returns the text of an HTTP error's body, on one line."""
    text = error.read(MOST_TEXT).decode(errors="replace")
    with contextlib.suppress(ValueError, KeyError, TypeError, RecursionError):
        text = json.loads(text)["error"]
    return _line(f"{error.code} {text}")


def _line(text):
    """Returns a server's text as one line, without characters that control a terminal."""
    return files_lib.printable(" ".join(str(text).split()))


def _too_slow(server, timeout):
    return f"{server} took more than {timeout:g} s: raise --timeout, or lower --batch_size"


def grpc(server, model, timeout, version=0, label=""):
    """Makes `predict` over gRPC; the arguments are those of `rest`."""
    try:
        import grpc
        import tensorflow as tf
        from tensorflow_serving.apis import predict_pb2, prediction_service_pb2_grpc
    except ImportError as error:
        raise ConfigError(f"--protocol=grpc needs {error.name}: pip install 'moco_tf[serving]'") from None
    stub = prediction_service_pb2_grpc.PredictionServiceStub(
        grpc.insecure_channel(server, [("grpc.max_receive_message_length", MOST_BYTES)])
    )

    def predict(images):
        request = predict_pb2.PredictRequest()
        request.model_spec.name = model
        request.model_spec.signature_name = SIGNATURE
        if version:
            request.model_spec.version.value = version
        elif label:
            request.model_spec.version_label = label
        request.inputs["images"].CopyFrom(tf.make_tensor_proto(images))
        try:
            response = stub.Predict(request, timeout=timeout)
        except grpc.RpcError as error:
            if error.code() == grpc.StatusCode.DEADLINE_EXCEEDED:
                raise ServerError(_too_slow(server, timeout)) from None
            if error.code() == grpc.StatusCode.UNAVAILABLE:
                raise ServerError(f"no server answers at {server}: {_line(error.details())}") from None
            raise ServerError(f"{server} refuses: {_line(error.details())}") from None
        try:
            outputs = {name: tf.make_ndarray(value) for name, value in response.outputs.items()}
        except (TypeError, ValueError):
            outputs = {}  # is refused as every other answer that is not numbers
        return _rows(outputs, len(images))

    return predict


def local(path):
    """Makes `predict` from a SavedModel on this machine; needs TensorFlow."""
    import tensorflow as tf

    from moco_tf import frozen

    loaded = frozen.load(path)
    if SIGNATURE not in loaded.signatures:
        raise ConfigError(f"{path} takes no files of images: it has no signature {SIGNATURE}")
    signature = loaded.signatures[SIGNATURE]

    def predict(images):
        try:
            return {name: value.numpy() for name, value in signature(images=tf.constant(images)).items()}
        except tf.errors.InvalidArgumentError as error:
            raise ServerError(" ".join(str(error).split())) from None

    return predict
