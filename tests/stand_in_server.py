"""A small stand-in for tensorflow_model_server: Predict over REST and gRPC, its flags, its models.config.

It runs signatures in a session of TensorFlow, as the server does, and speaks tensorflow-serving-api's service
definitions. Of the server's own work
(polling, batching, warm-up) it does nothing. It listens on this machine alone; the server listens on all addresses.
"""

import argparse
import base64
import json
import threading
from concurrent import futures
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import grpc
import numpy as np
import tensorflow as tf
from google.protobuf import text_format
from tensorflow_serving.apis import predict_pb2, prediction_service_pb2_grpc
from tensorflow_serving.config import model_server_config_pb2


class Models:
    """What a models.config names: signatures by name and version."""

    def __init__(self, file):
        config = text_format.Parse(Path(file).read_text(), model_server_config_pb2.ModelServerConfig())
        self.loaded, self.labels = {}, {}
        for model in config.model_config_list.config:
            assert Path(model.base_path).is_absolute()
            self.labels[model.name] = dict(model.version_labels)
            for version in model.model_version_policy.specific.versions:
                folder = f"{model.base_path}/{version}"
                self.loaded[model.name, version] = signatures_of(folder)

    def signature(self, model, version, label, name):
        """Returns a function of {name: array} and the types of these arrays."""
        versions = [number for known, number in self.loaded if known == model]
        version = version or (self.labels.get(model, {}).get(label) if label else max(versions, default=None))
        if (model, version) not in self.loaded:
            raise LookupError(f"Servable not found for request: {'Specific' if version else 'Latest'}({model})")
        return self.loaded[model, version][name or "serving_default"]


def signatures_of(folder):
    """{a signature's name: (its function of {input: array}, {input: dtype})} of a SavedModel.

    A session it is also because TensorFlow's functions in Python keep a kilobyte for each request that they refuse.
    """
    session = tf.compat.v1.Session(graph=tf.Graph())
    with session.graph.as_default():
        loaded = tf.compat.v1.saved_model.load(session, ["serve"], folder)

    def function(signature):
        outputs = {name: output.name for name, output in signature.outputs.items()}
        return lambda inputs: session.run(outputs, {signature.inputs[name].name: inputs[name] for name in inputs})

    return {
        name: (function(one), {key: tf.as_dtype(value.dtype) for key, value in one.inputs.items()})
        for name, one in loaded.signature_def.items()
    }


class Prediction(prediction_service_pb2_grpc.PredictionServiceServicer):
    def __init__(self, models):
        self.models = models

    def Predict(self, request, context):
        spec, response = request.model_spec, predict_pb2.PredictResponse()
        try:
            function, _ = self.models.signature(spec.name, spec.version.value, spec.version_label, spec.signature_name)
            inputs = {name: tf.make_ndarray(value) for name, value in request.inputs.items()}
            for name, value in function(inputs).items():
                response.outputs[name].CopyFrom(tf.make_tensor_proto(value))
        except LookupError as error:
            context.abort(grpc.StatusCode.NOT_FOUND, str(error))
        except tf.errors.InvalidArgumentError as error:
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error))
        return response


def handler(models):
    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_):
            pass

        def answer(self, status, body):
            text = json.dumps(body).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        def do_GET(self):  # the model's status
            _, _, _, model, *_ = self.path.split("/")
            versions = [str(version) for name, version in models.loaded if name == model]
            self.answer(200, {"model_version_status": [{"version": v, "state": "AVAILABLE"} for v in versions]})

        def do_POST(self):
            path, _, verb = self.path.rpartition(":")
            _, _, _, model, *rest = path.split("/")
            chosen = dict(zip(rest[::2], rest[1::2], strict=True))
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            try:
                assert verb == "predict"
                version = int(chosen.get("versions", 0))
                function, types = models.signature(model, version, chosen.get("labels"), body.get("signature_name"))
                values = body["inputs"]["images"]
                if types["images"] == tf.string:
                    values = [base64.b64decode(value["b64"]) for value in values]
                outputs = function({"images": np.array(values, types["images"].as_numpy_dtype)})
            except LookupError as error:
                return self.answer(404, {"error": str(error)})
            except tf.errors.InvalidArgumentError as error:
                return self.answer(400, {"error": str(error)})
            self.answer(200, {"outputs": {name: np.asarray(value).tolist() for name, value in outputs.items()}})

    return Handler


def main():
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--rest_api_port", type=int, required=True)
    parser.add_argument("--model_config_file", required=True)
    parser.add_argument("--model_config_file_poll_wait_seconds", type=int)
    parser.add_argument("--allow_version_labels_for_unavailable_models", choices=("true", "false"))
    parser.add_argument("--enable_batching", choices=("true", "false"))
    parser.add_argument("--batching_parameters_file")
    parser.add_argument("--grpc_channel_arguments", type=lambda text: text.split("="))
    arguments = parser.parse_args()
    models = Models(arguments.model_config_file)
    name, value = arguments.grpc_channel_arguments
    server = grpc.server(futures.ThreadPoolExecutor(4), options=[(name, int(value))])
    prediction_service_pb2_grpc.add_PredictionServiceServicer_to_server(Prediction(models), server)
    assert server.add_insecure_port(f"localhost:{arguments.port}")
    server.start()
    rest = ThreadingHTTPServer(("localhost", arguments.rest_api_port), handler(models))
    threading.Thread(target=server.wait_for_termination, daemon=True).start()
    rest.serve_forever()


if __name__ == "__main__":
    main()
