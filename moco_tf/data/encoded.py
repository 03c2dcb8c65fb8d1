"""Encoded images: their format, whether they can be decoded, and their pixels. docs/data.md states each policy.

The first bytes of a file tell its format, never its name. Everything here except `orientation` and `decode_file` is
graph operations, most of them on one scalar string. Images of another number of channels than 1 or 3 are arrays in
.npy files.
"""

import functools

import numpy as np
import tensorflow as tf

from moco_tf.data.folder import OF_IMAGES

FORMATS = ("JPEG", "PNG", "BMP", "GIF", "WebP", "npy")
JPEG, PNG, BMP, GIF, WEBP, NPY = range(len(FORMATS))
MAX_PIXELS = 89_478_485  # beyond it Pillow warns of a decompression bomb: a quarter of a gigabyte of RGB
MAX_SCANS = 64  # of a JPEG of MAX_PIXELS; smaller ones may have more in proportion: each scan goes through all pixels
COMPRESSED = (b"zTXt", b"iTXt", b"iCCP")  # chunks of a PNG besides its pixels: libpng keeps up to 8 MB of each
RESERVED = (b"tEXt", b"zTXt", b"iTXt", b"sPLT", b"pCAL", b"sCAL")  # libpng takes the memory that they announce
MAX_COMPRESSED, MAX_CHUNKS = 16, 2**14  # of a PNG; the latter of one with such chunks
MAX_EXTENSIONS = 64  # of a GIF, before its first frame
HEAD = 4096  # bytes of a JPEG that are searched for its orientation
APP1, START_OF_SCAN = 0xE1, 0xDA  # markers of a JPEG
EXTENSION, FRAME = b"!,"  # the first bytes of a GIF's parts
ORIENTATION, LONG = 0x0112, 4  # a tag and a type of TIFF, the format of EXIF
MAGIC = b"\x93NUMPY"  # the first bytes of a .npy file
LONGEST = 4096  # bytes of its header that are read
LUMA = (19595, 38470, 7471)  # of 65536: Pillow's weights for its mode L, those of ITU-R 601-2
TRAILER = b";"  # of a GIF
LOSSY = b"\x9d\x01\x2a"  # what comes before the size in a lossy WebP
WINDOW = 2**14  # bytes of a GIF that are looked through at once
SEARCHED = 2**20  # bytes of a file that are searched for a marker at once: a search takes several times their memory
_HEADER = 34  # bytes that tell the format and size of all but JPEGs
_ANY = -1  # in _BEGINNINGS
_BEGINNINGS = np.array([  # (6, _HEADER): PNG, BMP, GIF; WebP's extended, lossless and lossy kinds
    [*text, *[_ANY] * (_HEADER - len(text))]
    for text in (
        b"\x89PNG\r\n\x1a\n", b"BM", b"GIF8",
        # libwebp also decodes what has no chunk's name there, and takes the size from other bytes.
        *([*b"RIFF", *[_ANY] * 4, *b"WEBP", *kind] for kind in (b"VP8X", b"VP8L", [*b"VP8 ", *[_ANY] * 7, *LOSSY])),
    )
])  # fmt: skip
_NUMBERS = np.zeros((15, _HEADER), np.int64)  # what each byte counts for in each number that `examine` reads
for _row, _places in zip(_NUMBERS, (
    range(23, 19, -1), range(19, 15, -1),  # PNG, which alone has the lowest byte last
    range(22, 26), range(18, 22),  # BMP
    range(8, 10), range(6, 8),  # GIF
    range(27, 30), range(24, 27),  # extended WebP: sides less one
    range(21, 25), range(21, 25),  # lossless WebP: sides less one, of 14 bits each
    range(28, 30), range(26, 28),  # lossy WebP: the lower 14 bits
    range(28, 30), range(30, 34),  # BMP: bits a pixel, compression
    range(20, 21),  # extended WebP: flags
), strict=True):  # fmt: skip
    _row[list(_places)] = 256 ** np.arange(len(_places))
_TOO_LARGE = f"more than {MAX_PIXELS} pixels"
_TOO_MANY_SCANS = f"a JPEG of more scans than {MAX_SCANS} of {MAX_PIXELS} pixels"
# Problems that the first bytes show, in the order in which they are looked for.
_PROBLEMS = (
    "empty",
    f"none of {', '.join(FORMATS[:NPY])}",
    # TensorFlow 2.21 writes past its buffer on an animation without alpha, which ends the process.
    "an animated WebP",
    "a BMP of other than 8, 24 or 32 bits, or compressed",  # would be misread
    "no pixels",
    _TOO_LARGE,
    f"a PNG of more than {MAX_COMPRESSED} compressed texts and profiles",
    "a PNG that is cut off in a text",
    f"a PNG of more than {MAX_CHUNKS} chunks, texts or profiles among them",
)


def decode(encoded, channels=3):
    """An image's bytes -> uint8 (H, W, channels): colours for 3, luma for 1, else the array of a .npy file.

    Alpha of an image is dropped, the first frame is taken, and EXIF is left alone.
    """
    if channels not in OF_IMAGES:
        return decode_array(encoded, channels)
    image = tf.cond(tf.io.is_jpeg(encoded), lambda: decode_jpeg(encoded), lambda: decode_other(encoded))
    return image if channels == 3 else luma(image)


def decode_safely(encoded, channels=3):
    """`decode` for untrusted bytes: an error before they take more memory or time than a picture needs."""
    if channels not in OF_IMAGES:  # the file's bytes are the pixels
        return decode_array(encoded, channels)
    image = tf.cond(tf.io.is_jpeg(encoded), lambda: decode_jpeg_safely(encoded), lambda: decode_other(encoded))
    return image if channels == 3 else luma(image)


def decode_file(content):
    """`decode_safely` of a file's bytes in Python: (H, W, 3) for an image, (H, W, C) for a .npy file."""
    return (decode_array if content.startswith(MAGIC) else decode_safely)(tf.constant(content))


def decode_jpeg_safely(encoded):
    """`decode_safely` of a JPEG, in colour."""
    return decode_jpeg(_fitting_jpeg(encoded, _jpeg_size(encoded)))


def pixels(image):
    """Returns the image of a record as pixels: uint8 (H, W, C) stays, bytes are decoded in colour."""
    return decode(image) if image.dtype == tf.string else image


def luma(image):
    """uint8 (..., 3) -> (..., 1), bit for bit as Pillow converts RGB to its mode L; grey stays as it is."""
    weighted = tf.reduce_sum(tf.cast(image, tf.int32) * LUMA, axis=-1, keepdims=True)
    return tf.cast((weighted + 2**15) // 2**16, tf.uint8)


def decode_array(encoded, channels=None):
    """Bytes of a .npy file -> uint8 (H, W, channels), as NumPy saved it; an error for another dtype or shape.

    Code in the file is never run: only dtype and shape are read from its header. channels: None allows any number.
    """
    shape, start = _array_header(encoded, channels)
    values = tf.io.decode_raw(tf.strings.substr(encoded, start, tf.reduce_prod(shape)), tf.uint8)
    return tf.ensure_shape(tf.reshape(values, shape), (None, None, channels))


def decode_depth(encoded, largest=0.0):
    """A depth map, a PNG of 8 or 16 bits -> uint8 (H, W, 1): 255 for `largest` and beyond, in the file's own units.

    largest: 0 means the largest value that the file's bits can hold.
    """
    is_deep = _bytes_of(encoded, 24, 1)[0] == 16
    values = tf.cast(tf.io.decode_png(encoded, channels=0, dtype=tf.uint16)[..., :1], tf.float32)
    values = tf.where(is_deep, values, values / 257)  # TensorFlow widens 8 bits to 16
    far = float(largest) or tf.where(is_deep, 65535.0, 255.0)
    return tf.cast(tf.round(255 * tf.minimum(values / far, 1.0)), tf.uint8)


# Separate functions, as they hold most operations of decoding: traced once a process, not once a pipeline, and kept
# apart in its graph, so that a pipeline of JPEGs never prepares them.
_once = tf.function(
    input_signature=[tf.TensorSpec((), tf.string)], autograph=False, experimental_attributes={"_noinline": True}
)


@_once
def decode_other(encoded):
    """`decode` of an image that is not a JPEG; an error where `examine` finds a problem."""
    with tf.control_dependencies([_other_header(encoded)]):  # nothing that it refuses reaches TensorFlow's decoders
        encoded = ready(encoded)
    return three_channels(encoded, decode_as_stored(encoded))


def decode_as_stored(encoded):
    """Decodes what `examine` has passed to uint8 (H, W, any number of channels); BMPs keep their colours' numbers."""
    return tf.io.decode_image(encoded, channels=0, expand_animations=False)


def three_channels(encoded, image):
    """Turns the result of `decode_as_stored` into uint8 (H, W, 3)."""
    channels = tf.shape(image)[-1]
    has_palette = (channels < 3) & tf.reduce_all(_bytes_of(encoded, 0, 2) == tuple(b"BM"))
    image = tf.cond(
        channels < 3,
        lambda: tf.cond(has_palette, lambda: _look_up(encoded, image), lambda: tf.repeat(image[..., :1], 3, axis=-1)),
        lambda: image[..., :3],
    )
    return tf.ensure_shape(image, (None, None, 3))


@_once
def examine(encoded):
    """Returns what a non-JPEG's first bytes say, int64 (4,): format, height, width, problem; never an error.

    problem: 0 if there is none, else the place, from 1 on, in the list of problems that make a file unfit to be
    decoded. The size of a GIF is the larger of its first frame's and the canvas', side by side.
    """
    head = tf.cast(_bytes_of(encoded, 0, _HEADER), tf.int64)
    # All at once: each pipeline prepares this graph anew, and takes longer the more operations it has.
    begins = tf.reduce_all(tf.equal(head, _BEGINNINGS) | (_BEGINNINGS == _ANY), axis=1)
    is_png, is_bmp, is_gif, extended, lossless, lossy = tf.unstack(begins)
    numbers = tf.reduce_sum(head * _NUMBERS, axis=1)
    # (height, width) of each; then what tells whether the file can be read
    png, bmp, gif, of_extended, of_lossless, of_lossy, others = tf.split(numbers, [2, 2, 2, 2, 2, 2, 3])
    bits, compression, flags = tf.unstack(others)
    bmp = tf.where(bmp < 2**31, bmp, bmp - 2**32)
    bmp = tf.maximum(bmp, [-1, 1] * bmp)  # a height below 0 says that the upper row is the first
    webp = tf.where(extended, of_extended + 1, tf.where(lossless, of_lossless // [2**14, 1] % 2**14 + 1,
                    of_lossy % 2**14))  # fmt: skip
    is_format = tf.stack([is_png, is_bmp, is_gif, extended | lossless | lossy])
    table = tf.concat([[[PNG], [BMP], [GIF], [WEBP]], tf.stack([png, bmp, gif, webp])], axis=1)
    answer = tf.gather(table, tf.argmax(tf.cast(is_format, tf.int32)))
    answer = tf.cond(is_gif, lambda: _with_first_frames_size(encoded, answer), lambda: answer)
    whole_bytes = tf.reduce_any(bits == [8, 24, 32]) & ((compression == 0) | ((compression == 3) & (bits == 32)))
    chunks, compressed, cut_off = tf.unstack(_png_chunks(encoded, is_png))
    size = answer[1:]
    is_fine = tf.stack([  # as `_PROBLEMS` names them
        tf.strings.length(encoded) > 0,
        tf.reduce_any(is_format),
        ~extended | (flags // 2 % 2 == 0),
        ~is_bmp | whole_bytes,
        tf.reduce_all(size > 0),
        tf.reduce_all(size <= MAX_PIXELS) & (tf.reduce_prod(size) <= MAX_PIXELS),  # 64 bits overflow
        compressed <= MAX_COMPRESSED,
        cut_off == 0,
        chunks <= MAX_CHUNKS,
    ])  # fmt: skip
    problem = tf.cast(~tf.reduce_all(is_fine), tf.int64) * (1 + tf.argmin(tf.cast(is_fine, tf.int32)))
    return tf.concat([answer, problem[tf.newaxis]], axis=0)


def ready(encoded):
    """Prepares what `examine` has passed for `decode_as_stored`: a GIF is cut after its first frame.

    TensorFlow would unpack all frames to give the first.
    """
    is_gif = tf.reduce_all(_bytes_of(encoded, 0, 4) == tuple(b"GIF8"))
    return tf.cond(is_gif, lambda: _first_frame_alone(encoded), lambda: encoded)


def jpeg_pixels(encoded):
    """The number of pixels of a JPEG, int64; an error where libjpeg finds no size."""
    return tf.reduce_prod(_jpeg_size(encoded))


def jpeg_fits(pixels, scans):
    """Whether a JPEG with so many pixels and scans, int64 of any shape, is decoded."""
    return (pixels <= MAX_PIXELS) & (pixels * scans <= MAX_PIXELS * MAX_SCANS)


def scans(encoded):
    """Counts the scans of JPEGs, int64 of the strings' shape; too many where data that is not decoded has the marker.

    The marker of a scan does not occur in a scan's data. It does occur in a thumbnail, or in a video behind the image,
    about once in 65,536 bytes.
    """
    encoded, marker = tf.convert_to_tensor(encoded), bytes([0xFF, START_OF_SCAN])
    if encoded.shape.rank == 0:
        return _occurrences(encoded, marker)
    return tf.map_fn(lambda one: _occurrences(one, marker), encoded, fn_output_signature=tf.int64)


def verify(encoded, channels=3):
    """Returns (format, height, width, peak), int64 (4,), of an image that decodes; an error where it gives no view.

    channels: how many channels the image is read with (`decode`).
    peak: the largest value of a PNG of 16 bits, without its alpha; -1 for everything else.

    The whole image is decoded, since a file that was cut short still has a good beginning. Before that, its size must
    be known to be within `MAX_PIXELS`. All data of a JPEG is read, but only an eighth of the resolution is computed.
    The test of spoilt folders requires this verdict to equal that of full decoding.
    """

    if channels not in OF_IMAGES:
        shape, _ = _array_header(encoded, channels)
        return tf.concat([[NPY], shape[:2], [-1]], axis=0)

    def jpeg():
        size = _jpeg_size(encoded)
        pixels = tf.io.decode_jpeg(_fitting_jpeg(encoded, size), channels=3, ratio=8)
        # The pixels have to be used, or TensorFlow skips the decoding.
        return tf.concat([[JPEG], _require(tf.shape(pixels)[0] > 0, "no pixels", size), [-1]], axis=0)

    def other():
        kind = _other_header(encoded)[0]
        size = tf.shape(decode_other(encoded), tf.int64)[:2]
        is_deep = (kind == PNG) & (_bytes_of(encoded, 24, 1)[0] == 16)
        peak = tf.cond(is_deep, lambda: _peak(encoded), lambda: tf.constant(-1, tf.int64))
        return tf.concat([[kind], size, [peak]], axis=0)

    return tf.cond(tf.io.is_jpeg(encoded), jpeg, other)


def orientation(head):
    """Returns how EXIF says to turn or mirror a JPEG to show it: 1 (not at all) to 8; 1 if EXIF does not say.

    head: the first bytes of the file, as Python bytes; `HEAD` of them are enough for the files of cameras.
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
    """Turns and mirrors a JPEG as `orientation`, a scalar, says: the JPEG itself for 1, else a PNG of the same pixels.

    Turning decodes the whole image, where a crop may need only a part. So only images that need it are turned.
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
    """Returns (format, height, width), int64 scalars, from the first bytes; an error for a format that is not read."""
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


def _fitting_jpeg(encoded, size):
    pixels = tf.reduce_prod(size)
    encoded = _require(pixels <= MAX_PIXELS, _TOO_LARGE, encoded)
    return _require(jpeg_fits(pixels, scans(encoded)), _TOO_MANY_SCANS, encoded)


def _other_header(encoded):
    """Returns (format, height, width), int64 (3,), of a non-JPEG; an error where `examine` finds a problem."""
    facts = examine(encoded)
    return _require(facts[3] == 0, tf.gather(["", *_PROBLEMS], facts[3]), facts[:3])


def _with_first_frames_size(gif, canvas):
    """(format, height, width): of each side the larger of canvas and first frame; 0 where there is no frame."""
    at, _ = _first_frame(gif)
    width, height = _number(_bytes_of(gif, at + 5, 2)), _number(_bytes_of(gif, at + 7, 2))
    frame = tf.stack([height, width]) * tf.cast(at > 0, tf.int64)
    larger = tf.where(tf.reduce_all(frame > 0), tf.maximum(canvas[1:], frame), 0)
    return tf.concat([canvas[:1], larger], axis=0)


def _first_frame_alone(gif):
    _, end = _first_frame(gif)
    return tf.strings.join([tf.strings.substr(gif, tf.constant(0, tf.int64), end), TRAILER])


@_once
def _first_frame(gif):
    """Where the first frame of a GIF begins and ends, int64; (0, 0) if there is none.

    The frame is found as giflib finds it, or not at all: giflib reads beyond the end of an extension without content.
    """
    data = tf.io.decode_raw(gif, tf.uint8)
    byte = lambda at: tf.cast(_bytes_of(gif, at, 1)[0], tf.int64)  # noqa: E731
    palette = lambda flags: tf.where(flags >= 128, 3 * 2 ** (flags % 8 + 1), 0)  # noqa: E731
    at, _ = tf.while_loop(
        lambda at, count: (byte(at) == EXTENSION) & (byte(at + 2) > 0) & (count < MAX_EXTENSIONS),
        lambda at, count: (_end_of_blocks(data, at + 2) + 1, count + 1),
        (13 + palette(byte(10)), 0),
    )
    end = _end_of_blocks(data, at + 11 + palette(byte(at + 9))) + 1
    is_there = byte(at) == FRAME
    return tf.where(is_there, at, 0), tf.where(is_there, end, 0)


def _end_of_blocks(data, at):
    """Where the blocks of a GIF from `at` on end: the place of the empty block, or beyond the data, uint8 (n,).

    A block is a byte with its length, and so many bytes. A file may have a block for every two bytes, so the
    blocks are not walked through one by one. For all bytes of a window at once, the code computes where each would
    lead as the length of a block. Then it computes where two such steps lead, then four, and so on.
    """

    def on(at):
        window = tf.cast(data[at : at + WINDOW], tf.int32)
        size = tf.size(window)
        here = tf.range(size)
        leads = tf.where(window == 0, here, here + 1 + window)
        twice = lambda leads: (tf.where(leads < size, tf.gather(leads, tf.minimum(leads, size - 1)), leads),)  # noqa: E731
        (leads,) = tf.while_loop(lambda _: True, twice, (leads,), maximum_iterations=WINDOW.bit_length())
        return (at + tf.cast(leads[0], tf.int64),)

    number = tf.size(data, tf.int64)
    is_block = lambda at: (at < number) & (data[tf.minimum(at, number - 1)] > 0)  # noqa: E731
    (end,) = tf.while_loop(is_block, on, (at,))
    return end


def decode_jpeg(encoded, shrunk=1):
    """`decode` of a JPEG; shrunk: 1, 2, 4 or 8, how many times smaller its sides become, rounded up."""
    return tf.io.decode_jpeg(encoded, channels=3, ratio=shrunk, dct_method="INTEGER_ACCURATE")


def _look_up(bmp, image):
    """Looks up a BMP's colours, since TensorFlow gives only their numbers."""
    start = 14 + _number(_bytes_of(bmp, 14, 4))
    colours = tf.reshape(_bytes_of(bmp, start, 4 * 256), (256, 4))[:, 2::-1]  # blue, green, red, nothing
    return tf.gather(colours, tf.cast(image[..., 0], tf.int32))


def _png_chunks(encoded, is_png):
    """Counts a PNG's chunks, int64 (3,): all, up to one more than MAX_CHUNKS; COMPRESSED; RESERVED that are cut off.

    Zeros if there is no chunk of these names, as in most files: each chunk takes as long as decoding a kilobyte.
    """

    def count():
        length = tf.cast(tf.strings.length(encoded), tf.int64)

        def on(at, counts):
            head = tf.cast(_bytes_of(encoded, at, 8), tf.int64)
            size, name = _number(head[3::-1]), head[4:]
            is_compressed, is_reserved = (
                tf.reduce_any(tf.reduce_all(name == np.array([[*one] for one in names]), axis=1))
                for names in (COMPRESSED, RESERVED)
            )
            is_cut_off = is_reserved & (size > length - at - 8)
            return at + 12 + size, counts + tf.cast(tf.stack([True, is_compressed, is_cut_off]), tf.int64)

        begin = tf.constant(8, tf.int64), tf.zeros(3, tf.int64)
        is_left = lambda at, counts: (at < length) & (counts[0] <= MAX_CHUNKS)  # noqa: E731
        return tf.while_loop(is_left, on, begin, parallel_iterations=1)[1]

    names = b"|".join(dict.fromkeys(COMPRESSED + RESERVED))
    has_some = is_png & tf.strings.regex_full_match(encoded, rb"\C*(?:%s)\C*" % names)
    return tf.cond(has_some, count, lambda: tf.zeros(3, tf.int64))


def _occurrences(text, part):
    """How often `part`, bytes, occurs in a scalar string, int64."""
    data, more = tf.io.decode_raw(text, tf.uint8), len(part) - 1
    number = tf.maximum(tf.size(data) - more, 0)

    def on(at, count):
        size = tf.minimum(number - at, SEARCHED)
        window = data[at : at + size + more]
        hits = (window[place : place + size] == byte for place, byte in enumerate(part))
        return at + size, count + tf.math.count_nonzero(functools.reduce(tf.logical_and, hits))

    return tf.while_loop(lambda at, _: at < number, on, (0, tf.constant(0, tf.int64)), parallel_iterations=1)[1]


def _array_header(encoded, channels=None):
    """Returns (shape, int64 (3,); where the values begin, int64 scalar) of a .npy file that has all its values."""
    encoded = _require(tf.strings.substr(encoded, 0, len(MAGIC)) == MAGIC, "no .npy file", encoded)
    head = _bytes_of(encoded, len(MAGIC), 6)  # the version, then the length of the header in 2 or 4 bytes
    is_first = head[0] == 1
    start, length = tf.where(is_first, 10, 12), tf.where(is_first, _number(head[2:4]), _number(head[2:6]))
    there = tf.strings.length(encoded)
    header = tf.strings.substr(encoded, tf.minimum(start, there), tf.cast(tf.minimum(length, LONGEST), tf.int32))
    told = lambda name, value: tf.strings.regex_replace(header, f"(?s).*'{name}': *({value}).*", r"\1")  # noqa: E731
    kind, shape = told("descr", r"'[^']*'|\[.*\]"), told("shape", r"\([0-9, ]*\)")
    kind = tf.strings.substr(tf.strings.regex_replace(kind, "[^A-Za-z0-9<>|=]", ""), 0, 20)
    number = "[1-9][0-9]{0,8}"  # so that no product overflows
    wanted = f"{channels}" if channels else number
    for holds, text in (
        (tf.strings.regex_full_match(header, r"(?s)\{.*'descr'.*'shape'.*\}.*"), "a .npy file without a header"),
        (kind == "|u1", tf.strings.join(["values of the type ", kind, ", not uint8: moco_tf.data.convert --format=npy "
                                         "makes 8 bits of numbers"])),
        (tf.strings.regex_full_match(header, "(?s).*'fortran_order': *False.*"),
         "in Fortran order: save np.ascontiguousarray of it"),
        (tf.strings.regex_full_match(shape, rf"\({number}, *{number}, *{wanted},?\)"),
         tf.strings.join(["an array of shape ", tf.strings.substr(shape, 0, 40),
                          f", not (height, width, {channels or 'channels'})"])),
    ):  # fmt: skip
        shape = _require(holds, text, shape)
    parts = rf"\(({number}), *({number}), *({number}),?\)"
    numbers = [tf.strings.regex_replace(shape, parts, rf"\{place}") for place in (1, 2, 3)]
    size = tf.strings.to_number(tf.stack(numbers), tf.int64)
    start = tf.cast(start, tf.int64) + length
    values, there = tf.reduce_prod(size), tf.maximum(tf.cast(there, tf.int64) - start, 0)
    text = tf.strings.join(
        ["cut short: ", tf.strings.as_string(there), " of ", tf.strings.as_string(values), " bytes"]
    )
    size = _require(size[0] * size[1] <= MAX_PIXELS, _TOO_LARGE, size)
    return _require(there >= values, text, size), start


def _bytes_of(encoded, start, count):
    """`count` bytes as uint8, zeros beyond the end."""
    length = tf.cast(tf.strings.length(encoded), tf.int64)
    part = tf.strings.substr(encoded, tf.minimum(tf.cast(start, tf.int64), length), count)
    return tf.ensure_shape(tf.io.decode_raw(tf.strings.join([part, b"\0" * count]), tf.uint8)[:count], (count,))


def _number(little_endian):
    return tf.reduce_sum(tf.cast(little_endian, tf.int64) * 256 ** np.arange(little_endian.shape[0], dtype=np.int64))


def _require(holds, text, value):
    """Returns `value`, but only once `holds` has proved true: computations that use it wait."""
    with tf.control_dependencies([tf.debugging.Assert(holds, [text])]):
        return tf.identity(value)
