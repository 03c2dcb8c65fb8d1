"""Frozen encoders: of a trained model, of any Keras model, or read from a SavedModel.

Evaluation judges them, and serving writes them.
"""

import dataclasses
import functools
import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import tensorflow as tf

from moco_tf import files
from moco_tf.command import ConfigError
from moco_tf.data import inputs
from moco_tf.data.inputs.image import IMAGENET
from moco_tf.methods.backbones import image_shape
from moco_tf.methods.losses import unit_length
from moco_tf.methods.pretrainer import Pretrainer

DESCRIPTION = "encoder.json"  # the file beside a SavedModel that says what its numbers mean


@dataclasses.dataclass(frozen=True)
class Encoder:
    """A frozen encoder, wherever it comes from.

    Attributes:
      preprocessing: how images, or texts, become its input.
      encode: that input, normalised float32 (N, S, S, 3) or int32 (N, length) -> {"features": float32 (N, D),
        "embedding": float32 (N, dim), of unit length}; in inference mode.
      name: for reports.
      weights: the variables that `encode` computes with, in any order.
    """

    preprocessing: inputs.Preprocessing | inputs.Words
    encode: Callable
    name: str
    weights: Sequence = ()

    @functools.cached_property
    def identity(self):
        """A hash, 64 hex digits, of preprocessing and weights: encoders that differ in either have different hashes.

        The names and order of the weights do not affect it, so that a run and its SavedModel have the same hash.
        """
        hashes = sorted(hashlib.sha256(_described(weight.numpy())).hexdigest() for weight in self.weights)
        about = json.dumps([dataclasses.asdict(self.preprocessing), hashes], sort_keys=True)
        return hashlib.sha256(about.encode()).hexdigest()


def of_model(model, preprocessing=None):
    """The `Encoder` of a model: a trained method's query encoder, or any Keras model of images -> features.

    Args:
      model: a `Pretrainer`; or a model of normalised images -> (N, D), (N, H, W, D), which is averaged over H
        and W, or {"features"} with or without "projection".
      preprocessing: the preprocessing of a model of images; None: ImageNet's, at the model's size.
    """
    if isinstance(model, Pretrainer):
        if preprocessing not in (None, model.preprocessing):
            raise ConfigError(
                f"the model has its own preprocessing, {model.preprocessing}; got {preprocessing}: leave it out"
            )
        of_normalized, preprocessing, name = model.encode, model.preprocessing, model.query_encoder.name
    else:
        of_normalized, name = functools.partial(_encode, model), model.name
    if preprocessing is None:
        preprocessing = dataclasses.replace(IMAGENET, image_size=image_shape(model)[0] or IMAGENET.image_size)

    @tf.function(input_signature=[preprocessing.spec])
    def encode(images):
        return {name: tf.cast(value, tf.float32) for name, value in of_normalized(images).items()}

    return Encoder(preprocessing, encode, name, query_encoder(model).weights)


def _described(array):
    return f"{array.dtype} {array.shape} ".encode() + array.tobytes()


def _encode(model, images):
    """Returns the outputs of a Keras model for images, in the form of `Pretrainer.encode`."""
    outputs = model(images, training=False)
    outputs = outputs if isinstance(outputs, dict) else {"features": outputs}
    features = tf.cast(outputs["features"], tf.float32)
    if features.shape.rank == 4:
        features = tf.reduce_mean(features, axis=(1, 2))
    return {"features": features, "embedding": unit_length(tf.cast(outputs.get("projection", features), tf.float32))}


def query_encoder(model):
    return model.query_encoder if isinstance(model, Pretrainer) else model


def read(path):
    """The `Encoder` of a SavedModel.

    Args:
      path: DIR/<version>; or DIR, for its highest version.

    Raises:
      ConfigError: the SavedModel does not exist, or it lacks the signature `preprocessed`.
    """
    path = version_folder(path)
    loaded = load(path)
    if "preprocessed" not in loaded.signatures:
        has = ", ".join(sorted(loaded.signatures)) or "none"
        raise ConfigError(
            f"{path} lacks the signature `preprocessed`, which evaluation calls; it has {has}: "
            "write it with moco_tf.serving.export"
        )
    signature = loaded.signatures["preprocessed"]
    ((name, spec),) = signature.structured_input_signature[1].items()

    def encode(values, _keep=loaded):  # a signature does not keep its variables alive
        return signature(**{name: tf.cast(values, spec.dtype)})

    # If the weights are constants, the graph's own file holds them.
    weights = signature.variables or [tf.io.decode_raw((path / "saved_model.pb").read_bytes(), tf.uint8)]
    return Encoder(_preprocessing(path, spec), encode, str(path), weights)


def load(path):
    """Loads the SavedModel at a path, as `read` takes it, with TensorFlow; a ConfigError tells why it cannot."""
    path = version_folder(path)
    try:
        return tf.saved_model.load(files.for_tensorflow(path))
    except Exception as error:  # TensorFlow raises various errors for unreadable files
        raise ConfigError(f"{path}: TensorFlow cannot read it: {files.first_line(error)}") from None


def version_folder(path):
    """Returns DIR/<highest version>, or the path itself if it is a SavedModel; refuses any other path."""
    path = Path(path)
    if (path / "saved_model.pb").exists():
        return path
    versions = [p for p in path.glob("*") if p.name.isdigit() and (p / "saved_model.pb").exists()]
    if not versions:
        state = "holds no SavedModel: neither saved_model.pb nor a folder <version> with one"
        raise ConfigError(f"{path} {state if path.exists() else 'does not exist'}")
    return max(versions, key=lambda version: int(version.name))


def _preprocessing(path, spec):
    """Returns encoder.json's preprocessing, which must fit the graph's input; without it, ImageNet's, at its size."""
    description = path / DESCRIPTION
    if not description.exists() and spec.shape.rank != 4:
        raise ConfigError(f"{path} has no {DESCRIPTION}, which says how its input, {spec.shape}, is made")
    if not description.exists():
        name = files.printable(path)
        print(f"{name} has no {DESCRIPTION}: using ImageNet's mean, std and crop, at {spec.shape[1]} pixels.")
        return dataclasses.replace(IMAGENET, image_size=spec.shape[1]).of_channels(spec.shape[3])
    try:
        found = inputs.of_settings(json.loads(description.read_text())["input"])
    except (ValueError, KeyError, TypeError, RecursionError):
        raise ConfigError(
            f"{description} does not say image_size, crop_ratio, mean and std under `input`, or length and "
            "hash_buckets"
        ) from None
    if not found.spec.is_compatible_with(spec):
        raise ConfigError(f"{description} says an input of {found.spec.shape}, the graph has {spec.shape}")
    return found
