"""Writes SavedModels of encoders for TF Serving; `frozen.read` reads them back.

`DIR/<version>/` has the tag `serve` and the signatures below. All but `feature_maps` return `features` float32 (N, D)
and `embedding` float32 (N, dim), of unit length: the projection, or the features if there is no projection. Axes: N
images, H W their sides, C channels, S side of the encoder's input, D features, L classes.

  serving_default  `images`: uint8 (N, H, W, C), any H and W
  encoded_images   `images`: string (N,), encoded; each image may have its own size; only if C is 1 or 3, as in files
  preprocessed     `images`: float32 (N, S, S, C), normalised; for probes with their own augmentation
  feature_maps     on request: `images`: float32 (N, H, W, C), normalised, any H and W; returns P2 to P5

A classifier's signatures also return `probabilities` float32 (N, L) and `label` int64 (N,).
"""

import contextlib
import dataclasses
import errno
import json
import os
import zipfile
from pathlib import Path

import keras
import numpy as np
import tensorflow as tf

from moco_tf import build, files, frozen
from moco_tf.command import ConfigError
from moco_tf.data.encoded_batch import REQUEST_MEGAPIXELS
from moco_tf.data.errors import ERRORS, reason
from moco_tf.encoders import pyramid
from moco_tf.serving import model_card, signatures, warm_up

BAD_IMAGES = ("error", "zeros")


def export_run(run_dir, path, **options):
    """Writes the encoder of a run folder's last checkpoint; options and errors: `export_encoder`, `build.trained`."""
    model = build.trained(run_dir)
    export_encoder(model, path, about=_of_run(run_dir, model), **options)


def export_probe(run_dir, probe, path, **options):
    """Writes a run folder's encoder with the classifier that `moco_tf.evaluate.linear_probe` wrote into a folder.

    Args:
      probe: the folder, with probe.npz (`kernel`, `bias`) and summary.json (`class_names`).
      options: of `export_classifier`.
    """
    kernel, bias, summary = read_probe(probe)
    model = build.trained(run_dir)
    identity = frozen.of_model(model).identity
    if summary.get("identity", identity) != identity:  # older probes have none
        raise ConfigError(
            f"{probe} was learnt on the features of another encoder, or {run_dir} has been trained further since: run "
            "moco_tf.evaluate.linear_probe again"
        )
    about = _of_run(run_dir, model) | {"probe": summary}
    export_classifier(model, kernel, bias, path, summary["class_names"], about=about, **options)


def read_probe(folder):
    """Returns (kernel (D, L), bias (L,), summary) of a linear probe's folder; refuses a folder without them."""
    folder = Path(folder)
    try:
        summary = json.loads((folder / "summary.json").read_text())
        with np.load(folder / "probe.npz") as file:
            kernel, bias = file["kernel"], file["bias"]
        list(summary["class_names"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError, zipfile.BadZipFile):
        raise ConfigError(
            f"{folder} is not a linear probe, as moco_tf.evaluate.linear_probe writes it: "
            "it needs probe.npz with kernel and bias, and summary.json with class_names"
        ) from None
    return kernel, bias, summary


def version_to_write(folder, version=0):
    """Returns the folder of a version; 0: of the version after the highest in `folder`, 1 in a new folder."""
    numbers = [int(path.name) for path in Path(folder).glob("*") if path.name.isdecimal() and path.name.isascii()]
    return Path(folder) / str(version or max(numbers, default=0) + 1)


def _of_run(run_dir, model):
    return model_card.of_run(run_dir) | {"steps": model.steps_done}


def export_encoder(
    model,
    path,
    preprocessing=None,
    on_bad_image="error",
    about=None,
    feature_maps=False,
    request_megapixels=REQUEST_MEGAPIXELS,
):
    """Writes a SavedModel that TF Serving and `frozen.read` take.

    Args:
      model, preprocessing: as `frozen.of_model` takes them.
      path: the version folder to make, such as encoder/1; a server polls the folder around it.
      on_bad_image: what `encoded_images` does about bytes that cannot be decoded. "error": refuses the batch and names
        the indices of the bytes. "zeros": returns rows of zeros, and `valid` bool (N,), false there.
      about: entries of encoder.json beside input and outputs, a dict for JSON.
      feature_maps: whether to write a signature `feature_maps`, the encoder's pyramid (`encoders.pyramid`).
      request_megapixels: the most that the images of a request to `encoded_images` may have together; a larger request
        is refused by the images' headers.

    Raises:
      ConfigError: a ValueError; the path exists, or does not end in a whole number; the encoder has no pyramid.
    """
    encoder = frozen.of_model(model, preprocessing)
    maps = _maps_of(model) if feature_maps else None
    _write(encoder, [frozen.query_encoder(model)], path, on_bad_image, request_megapixels, about or {}, maps)


def export_classifier(
    model,
    kernel,
    bias,
    path,
    class_names=(),
    preprocessing=None,
    on_bad_image="error",
    about=None,
    request_megapixels=REQUEST_MEGAPIXELS,
):
    """Does `export_encoder` with a linear classifier on the features, as a linear probe trains it.

    Args:
      kernel, bias: (D, L) and (L,), float32.
      class_names: L names for encoder.json, or none.
      The other arguments are those of `export_encoder`. For a bad image, "zeros" returns the label -1.

    Raises:
      ConfigError: as `export_encoder`; or the classifier has another number of features, classes or names.
    """
    encoder = frozen.of_model(model, preprocessing)
    width = encoder.encode.get_concrete_function().structured_outputs["features"].shape[1]
    if kernel.shape[:1] != (width,) or kernel.ndim != 2:
        raise ConfigError(f"the classifier's kernel is ({width}, classes) for this encoder; got {kernel.shape}")
    classes = kernel.shape[1]
    if bias.shape != (classes,) or len(class_names) not in (0, classes):
        raise ConfigError(
            f"a kernel of {classes} classes goes with as many biases and names; got a bias of {bias.shape} and "
            f"{len(class_names)} names"
        )
    linear = keras.layers.Dense(classes, activation="softmax", name="classifier", dtype="float32")
    linear.build((None, width))
    linear.set_weights([kernel, bias])

    @tf.function(input_signature=encoder.encode.input_signature)
    def classify(images):
        outputs = encoder.encode(images)
        probabilities = linear(outputs["features"])
        return outputs | {"probabilities": probabilities, "label": tf.argmax(probabilities, axis=1)}

    classifier = dataclasses.replace(encoder, encode=classify)
    about = (about or {}) | {"class_names": list(class_names)}
    _write(classifier, [frozen.query_encoder(model), linear], path, on_bad_image, request_megapixels, about)


def _maps_of(model):
    """Returns a model's pyramid, of any image size for ResNets; refuses a model without one or with untrained maps."""
    try:
        maps = pyramid(model)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    if maps.count_params() > getattr(model, "backbone", model).count_params():
        raise ConfigError("the maps of a ViT's pyramid come from layers that are not trained: train them with a head")
    return maps


def _write(encoder, parts, path, on_bad_image, request_megapixels, about, maps=None):
    """Writes an encoder; `parts` are the layers that own its variables, `maps` is its pyramid, if wanted."""
    path = Path(path)
    if not (path.name.isdecimal() and path.name.isascii()):
        raise ConfigError(f"a SavedModel's folder ends in its version, a whole number, as in encoder/1; got {path}")
    if on_bad_image not in BAD_IMAGES:
        raise ConfigError(f"on_bad_image is one of {', '.join(BAD_IMAGES)}; got {on_bad_image!r}")
    if not request_megapixels > 0:
        raise ConfigError(f"request_megapixels is more than 0; got {request_megapixels}")
    with aside(path) as folder:
        # The archive keeps the variables that its endpoints read. This code tracks no variables itself, as the archive
        # would store tracked variables twice.
        archive = keras.export.ExportArchive()
        for name, (answer, spec) in signatures.of(encoder, on_bad_image, request_megapixels).items():
            archive.add_endpoint(name, answer, [spec])
        if maps:
            images = tf.TensorSpec((None, None, None, maps.input.shape[-1]), tf.float32, "images")
            archive.add_endpoint("feature_maps", lambda images: maps(images, training=False), [images])
        archive.write_out(files.for_tensorflow(folder), verbose=False)
        kinds = encoder.preprocessing.signatures()
        about = about | describe(encoder, parts) | {"on_bad_image": on_bad_image}
        if "encoded_images" in kinds:
            about["request_megapixels"] = request_megapixels
        model_card.write(folder, about, {name: kind.about for name, kind in kinds.items()})
        warm_up.write(folder, [(name, {kind.argument.name: kind.example}) for name, kind in kinds.items()])
    if encoder.preprocessing.unit == "images" and "encoded_images" not in kinds:
        print(f"{path} has no signature encoded_images: files have no {encoder.preprocessing.channels} channels.")


def describe(encoder, parts):
    """Returns the entries of encoder.json for any encoder: its input, its outputs, the parameters of its `parts`."""
    specs = encoder.encode.get_concrete_function().structured_outputs
    shapes = {name: ", ".join(map(str, ("N", *spec.shape[1:]))) for name, spec in specs.items()}
    return {
        "input": dataclasses.asdict(encoder.preprocessing),
        "outputs": {name: f"{spec.dtype.name} ({shapes[name]})" for name, spec in specs.items()},
        "parameters": sum(part.count_params() for part in parts),
    }


@contextlib.contextmanager
def aside(path):
    """Gives a path to write to and moves it to `path` in one step after success: a server never sees half of it.

    Raises:
      ConfigError: `path` exists.
      OSError: the path cannot be written; also where TensorFlow says so.
    """
    absolute = Path(path).absolute()
    exists = ConfigError(f"{path} exists: choose another place, or delete it yourself")
    if os.path.lexists(absolute):
        raise exists
    try:
        files.make_folder(absolute.parent)
        with files.aside(absolute, replaces=False) as writing:
            yield writing
    except OSError as error:
        if error.errno in (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR):  # the path was made meanwhile
            raise exists from None
        raise
    except ERRORS as error:  # TensorFlow failed to write
        raise OSError(errno.EIO, reason(error), str(path)) from None
