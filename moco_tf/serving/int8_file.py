"""Writes an encoder as an ONNX file that computes in 8 bits: ONNX Runtime's static quantiser, calibrated on images.

The file takes the same input as the float32 file of `onnx_file.py`. It is kept only if its outputs agree with the
float32 encoder's by cosine, on images that did not calibrate it. Axes: N images, S side, C channels, D
features.
"""

import dataclasses
import logging
import tempfile
from pathlib import Path

import numpy as np
import tensorflow as tf

from moco_tf import build, frozen, run_folder
from moco_tf.command import ConfigError
from moco_tf.data import dataset, errors
from moco_tf.data.encoded import decode_safely
from moco_tf.data.inputs.image import Preprocessing
from moco_tf.files import first_line, printable
from moco_tf.serving import model_card, onnx_file, saved_model

log = logging.getLogger("moco_tf")

LEAST_COSINE = 0.99
FEWEST = 16  # images to calibrate on
# Sums beside convolutions stay in 8 bits. Sums of a transformer's branches, which have outliers, stay in float32.
OF_CONVOLUTIONS = ["Conv", "MatMul", "Gemm", "Add", "MaxPool", "Pad"]
OF_PRODUCTS = ["Conv", "MatMul", "Gemm"]


@dataclasses.dataclass(frozen=True)
class Agreement:
    """How well an 8-bit encoder's outputs agree with float32's: those of its features or embedding that agree less.

    Attributes:
      mean, lowest: of `cosines` over the held-out images; images: the number of held-out images.
    """

    mean: float
    lowest: float
    images: int

    def __str__(self):
        of = f"{self.images} other images, {self.lowest:.4f} at the lowest"
        return f"cosine with float32's features and embedding {self.mean:.4f} in the mean of {of}"


def export_run(run_dir, path, calibrate="", number=256, least=LEAST_COSINE):
    """Writes the encoder of a run folder's last checkpoint; returns and raises as `export`.

    calibrate: images, as --dataset names them; "": the run's images.
    """
    config, manifest = run_folder.recorded(run_dir), Path(run_dir) / "train_images.csv"
    model = build.trained(run_dir)
    channels = frozen.of_model(model).preprocessing.channels_of_files
    if calibrate:
        split = dataset.find(calibrate, "", config.train_split, config.max_bad_fraction, channels=channels)
        source = split.open()
    else:  # the images in the run's manifest are already checked
        begun = manifest.exists()
        where = config.dataset, config.data_dir, config.train_split
        flags = printable(Path(run_dir) / "config.flags")  # a stranger's may lead anywhere
        log.info(f"Calibrates with {printable(config.dataset)}, as {flags} says.")
        split = dataset.find(*where, config.max_bad_fraction, begun, config.exif, channels)
        source = split.open(manifest, begun, writes=False)
    about = model_card.of_run(run_dir) | {"steps": model.steps_done}
    try:
        return export(model, path, source, number, least, about=about)
    except errors.ERRORS as error:
        raise ConfigError(f"{source.name}: {errors.reason(error)}; --calibrate names other images") from None


def export(model, path, source, number=256, least=LEAST_COSINE, preprocessing=None, about=None):
    """Writes an ONNX file as `onnx_file.export` does, but with convolutions and matrix products of 8-bit integers.

    Args:
      model, preprocessing, path, about: as `onnx_file.export` takes them.
      source: a `Source` of images. `number` of them calibrate, and as many others judge; all are evenly spread.
      least: the mean of `cosines` below which nothing is written.

    Returns:
      An `Agreement`.

    Raises:
      ConfigError: as `onnx_file.export`; or the encoder does not take single images, there are too few images, or the
        mean cosine is less than `least`.
    """
    encoder = frozen.of_model(model, preprocessing)
    if type(encoder.preprocessing) is not Preprocessing or source.unit != "images":
        raise ConfigError(f"8 bits are for encoders of single images; this is one of {encoder.preprocessing}")
    images = [record["image"] for record in source.in_order(2 * number).as_numpy_iterator()]  # encoded
    calibrating, judging = images[::2], images[1::2]
    if len(judging) < FEWEST:
        raise ConfigError(
            f"calibrating takes {FEWEST} images or more, judging as many others; {source.name} has {len(images)}"
        )
    with saved_model.aside(path) as file:
        quantised = _quantised(encoder, calibrating)
        whole = _after_pixels(encoder, quantised)
        note = {"quantized": "int8", "calibrated_on": f"{len(calibrating)} images of {source.name}"}
        session = onnx_file.save(whole, file, onnx_file.description(encoder, model, (about or {}) | note))
        agreement = _agreement(encoder, session, judging)
        if not agreement.mean >= least:
            raise ConfigError(
                f"{path} is not written: {agreement}, less than --least_cosine={least:g}; calibrate on more images "
                "(--calibration_images), on such as will be encoded (--calibrate), or export float32"
            )
    return agreement


def cosines(found, expected):
    """Returns the cosines (N,), float64, of the rows of two arrays (N, D), each minus the mean row of `expected`.

    Seen from the origin, all of an encoder's features may point in nearly one direction. Without the mean, only the
    part that tells images apart remains.
    """
    centre = expected.mean(axis=0, dtype=np.float64)
    a, b = found - centre, expected - centre
    lengths = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    return np.einsum("nd,nd->n", a, b) / np.maximum(lengths, np.finfo(np.float64).tiny)


def _quantised(encoder, images):
    """Returns the encoder's network in 8 bits, calibrated on encoded images: an ONNX model of views (N, S, S, C)."""
    spec = encoder.preprocessing.spec
    model = onnx_file.converted(encoder.encode, spec)
    import onnx
    from onnxruntime import quantization
    from onnxruntime.quantization.shape_inference import quant_pre_process

    views = ({spec.name: _view(encoder, image).numpy()} for image in images)

    class Reader(quantization.CalibrationDataReader):
        def get_next(self):
            return next(views, None)

    has_attention = any(node.op_type == "Softmax" for node in model.graph.node)
    with tempfile.TemporaryDirectory() as folder:
        whole, prepared, file = (Path(folder) / f"{name}.onnx" for name in ("whole", "prepared", "int8"))
        onnx.save(model, whole)
        try:
            quant_pre_process(whole, prepared, skip_symbolic_shape=True)  # shape inference needs another package
            quantization.quantize_static(
                prepared,
                file,
                Reader(),
                op_types_to_quantize=OF_PRODUCTS if has_attention else OF_CONVOLUTIONS,
                per_channel=True,
                activation_type=quantization.QuantType.QUInt8,
                weight_type=quantization.QuantType.QInt8,
                # AVX2 and AVX-512 without VNNI add two products in 16 bits, which overflow if weights use all 8 bits.
                reduce_range=True,
                extra_options={"MatMulConstBOnly": True},
            )
        except (OSError, MemoryError, *errors.ERRORS):  # of the machine, or of an image
            raise
        except Exception as error:  # the quantiser raises classes of its own
            raise ConfigError(f"ONNX Runtime cannot quantise this encoder: {first_line(error)}") from None
        return onnx.load(file)


def _after_pixels(encoder, network):
    """Puts the float32 resizing and normalising of `serving_default` before the network: an ONNX model of pixels."""
    from onnx import compose

    signature = encoder.preprocessing.signatures()["serving_default"]
    function = tf.function(
        lambda images: {"views": signature.of_batch(images)[0]}, input_signature=[signature.argument]
    )
    pixels = onnx_file.converted(function, signature.argument)
    (argument,) = (value.name for value in network.graph.input)
    network = compose.add_prefix(network, "encoder/", rename_outputs=False)
    network.ir_version = pixels.ir_version = max(network.ir_version, pixels.ir_version)
    return compose.merge_models(pixels, network, io_map=[("views", f"encoder/{argument}")])


def _view(encoder, image):
    """Returns the central view (1, S, S, C) of an encoded image."""
    return encoder.preprocessing.of_encoded(tf.constant(image))[tf.newaxis]


def _agreement(encoder, session, images):
    """Returns the `Agreement` of a session's outputs with the encoder's, on encoded images."""
    channels, of_images = encoder.preprocessing.channels, []
    for image in images:
        pixels = decode_safely(tf.constant(image), channels).numpy()[np.newaxis]
        expected = {name: value.numpy() for name, value in encoder.encode(_view(encoder, image)).items()}
        found = session.run(list(expected), {"images": pixels})
        of_images.append([*zip(found, expected.values(), strict=True)])
    values = [cosines(*map(np.concatenate, zip(*pairs, strict=True))) for pairs in zip(*of_images, strict=True)]
    return Agreement(min(float(one.mean()) for one in values), float(np.min(values)), len(images))
