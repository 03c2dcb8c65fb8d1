"""SavedModels of encoders: written for TF Serving, read back for evaluation.

`DIR/<version>/` has the tag `serve` and three signatures, which all return `features` float32 (N, D) and `embedding`
float32 (N, dim), of unit length: the projection, or the features where there is no projection. Axes: N images, H W
their sides, S side of the encoder's input, D features, L classes.

  serving_default  `images`: uint8 (N, H, W, 3), any H and W
  encoded_images   `images`: string (N,), encoded; of any size, each its own
  preprocessed     `images`: float32 (N, S, S, 3), normalised; for probes with their own augmentation

A classifier's also return `probabilities` float32 (N, L) and `label` int64 (N,).
"""

import contextlib
import dataclasses
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import keras
import tensorflow as tf

from moco_tf.command import ConfigError
from moco_tf.data.preprocessing import IMAGENET, Preprocessing
from moco_tf.losses import unit_length
from moco_tf.methods.contrastive import ContrastiveModel, image_shape

DESCRIPTION = "encoder.json"  # beside the graph: what the encoder is, and how it brings images to its input
WARMUP = "assets.extra/tf_serving_warmup_requests"
BAD_IMAGES = ("error", "zeros")


@dataclasses.dataclass(frozen=True)
class Encoder:
    """A frozen encoder, wherever it comes from.

    Attributes:
      preprocessing: how images become its input.
      encode: normalised float32 (N, S, S, 3) -> {"features": float32 (N, D), "embedding": float32 (N, dim), of unit
        length}; in inference mode.
      name: for reports.
    """

    preprocessing: Preprocessing
    encode: Callable
    name: str


def of_model(model, preprocessing=None):
    """The `Encoder` of a model: a trained method's query encoder, or any Keras model of images -> features.

    Args:
      model: a `MoCo` or `MoCoV3`; or a model of normalised images -> (N, D), (N, H, W, D), which is averaged over H
        and W, or {"features"} with or without "projection".
      preprocessing: of the latter; None: ImageNet's, of the model's size.
    """
    if isinstance(model, ContrastiveModel):
        model, preprocessing = model.query_encoder, model.preprocessing
    if preprocessing is None:
        preprocessing = dataclasses.replace(IMAGENET, image_size=image_shape(model)[0] or IMAGENET.image_size)
    size = preprocessing.image_size

    @tf.function(input_signature=[tf.TensorSpec((None, size, size, 3), tf.float32, "images")])
    def encode(images):
        found = model(images, training=False)
        found = found if isinstance(found, dict) else {"features": found}
        features = tf.cast(found["features"], tf.float32)
        if features.shape.rank == 4:
            features = tf.reduce_mean(features, axis=(1, 2))
        return {"features": features, "embedding": unit_length(tf.cast(found.get("projection", features), tf.float32))}

    return Encoder(preprocessing, encode, model.name)


# Reading.


def read(path):
    """The `Encoder` of a SavedModel.

    Args:
      path: DIR/<version>, or DIR, of which the highest version is taken.

    Raises:
      ConfigError: there is no such SavedModel, or it lacks the signature `preprocessed`.
    """
    path = version_folder(path)
    try:
        loaded = tf.saved_model.load(str(path))
    except Exception as error:  # whatever TensorFlow says of files that it cannot read
        raise ConfigError(f"{path}: TensorFlow cannot read it: {str(error).splitlines()[0]}") from None
    if "preprocessed" not in loaded.signatures:
        has = ", ".join(sorted(loaded.signatures)) or "none"
        raise ConfigError(
            f"{path} lacks the signature `preprocessed`, which evaluation calls; it has {has}: "
            "write it with export.encoder"
        )
    signature = loaded.signatures["preprocessed"]
    shape = signature.structured_input_signature[1]["images"].shape

    def encode(images, _keep=loaded):  # a signature does not keep the variables that it reads
        return signature(images=tf.cast(images, tf.float32))

    return Encoder(_preprocessing(path, shape[1]), encode, str(path))


def version_folder(path):
    """DIR/<highest version>, or the path itself where it is a SavedModel; refuses what is neither."""
    path = Path(path)
    if (path / "saved_model.pb").exists():
        return path
    numbers = [int(p.name) for p in path.glob("*") if p.name.isdigit() and (p / "saved_model.pb").exists()]
    if not numbers:
        state = "holds no SavedModel: neither saved_model.pb nor a folder <version> with one"
        raise ConfigError(f"{path} {state if path.exists() else 'does not exist'}")
    return path / str(max(numbers))


def _preprocessing(path, size):
    """What encoder.json says, for the size that the graph has; ImageNet's where there is none."""
    description = path / DESCRIPTION
    if not description.exists():
        print(f"{path} has no {DESCRIPTION}: its input is taken to be ImageNet's mean, std and crop, {size} pixels.")
        return dataclasses.replace(IMAGENET, image_size=size)
    try:
        found = json.loads(description.read_text())["input"]
        fields = {field.name: found[field.name] for field in dataclasses.fields(Preprocessing)}
    except (ValueError, KeyError, TypeError):
        raise ConfigError(f"{description} does not say image_size, crop_ratio, mean and std under `input`") from None
    if fields["image_size"] != size:
        raise ConfigError(f"{description} says an input of {fields['image_size']} pixels, the graph has {size}")
    return Preprocessing(**{k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()})


# Writing.


def export_encoder(model, path, preprocessing=None, on_bad_image="error", about=None):
    """Writes a SavedModel that TF Serving and `read` take.

    Args:
      model, preprocessing: as `of_model` takes them.
      path: its version folder, such as encoder/1, to be made; a server polls the folder around it.
      on_bad_image: what `encoded_images` does about bytes that cannot be decoded. "error": refuses the batch, naming
        their indices. "zeros": gives rows of zeros, and `valid` bool (N,), false there.
      about: what encoder.json is to say beside input and outputs, a dict that JSON takes.

    Raises:
      ValueError: the path exists, or does not end in a whole number.
    """
    encoder = of_model(model, preprocessing)
    _write(encoder, [_query_encoder(model)], path, on_bad_image, about or {})


def export_classifier(model, kernel, bias, path, class_names=(), preprocessing=None, on_bad_image="error", about=None):
    """`export_encoder` with a linear classifier on the features, as a linear probe trains it.

    Args:
      kernel, bias: (D, L) and (L,), float32.
      class_names: L names for encoder.json, or none.
      The others are `export_encoder`'s. Where an image is bad, "zeros" gives the label -1.

    Raises:
      ValueError: as `export_encoder`; the classifier is of another number of features, classes or names.
    """
    encoder = of_model(model, preprocessing)
    width = encoder.encode.get_concrete_function().structured_outputs["features"].shape[1]
    if kernel.shape[:1] != (width,) or kernel.ndim != 2:
        raise ValueError(f"the classifier's kernel is ({width}, classes) for this encoder; got {kernel.shape}")
    classes = kernel.shape[1]
    if bias.shape != (classes,) or len(class_names) not in (0, classes):
        raise ValueError(
            f"a kernel of {classes} classes goes with as many biases and names; got a bias of {bias.shape} and "
            f"{len(class_names)} names"
        )
    linear = keras.layers.Dense(classes, activation="softmax", name="classifier", dtype="float32")
    linear.build((None, width))
    linear.set_weights([kernel, bias])

    @tf.function(input_signature=encoder.encode.input_signature)
    def classify(images):
        found = encoder.encode(images)
        probabilities = linear(found["features"])
        return found | {"probabilities": probabilities, "label": tf.argmax(probabilities, axis=1)}

    classifier = dataclasses.replace(encoder, encode=classify)
    about = (about or {}) | {"class_names": list(class_names)}
    _write(classifier, [_query_encoder(model), linear], path, on_bad_image, about)


def _query_encoder(model):
    return model.query_encoder if isinstance(model, ContrastiveModel) else model


def _write(encoder, parts, path, on_bad_image, about):
    """Writes an encoder; `parts` are the layers that own its variables."""
    path = Path(path)
    if not path.name.isdigit():
        raise ValueError(f"a SavedModel's folder ends in its version, a whole number, as in encoder/1; got {path}")
    if on_bad_image not in BAD_IMAGES:
        raise ValueError(f"on_bad_image is one of {', '.join(BAD_IMAGES)}; got {on_bad_image!r}")
    with aside(path) as folder:
        archive = keras.export.ExportArchive()
        for part in parts:
            archive.track(part)
        for name, (function, spec) in _signatures(encoder, on_bad_image).items():
            archive.add_endpoint(name, function, [spec])
        archive.write_out(str(folder), verbose=False)
        description = {
            "input": dataclasses.asdict(encoder.preprocessing),
            "outputs": {
                name: {"dtype": spec.dtype.name, "shape": ["N", *spec.shape[1:]]}
                for name, spec in encoder.encode.get_concrete_function().structured_outputs.items()
            },
            "on_bad_image": on_bad_image,
        }
        (folder / DESCRIPTION).write_text(json.dumps(about | description, indent=1) + "\n")


@contextlib.contextmanager
def aside(path):
    """A folder to write into, which becomes `path` in one step when all is well; a server never sees half of it.

    Raises:
      ValueError: there is something at `path`.
    """
    path = Path(path).absolute()
    if os.path.lexists(path):
        raise ValueError(f"{path} exists: choose another version, or delete it yourself")
    folder = path.with_name(f".{path.name}.writing-{os.getpid()}")
    folder.mkdir(parents=True)
    try:
        yield folder
        os.rename(folder, path)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _signatures(encoder, on_bad_image):
    """{name: (function, the specification of its argument)}; the first is the server's default."""
    preprocessing, size = encoder.preprocessing, encoder.preprocessing.image_size

    def of_pixels(images):
        return encoder.encode(preprocessing(images))

    def of_bytes(images):
        views, valid = decoded(images, preprocessing)
        if on_bad_image == "error":
            with tf.control_dependencies([_all_valid(valid)]):
                return encoder.encode(tf.identity(views))
        found = {name: _keep(valid, value) for name, value in encoder.encode(views).items()}
        return found | {"valid": valid}

    return {
        "serving_default": (of_pixels, tf.TensorSpec((None, None, None, 3), tf.uint8, "images")),
        "encoded_images": (of_bytes, tf.TensorSpec((None,), tf.string, "images")),
        "preprocessed": (encoder.encode, tf.TensorSpec((None, size, size, 3), tf.float32, "images")),
    }


def decoded(images, preprocessing):
    """Encoded images of any sizes -> the encoder's input; runs beside one another, one bad image spoils no other.

    Args:
      images: string (N,).

    Returns:
      Normalised float32 (N, S, S, 3), zeros where an image cannot be decoded; bool (N,), whether it can.
    """
    number = tf.shape(images)[0]
    shape = (preprocessing.image_size, preprocessing.image_size, 3)
    # An op that fails, fails the whole graph; only tf.data can pass over its error.
    views = (
        tf.data.Dataset.from_tensor_slices(images)
        .enumerate()
        .map(lambda index, image: (index, preprocessing.of_encoded(image)), num_parallel_calls=tf.data.AUTOTUNE)
        .ignore_errors()
        .batch(tf.cast(tf.maximum(number, 1), tf.int64))
    )
    none = tf.zeros((0,), tf.int64), tf.zeros((0, *shape))
    indices, views = views.reduce(none, lambda _, batch: batch)  # the one batch, or none of it
    indices = indices[:, tf.newaxis]
    valid = tf.scatter_nd(indices, tf.ones_like(indices[:, 0], tf.int32), [tf.cast(number, tf.int64)]) > 0
    return tf.scatter_nd(indices, tf.ensure_shape(views, (None, *shape)), tf.cast([number, *shape], tf.int64)), valid


def _all_valid(valid):
    bad = tf.where(~valid)[:, 0]
    text = tf.strings.format(
        "images that cannot be decoded, by their index in the batch of {}: {}", (tf.size(valid), bad), summarize=-1
    )
    return tf.debugging.Assert(tf.reduce_all(valid), [text])


def _keep(valid, rows):
    """Rows (N,) or (N, C) where valid, elsewhere 0, of integers -1."""
    valid = tf.reshape(valid, [-1] + [1] * (rows.shape.rank - 1))
    return tf.where(valid, rows, tf.zeros_like(rows) - (1 if rows.dtype.is_integer else 0))
