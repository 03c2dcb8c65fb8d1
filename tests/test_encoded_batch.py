"""A request's files: each is decoded as it would be alone, none before all are counted, few at a time."""

import io
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image

from moco_tf.data import encoded, encoded_batch
from moco_tf.serving import export_classifier, export_encoder
from moco_tf.transfer import export as export_transfer

PIXELS = np.clip(np.cumsum(np.random.default_rng(0).normal(0, 8, (40, 50, 3)), 1) + 128, 0, 255).astype(np.uint8)
RGB = Image.fromarray(PIXELS)
MEGAPIXELS = 0.01


def file_of(image, format, **settings):
    file = io.BytesIO()
    image.save(file, format, **settings)
    return file.getvalue()


@pytest.fixture(scope="module")
def request_of():
    """A request's answer: (mean colour (N, 3) and size (N, 2) of each image, whether it is valid (N,))."""

    def view(image):
        return tf.reduce_mean(tf.cast(image, tf.float32), axis=(0, 1)), tf.shape(image)[:2]

    spec = tf.TensorSpec((3,), tf.float32), tf.TensorSpec((2,), tf.int32)
    answer = tf.function(
        lambda images: encoded_batch.views(images, view, spec, MEGAPIXELS),
        input_signature=[tf.TensorSpec((None,), tf.string)],
        autograph=False,
    )
    return lambda files: tf.nest.map_structure(lambda part: part.numpy(), answer(tf.constant(files, tf.string)))


def wide_png(height, width):
    """A PNG's first bytes."""
    return b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR" + width.to_bytes(4, "big") + height.to_bytes(4, "big") + b"\x08\x02\0\0\0"


def test_each_file_becomes_the_view_that_it_becomes_alone_whatever_stands_beside_it(request_of):
    grey = RGB.convert("L").resize((30, 20))
    files = [
        file_of(RGB.resize((33, 22)), "JPEG"),
        file_of(grey, "PNG"),
        b"no image",
        file_of(grey.quantize(200), "BMP"),
        file_of(RGB, "JPEG")[:300],
        file_of(RGB.resize((20, 10)), "GIF", save_all=True, append_images=[RGB.resize((20, 10)).rotate(90)]),
        file_of(RGB.resize((21, 11)), "WebP"),
        b"",
        b"\xff\xd8\xff",
        file_of(RGB.convert("RGBA").resize((12, 13)), "PNG"),
        file_of(grey, "PNG")[:-60],
    ]
    (colours, sizes), valid = request_of(files)
    assert np.flatnonzero(valid).tolist() == [0, 1, 3, 5, 6, 9]
    for file, colour, size, is_valid in zip(files, colours, sizes, valid, strict=True):
        alone = encoded.decode_safely(tf.constant(file)).numpy() if is_valid else np.zeros((0, 0, 3))
        assert size.tolist() == list(alone.shape[:2])
        np.testing.assert_allclose(colour, alone.mean((0, 1)) if is_valid else np.zeros(3), rtol=1e-5)


@pytest.mark.parametrize("files", [[], [b""], [b"x", wide_png(60_000, 60_000)]])
def test_where_no_file_can_be_decoded_there_are_zeros(request_of, files):
    (colours, sizes), valid = request_of(files)
    assert not valid.any() and not colours.any() and not sizes.any()
    assert (colours.shape, sizes.shape, valid.shape) == ((len(files), 3), (len(files), 2), (len(files),))


def test_more_pixels_than_a_request_may_have_are_refused_by_the_headers_alone(request_of):
    ten_thousand = [file_of(RGB, kind) for kind in ("JPEG", "PNG", "BMP", "GIF", "WebP")]  # 2,000 each
    beyond = wide_png(60_000, 60_000)  # is not decoded in any case
    assert request_of([*ten_thousand, beyond, b"x"])[1].tolist() == [True] * 5 + [False] * 2
    for one_more in (wide_png(1, 1), file_of(RGB, "JPEG")[:-200]):  # their pixels are nowhere
        with pytest.raises(tf.errors.InvalidArgumentError) as error:
            request_of([*ten_thousand, one_more])
        rule = "the images of a request have at most 10000 pixels together, these 6 have "
        assert rule in error.value.message and "--request_megapixels" in error.value.message


def test_a_jpeg_counts_once_for_every_64_of_its_scans(request_of):
    progressive = file_of(RGB, "JPEG", progressive=True)  # 2,000 pixels, 10 scans
    assert request_of(3 * [progressive + 54 * b"\xff\xda"])[1].all()
    with pytest.raises(tf.errors.InvalidArgumentError, match="these 3 have 12000"):
        request_of(3 * [progressive + 55 * b"\xff\xda"])


def test_the_limit_of_every_exports_flag_is_that_of_python():
    for module in (export_encoder, export_classifier, export_transfer):
        assert module.Settings.__dataclass_fields__["request_megapixels"].default == encoded_batch.REQUEST_MEGAPIXELS


@pytest.mark.slow
def test_twenty_small_files_of_500_megapixels_take_less_than_a_gigabyte():
    code = """
import io, resource, sys
import numpy as np, tensorflow as tf
from PIL import Image
from moco_tf.data.inputs.image import Preprocessing

def large(side):
    file = io.BytesIO()
    Image.new("RGB", (side, side), (1, 2, 3)).save(file, "PNG")
    return file.getvalue()

answer = tf.function(Preprocessing(32).of_encoded_batch, input_signature=[tf.TensorSpec((None,), tf.string)])
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6
file = large(5000)
assert answer(tf.constant([large(50)]))[1].numpy().all()
before = peak()
assert answer(tf.constant(20 * [file]))[1].numpy().all()
print(len(file), peak() - before)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=Path(__file__).parent.parent, capture_output=True, text=True, check=True
    )
    size, megabytes = map(float, done.stdout.split())
    print(f"20 PNGs of {size / 1e3:.0f} kB and 25 megapixels each: {megabytes:.0f} MB more at the peak")
    assert size < 1e6 and megabytes < 1000
