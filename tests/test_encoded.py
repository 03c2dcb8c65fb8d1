"""What is read, and how: each policy of docs/data.md, against Pillow where Pillow has an opinion."""

import io
import random
import struct
import zlib

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
header = tf.function(encoded.header, input_signature=SCALAR)


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


def test_a_size_whose_product_overflows_is_refused():
    data = header_of("PNG", file_of(RGB, "PNG"), 2**32 - 1, 2**32 - 1)
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
        _, *of_header = header(data)
        assert height <= of_header[0] and width <= of_header[1]  # by which memory is granted
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


def first_frame_of(gif):
    """Where the first frame of a GIF begins and ends, block by block."""

    def end_of_blocks(at):
        while at < len(gif) and gif[at]:
            at += 1 + gif[at]
        return at

    palette = lambda flags: 3 * 2 ** (flags % 8 + 1) if flags >= 128 else 0  # noqa: E731
    at = 13 + palette(gif[10])
    while gif[at : at + 1] == b"!":
        at = end_of_blocks(at + 2) + 1
    return at, end_of_blocks(at + 11 + palette(gif[at + 9])) + 1


@pytest.mark.parametrize("settings", [{}, {"comment": bytes(100_000)}, FRAMES, {**FRAMES, "loop": 0, "duration": 50}])
def test_of_a_gif_nothing_beyond_its_first_frame_is_read(settings):
    data = file_of(RGB, "GIF", **settings)
    begin, end = first_frame_of(data)
    assert encoded.ready(tf.constant(data)).numpy() == data[:end] + b";"
    spoilt = data[:end] + b",\0\0\0\0" + 2 * b"\xff\xff" + b"\0\x08" + 99 * b"\x03abc"  # 65535 x 65535, cut short
    np.testing.assert_array_equal(decode(spoilt), decode(data))
    assert problem_of(spoilt) == ""
    wide = data[: begin + 5] + 2 * (60_000).to_bytes(2, "little") + data[begin + 9 :]  # larger than the canvas
    assert problem_of(wide) == f"more than {encoded.MAX_PIXELS} pixels"
    assert problem_of(data[:begin] + b";") == problem_of(data[: begin - 1]) == "no pixels"


def test_the_end_of_a_gifs_blocks_is_found_however_long_they_are():
    end_of_blocks = tf.function(
        encoded._end_of_blocks, input_signature=[tf.TensorSpec((None,), tf.uint8), tf.TensorSpec((), tf.int64)]
    )
    rng = np.random.default_rng(0)
    for longest in (2, 3, 16, 256):
        lengths = rng.integers(1, longest, 4 * encoded.WINDOW // longest)
        data = np.concatenate([np.r_[length, rng.integers(0, 256, length)] for length in [*lengths, 0, 5]])
        end = lengths.sum() + len(lengths)
        data = tf.constant(data.astype(np.uint8))
        assert end_of_blocks(data, 0) == end and end_of_blocks(data, 1 + lengths[0]) == end
        assert end_of_blocks(data[: end - 1], 0) >= end - 1  # cut short


def test_a_gif_of_blocks_without_end_before_its_frame_is_refused():
    data = file_of(RGB, "GIF")
    begin, _ = first_frame_of(data)
    assert problem_of(data[:begin] + 64 * b"!\xfe\1x\0" + data[begin:]) == ""
    assert problem_of(data[:begin] + 65 * b"!\xfe\1x\0" + data[begin:]) == "no pixels"


def test_a_gif_in_which_giflib_would_find_another_frame_is_refused():
    data = file_of(RGB, "GIF")
    begin, _ = first_frame_of(data)
    hidden = b"!" + data[begin : begin + 5] + 2 * b"\xff\xff" + bytes(40)  # 33 bytes to skip after an empty extension
    assert problem_of(data[:begin] + b"!\xfe\0" + hidden + data[begin:]) == "no pixels"
    assert problem_of(data[:begin] + b"!\xfe\0" + data[begin:]) == "no pixels"


def test_a_jpeg_of_more_scans_than_its_pixels_allow_is_refused():
    progressive, marker = file_of(RGB, "JPEG", progressive=True), b"\xff\xda"
    assert encoded.scans(tf.constant([progressive, file_of(RGB, "JPEG")])).numpy().tolist() == [10, 1]
    assert problem_of(progressive + 1000 * marker) == ""
    most = encoded.MAX_PIXELS * encoded.MAX_SCANS // 9000**2
    wide = header_of("JPEG", file_of(RGB, "JPEG"), 9000, 9000)
    assert "scans" not in problem_of(wide + (most - 1) * marker)
    assert problem_of(wide + most * marker) == "a JPEG of more scans than 64 of 89478485 pixels"


@pytest.mark.parametrize("kind", [b"zTXt", b"iTXt", b"iCCP"])
def test_a_png_of_more_compressed_chunks_than_any_needs_is_refused(kind):
    data = file_of(RGB, "PNG")
    chunk = b"\0\0\0\0" + kind + zlib.crc32(kind).to_bytes(4, "big")
    assert problem_of(data[:33] + 16 * chunk + data[33:]) == ""
    assert problem_of(data[:33] + 17 * chunk + data[33:]) == "a PNG of more than 16 compressed texts and profiles"


@pytest.mark.parametrize("kind", [b"tEXt", b"zTXt", b"iTXt", b"sPLT", b"pCAL", b"sCAL"])
def test_a_png_whose_text_says_that_it_is_longer_than_the_file_is_refused_before_memory_is_taken(kind):
    data = file_of(RGB, "PNG")
    begin = (2**31 - 2**24).to_bytes(4, "big") + kind + b"key\0\0\0\0\0"
    assert problem_of(data[:33] + begin + data[33:]) == "a PNG that is cut off in a text"
    whole = b"key\0\0\0\0\0"
    chunk = len(whole).to_bytes(4, "big") + kind + whole + zlib.crc32(kind + whole).to_bytes(4, "big")
    assert problem_of(data[:33] + chunk + data[33:]) == ""


def test_a_texts_name_among_a_pngs_pixels_is_no_text():
    pixels = zlib.compress(b"\0" + b"\xfftEXtzTXt\xff" * 30, 0)  # stored as they are
    parts = [(b"IHDR", struct.pack(">IIBBBBB", 100, 1, 8, 2, 0, 0, 0)), (b"IDAT", pixels), (b"IEND", b"")]
    chunks = [struct.pack(">I", len(b)) + n + b + struct.pack(">I", zlib.crc32(n + b)) for n, b in parts]
    data = b"\x89PNG\r\n\x1a\n" + b"".join(chunks)
    assert b"tEXt" in data and problem_of(data) == ""
    assert encoded.decode(tf.constant(data)).shape == (1, 100, 3)


def test_a_png_with_a_text_and_countless_chunks_is_refused():
    data, other = file_of(RGB, "PNG"), b"\0\0\0\0abCd" + zlib.crc32(b"abCd").to_bytes(4, "big")
    text = b"\0\0\0\0tEXt" + zlib.crc32(b"tEXt").to_bytes(4, "big")
    assert problem_of(data[:33] + encoded.MAX_CHUNKS * other + data[33:]) == ""
    assert problem_of(data[:33] + text + 100 * other + data[33:]) == ""
    assert "chunks, texts or profiles among them" in problem_of(
        data[:33] + text + encoded.MAX_CHUNKS * other + data[33:]
    )


def test_a_webp_without_a_chunks_name_is_refused_whatever_size_its_bytes_say():
    lossless = file_of(RGB, "WebP", lossless=True)
    start = lossless.index(b"VP8L") + 8
    bare = bytearray(lossless[:12] + lossless[start:])  # libwebp decodes it
    bare[4:8] = (len(bare) - 8).to_bytes(4, "little")
    assert tuple(tf.io.decode_image(bytes(bare)).shape[-3:-1]) == RGB.size[::-1]
    bare[26:30] = b"\1\0\1\0"  # 1 x 1, where a lossy one has its size
    assert problem_of(bytes(bare)) == "none of JPEG, PNG, BMP, GIF, WebP"
    lossy = file_of(RGB, "WebP")
    assert problem_of(lossy) == "" and problem_of(lossy[:23] + b"\0\0\0" + lossy[26:]) != ""


@pytest.mark.parametrize("searched", [1, 5, 64])
def test_markers_are_counted_across_the_windows_of_a_search(monkeypatch, searched):
    monkeypatch.setattr(encoded, "SEARCHED", searched)
    text = np.random.default_rng(0).choice(np.frombuffer(b"ab\xff\xda", np.uint8), 300).tobytes()
    for part in (b"\xff\xda", b"aba"):
        wanted = sum(text.startswith(part, place) for place in range(len(text)))
        assert encoded._occurrences(tf.constant(text), part) == wanted > 0
    assert encoded._occurrences(tf.constant(b""), b"ab") == encoded._occurrences(tf.constant(b"a"), b"ab") == 0
