"""Encoded images: what they are, whether they can be decoded, and their pixels. docs/data.md states each policy.

What a file is, its first bytes say, never its name. But for `orientation`, everything here is graph operations on one
scalar string.
"""

import numpy as np
import tensorflow as tf

FORMATS = ("JPEG", "PNG", "BMP", "GIF", "WebP")
JPEG, PNG, BMP, GIF, WEBP = range(len(FORMATS))
MAX_PIXELS = 89_478_485  # beyond it Pillow warns of a decompression bomb: a quarter of a gigabyte of RGB
HEAD = 4096  # bytes of a JPEG among which its orientation is sought
APP1, START_OF_SCAN = 0xE1, 0xDA  # markers of a JPEG
ORIENTATION, LONG = 0x0112, 4  # a tag and a type of TIFF, which EXIF is written in
_TOO_LARGE = f"more than {MAX_PIXELS} pixels"


def decode(encoded):
    """Bytes of any of `FORMATS` -> uint8 (H, W, 3). Alpha is dropped, the first frame taken, EXIF left alone."""
    return tf.cond(tf.io.is_jpeg(encoded), lambda: decode_jpeg(encoded), lambda: decode_other(encoded))


def decode_safely(encoded):
    """`decode` of what anyone may have sent: an error beyond `MAX_PIXELS`, before memory is taken."""
    _, height, width = header(encoded)
    return decode(_require(height * width <= MAX_PIXELS, _TOO_LARGE, encoded))


def decode_jpeg_safely(encoded):
    """`decode_safely` of a JPEG."""
    fits = tf.reduce_prod(_jpeg_size(encoded)) <= MAX_PIXELS
    return decode_jpeg(_require(fits, _TOO_LARGE, encoded))


def decode_depth(encoded, largest=0.0):
    """A depth map, a PNG of 8 or 16 bits -> uint8 (H, W, 1): 255 for `largest` and beyond, in the file's own units.

    largest: 0: the largest value that the file's bits can say.
    """
    is_deep = _bytes_of(encoded, 24, 1)[0] == 16
    values = tf.cast(tf.io.decode_png(encoded, channels=0, dtype=tf.uint16)[..., :1], tf.float32)
    values = tf.where(is_deep, values, values / 257)  # TensorFlow makes 16 bits of 8
    far = float(largest) or tf.where(is_deep, 65535.0, 255.0)
    return tf.cast(tf.round(255 * tf.minimum(values / far, 1.0)), tf.uint8)


# A function of its own since most of a decoding's operations are here: traced once a process, not once a pipeline.
@tf.function(input_signature=[tf.TensorSpec((), tf.string)], autograph=False)
def decode_other(encoded):
    """`decode` of what is not a JPEG."""
    kind = _other_header(encoded)[0]
    with tf.control_dependencies([kind]):  # nothing that the header refuses reaches TensorFlow's decoders
        encoded = tf.identity(encoded)
    image = tf.cond(
        tf.equal(kind, BMP),
        lambda: _decode_bmp(encoded),
        lambda: tf.io.decode_image(encoded, channels=0, expand_animations=False),
    )
    channels = tf.shape(image)[-1]
    image = tf.cond(channels < 3, lambda: tf.repeat(image[..., :1], 3, axis=-1), lambda: image[..., :3])
    return tf.ensure_shape(image, (None, None, 3))


def verify(encoded):
    """(format, height, width, peak), int64 (4,), of an image that decodes; an error where it gives no view.

    peak: the largest value of a PNG of 16 bits, alpha apart; -1 of all else.

    The whole image is decoded, since a file that was cut short still has a good beginning; but after its size is
    known to be within `MAX_PIXELS`. Of a JPEG all data is read, but only an eighth of the
    resolution computed; the test of spoilt folders holds this verdict and that of full decoding equal.
    """

    def jpeg():
        size = _jpeg_size(encoded)
        fits = tf.reduce_prod(size) <= MAX_PIXELS
        pixels = tf.io.decode_jpeg(_require(fits, _TOO_LARGE, encoded), channels=3, ratio=8)
        # Something has to be asked of the pixels, or TensorFlow spares itself the decoding.
        return tf.concat([[JPEG], _require(tf.shape(pixels)[0] > 0, "no pixels", size), [-1]], axis=0)

    def other():
        facts = _other_header(encoded)
        pixels = decode_other(_require(tf.reduce_prod(facts[1:]) <= MAX_PIXELS, _TOO_LARGE, encoded))
        size = tf.shape(pixels, tf.int64)[:2]  # a GIF's frame may be larger than its header says
        size = _require(tf.reduce_prod(size) <= MAX_PIXELS, _TOO_LARGE, size)
        is_deep = (facts[0] == PNG) & (_bytes_of(encoded, 24, 1)[0] == 16)
        peak = tf.cond(is_deep, lambda: _peak(encoded), lambda: tf.constant(-1, tf.int64))
        return tf.concat([facts[:1], size, [peak]], axis=0)

    return tf.cond(tf.io.is_jpeg(encoded), jpeg, other)


def orientation(head):
    """How EXIF says that a JPEG is to be turned or mirrored to show it, 1 (not at all) to 8; 1 if it does not say.

    head: the first bytes of the file, as Python has them; `HEAD` of them are enough for what cameras write.
    """
    if b"Exif\0\0" not in head:
        return 1
    at = 2
    while at + 4 <= len(head) and head[at] == 0xFF and head[at + 1] != START_OF_SCAN:
        length = int.from_bytes(head[at + 2 : at + 4], "big")
        if head[at + 1] == APP1 and head[at + 4 : at + 10] == b"Exif\0\0":
            return _orientation_in(head[at + 10 : at + 2 + length])
        at += 2 + length
    return 1


def upright(encoded, orientation):
    """A JPEG, turned and mirrored as `orientation`, a scalar, says: itself for 1, else a PNG of the same pixels.

    The whole image is decoded for that, where a crop may need a part; so it is done for those alone that need it.
    """

    def turned():
        image = decode_jpeg(encoded)
        image = tf.cond(orientation >= 5, lambda: tf.transpose(image, (1, 0, 2)), lambda: image)

        def where(orientations, mirrored, image):
            return tf.cond(tf.reduce_any(tf.equal(orientation, orientations)), lambda: mirrored(image), lambda: image)

        image = where([2, 3, 6, 7], lambda image: image[:, ::-1], image)
        image = where([3, 4, 7, 8], lambda image: image[::-1], image)
        return tf.io.encode_png(image, compression=0)  # costs little, and loses nothing

    return tf.cond(orientation > 1, turned, lambda: encoded)


def header(encoded):
    """(format, height, width), int64 scalars, from the first bytes; an error where they are none that is read."""
    return tf.unstack(tf.cond(tf.io.is_jpeg(encoded), lambda: _jpeg_header(encoded), lambda: _other_header(encoded)))


def _orientation_in(tiff):
    order = "little" if tiff[:2] == b"II" else "big"
    number = lambda start, count: int.from_bytes(tiff[start : start + count], order)  # noqa: E731
    first = number(4, 4)
    for entry in range(first + 2, min(first + 2 + 12 * number(first, 2), len(tiff)), 12):
        if number(entry, 2) == ORIENTATION:
            value = number(entry + 8, 4 if number(entry + 2, 2) == LONG else 2)
            return value if 1 <= value <= 8 else 1
    return 1


def _peak(png):
    pixels = tf.io.decode_png(png, dtype=tf.uint16)
    channels = tf.shape(pixels)[-1]
    return tf.cast(tf.reduce_max(pixels[..., : channels - (1 - channels % 2)]), tf.int64)


def _jpeg_header(encoded):
    return tf.concat([tf.constant([JPEG], tf.int64), _jpeg_size(encoded)], axis=0)


def _jpeg_size(encoded):
    return tf.image.extract_jpeg_shape(encoded, tf.int64)[:2]


def _other_header(encoded):
    encoded = _require(tf.strings.length(encoded) > 0, "empty", encoded)
    head = _bytes_of(encoded, 0, 34)

    def starts(at, text):
        return tf.reduce_all(head[at : at + len(text)] == np.frombuffer(text, np.uint8))

    is_bmp = starts(0, b"BM")
    is_webp = starts(0, b"RIFF") & starts(8, b"WEBP")
    extended = is_webp & starts(12, b"VP8X")
    lossless = is_webp & starts(12, b"VP8L")
    bits, compression = _number(head[28:30]), _number(head[30:34])
    packed = _number(head[21:25])  # VP8L: 14 bits each, less one
    sizes = {
        PNG: (starts(0, b"\x89PNG\r\n\x1a\n"), _number(head[23:19:-1]), _number(head[19:15:-1])),
        BMP: (is_bmp, tf.abs(_signed(head[22:26])), _signed(head[18:22])),
        GIF: (starts(0, b"GIF8"), _number(head[8:10]), _number(head[6:8])),
        WEBP: (
            is_webp,
            tf.where(extended, _number(head[27:30]) + 1, tf.where(lossless, packed // 2**14 % 2**14 + 1,
                     _number(head[28:30]) % 2**14)),
            tf.where(extended, _number(head[24:27]) + 1, tf.where(lossless, packed % 2**14 + 1,
                     _number(head[26:28]) % 2**14)),
        ),
    }  # fmt: skip
    is_format = tf.stack([is_it for is_it, _, _ in sizes.values()])
    table = tf.stack([tf.stack([tf.constant(kind, tf.int64), h, w]) for kind, (_, h, w) in sizes.items()])
    answer = table[tf.argmax(tf.cast(is_format, tf.int32))]
    whole_bytes = tf.reduce_any(bits == [8, 24, 32]) & ((compression == 0) | ((compression == 3) & (bits == 32)))
    for holds, text in (
        (tf.reduce_any(is_format), f"none of {', '.join(FORMATS)}"),
        # TensorFlow 2.21 writes past its buffer on an animation without alpha, which ends the process.
        (~extended | (head[20] & 2 == 0), "an animated WebP"),
        (~is_bmp | whole_bytes, "a BMP of other than 8, 24 or 32 bits, or compressed"),  # would be misread
        (tf.reduce_all(answer[1:] > 0), "no pixels"),
    ):
        answer = _require(holds, text, answer)
    return answer


def decode_jpeg(encoded):
    """`decode` of a JPEG."""
    return tf.io.decode_jpeg(encoded, channels=3, dct_method="INTEGER_ACCURATE")


def _decode_bmp(encoded):
    image = tf.io.decode_bmp(encoded)

    def look_up():  # TensorFlow leaves the numbers of colours as they are
        start = 14 + _number(_bytes_of(encoded, 14, 4))
        colours = tf.reshape(_bytes_of(encoded, start, 4 * 256), (256, 4))[:, 2::-1]  # blue, green, red, nothing
        return tf.gather(colours, tf.cast(image[..., 0], tf.int32))

    return tf.cond(tf.shape(image)[-1] < 3, look_up, lambda: image)


def _bytes_of(encoded, start, count):
    """`count` bytes as uint8, zeros beyond the end."""
    length = tf.cast(tf.strings.length(encoded), tf.int64)
    part = tf.strings.substr(encoded, tf.minimum(tf.cast(start, tf.int64), length), count)
    return tf.ensure_shape(tf.io.decode_raw(tf.strings.join([part, b"\0" * count]), tf.uint8)[:count], (count,))


def _number(little_endian):
    return tf.reduce_sum(tf.cast(little_endian, tf.int64) * 256 ** np.arange(little_endian.shape[0], dtype=np.int64))


def _signed(little_endian):
    number = _number(little_endian)
    return tf.where(number < 2**31, number, number - 2**32)


def _require(holds, text, value):
    """`value`, but only once `holds` has proved true: what is computed from it waits."""
    with tf.control_dependencies([tf.debugging.Assert(holds, [text])]):
        return tf.identity(value)
