"""What is read, and how: each policy of docs/data.md, against Pillow where Pillow has an opinion."""

import io
import random

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image, ImageOps

from moco_tf.data import encoded
from moco_tf.data.errors import reason

PIXELS = np.clip(np.cumsum(np.random.default_rng(0).normal(0, 8, (40, 50, 3)), 1) + 128, 0, 255).astype(np.uint8)
RGB = Image.fromarray(PIXELS)
RGBA = RGB.copy()
RGBA.putalpha(Image.fromarray(PIXELS[..., 0]))
SCALAR = [tf.TensorSpec((), tf.string)]
decode = tf.function(encoded.decode, input_signature=SCALAR)  # as tf.data runs them
verify = tf.function(encoded.verify, input_signature=SCALAR)


def file_of(image, format, **settings):
    file = io.BytesIO()
    image.save(file, format, **settings)
    return file.getvalue()


def problem_of(data):
    try:
        verify(data)
    except tf.errors.OpError as error:
        return reason(error)
    return ""


FRAMES = {"save_all": True, "append_images": [RGB.rotate(90)]}


@pytest.mark.parametrize(
    "format, image, settings",
    [
        ("JPEG", RGB, {}),
        ("JPEG", RGB, {"progressive": True}),
        ("JPEG", RGB.convert("L"), {}),
        ("PNG", RGB, {}),
        ("PNG", RGB.convert("L"), {}),
        ("PNG", RGB.convert("1"), {}),
        ("PNG", RGB.quantize(64), {}),
        ("PNG", RGB.quantize(64), {"transparency": 3}),
        ("PNG", RGBA, {}),
        ("PNG", RGBA.convert("LA"), {}),
        ("BMP", RGB, {}),
        ("BMP", RGBA, {}),
        ("BMP", RGB.convert("L"), {}),
        ("BMP", RGB.quantize(200), {}),
        ("GIF", RGB, {}),
        ("GIF", RGB, FRAMES),
        ("WebP", RGB, {}),
        ("WebP", RGB, {"lossless": True}),
        ("WebP", RGBA, {"lossless": True}),
        ("WebP", RGBA, {}),
    ],
)
def test_each_kind_is_decoded_as_pillow_does_and_its_header_tells_its_size(format, image, settings):
    data = file_of(image, format, **settings)
    assert problem_of(data) == ""
    kind, height, width, peak = verify(data).numpy()
    assert (encoded.FORMATS[kind], height, width, peak) == (format, 40, 50, -1)
    assert [int(number) for number in encoded.header(data)] == [kind, 40, 50]
    np.testing.assert_array_equal(decode(data), Image.open(io.BytesIO(data)).convert("RGB"))


def test_cmyk_is_converted_within_two_grey_levels_of_pillow():
    data = file_of(RGB.convert("CMYK"), "JPEG")
    expected = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"), int)
    assert np.abs(decode(data) - expected).max() <= 2


def test_of_sixteen_bits_the_upper_eight_are_kept():
    deep = PIXELS.astype(np.uint16) * 256 + 77
    np.testing.assert_array_equal(decode(tf.io.encode_png(deep)), PIXELS)
    np.testing.assert_array_equal(decode(tf.io.encode_png(deep[..., :1])), np.repeat(PIXELS[..., :1], 3, -1))


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_of_sixteen_bits_the_largest_value_is_told_alpha_apart(channels):
    deep = np.zeros((6, 7, channels), np.uint16)
    deep[2, 3, 0] = 4095
    if channels in (2, 4):
        deep[..., -1] = 65535
    assert verify(tf.io.encode_png(deep)).numpy().tolist() == [encoded.PNG, 6, 7, 4095]


def exif(orientation, order, type=3, before=()):
    """An APP1 segment with these tags."""
    tags = [*before, (0x0112, orientation)]
    code = lambda value, count: value.to_bytes(count, order)  # noqa: E731
    entries = [
        code(t, 2) + code(type, 2) + code(1, 4) + code(v, 4 if type == 4 else 2).ljust(4, b"\0") for t, v in tags
    ]
    start = {"little": b"II*\0\x08\0\0\0", "big": b"MM\0*\0\0\0\x08"}[order]
    body = b"Exif\0\0" + start + code(len(tags), 2) + b"".join(entries) + bytes(4)
    return b"\xff\xe1" + (len(body) + 2).to_bytes(2, "big") + body


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("order", ["little", "big"])
@pytest.mark.parametrize("jfif", [True, False])
@pytest.mark.parametrize("type", [3, 4])
def test_the_orientation_in_exif_is_read_as_pillow_reads_it(orientation, order, jfif, type):
    data = file_of(RGB, "JPEG")  # SOI, then JFIF in 18 bytes
    segment = exif(orientation, order, type, before=[(0x0100, 50), (0x0101, 40)])
    data = data[: 20 if jfif else 2] + segment + data[20:]
    assert Image.open(io.BytesIO(data)).getexif().get(0x0112) == orientation
    assert encoded.orientation(data[: encoded.HEAD]) == orientation
    assert verify(data).numpy().tolist() == [encoded.JPEG, 40, 50, -1]


@pytest.mark.parametrize("orientation", [None, 1, 6, 8])
@pytest.mark.parametrize("more", [{}, {"icc_profile": bytes(500)}, {"comment": b"Exif\0\0"}, {"progressive": True}])
def test_the_orientation_of_files_that_pillow_writes_is_read(orientation, more):
    tags = Image.Exif()
    tags[0x010F] = "Exif\0\0 and a maker"
    if orientation:
        tags[0x0112] = orientation
    assert encoded.orientation(file_of(RGB, "JPEG", exif=tags, **more)) == (orientation or 1)
    assert encoded.orientation(file_of(RGB, "JPEG", **more)) == 1


def test_exif_that_is_cut_or_flipped_anywhere_is_no_error():
    rng = random.Random(0)
    whole = file_of(RGB, "JPEG")[:20] + exif(6, "big") + file_of(RGB, "JPEG")[20:200]
    for _ in range(3000):
        data = bytearray(whole[: rng.randrange(len(whole))])
        for _ in range(rng.choice((0, 1, 5)) if data else 0):
            data[rng.randrange(len(data))] = rng.randrange(256)
        assert 1 <= encoded.orientation(bytes(data)) <= 8


def test_the_orientation_in_exif_is_left_alone():
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees to show
    np.testing.assert_array_equal(decode(file_of(RGB, "JPEG", exif=exif)), decode(file_of(RGB, "JPEG")))


@pytest.mark.parametrize(
    "problem, data",
    [
        ("empty", b""),
        ("none of JPEG, PNG, BMP, GIF, WebP", b"<html>"),
        ("none of JPEG, PNG, BMP, GIF, WebP", file_of(RGB, "TIFF")),
        ("an animated WebP", file_of(RGB, "WebP", **FRAMES)),
        ("an animated WebP", file_of(RGBA, "WebP", **FRAMES)),
        ("a BMP of other than 8, 24 or 32 bits, or compressed", file_of(RGB.convert("1"), "BMP")),
        ("no pixels", file_of(RGB, "PNG")[:20]),
        ("Invalid JPEG data", file_of(RGB, "JPEG")[:400]),
        ("Invalid JPEG data", file_of(RGB, "JPEG")[:-1]),
        ("Invalid PNG data", file_of(RGB, "PNG")[:-60]),
        ("Invalid GIF data", file_of(RGB, "GIF")[:-60]),
        ("Failed to decode WebP", file_of(RGB, "WebP")[:-60]),
        ("Input size", file_of(RGB, "BMP")[:-60]),
    ],
)
def test_what_cannot_be_decoded_is_refused_with_the_reason(problem, data):
    assert problem in problem_of(data)


def header_of(format, data, width, height):
    """The file with another size in its header."""
    places = {"PNG": (16, 20, 4, "big"), "BMP": (18, 22, 4, "little"), "GIF": (6, 8, 2, "little")}
    if format == "JPEG":
        start = data.index(b"\xff\xc0") + 5
        return data[:start] + height.to_bytes(2, "big") + width.to_bytes(2, "big") + data[start + 4 :]
    at_width, at_height, length, order = places[format]
    data = data[:at_width] + width.to_bytes(length, order) + data[at_width + length :]
    return data[:at_height] + height.to_bytes(length, order) + data[at_height + length :]


@pytest.mark.parametrize("format", ["JPEG", "PNG", "BMP", "GIF"])
def test_a_decompression_bomb_is_refused_by_its_header(format):
    data = header_of(format, file_of(RGB, format), 60_000, 60_000)
    assert problem_of(data) == f"more than {encoded.MAX_PIXELS} pixels"


def test_cutting_and_flipping_anywhere_never_ends_the_process_and_what_passes_gives_every_crop():
    from moco_tf.data import image_ops

    @tf.function(input_signature=[*SCALAR, tf.TensorSpec((4,), tf.int32)])
    def crop(data, box):
        return image_ops.crops(data, lambda *_: [tuple(tf.unstack(box))])[0]

    rng = random.Random(0)
    passed = 0
    kinds = [("JPEG", {}), ("JPEG", {"progressive": True}), ("PNG", {}), ("BMP", {}), ("GIF", {}), ("WebP", {})]
    for turn in range(400):
        format, settings = kinds[turn % len(kinds)]
        data = bytearray(file_of(RGB, format, **settings))
        if rng.random() < 0.3:
            del data[rng.randrange(len(data)) :]
        else:
            for _ in range(rng.choice((1, 1, 10))):
                data[rng.randrange(len(data))] = rng.randrange(256)
        data = bytes(data)
        if problem_of(data):
            continue
        passed += 1
        _, height, width, _ = verify(data).numpy()
        rows, columns = rng.randint(1, height), rng.randint(1, width)
        top, left = rng.randint(0, height - rows), rng.randint(0, width - columns)
        assert crop(data, [top, left, rows, columns]).shape == (rows, columns, 3)
        assert decode(data).shape == (height, width, 3)
    assert 50 < passed < 350


@pytest.mark.parametrize("orientation", range(1, 9))
def test_upright_is_what_pillow_makes_of_the_decoded_image_by_exif(orientation):
    exif, file = Image.Exif(), io.BytesIO()
    exif[0x0112] = orientation
    noise = np.random.default_rng(0).integers(0, 255, (17, 26, 3), np.uint8)
    Image.fromarray(noise).save(file, "JPEG", exif=exif)
    head, stored = encoded.orientation(file.getvalue()), encoded.decode(file.getvalue())
    turned = Image.fromarray(stored.numpy())
    turned.getexif()[0x0112] = orientation
    upright = encoded.upright(tf.constant(file.getvalue()), head)
    assert np.array_equal(encoded.decode(upright), np.asarray(ImageOps.exif_transpose(turned)))
    assert head == orientation and (upright.numpy() == file.getvalue()) == (orientation == 1)
