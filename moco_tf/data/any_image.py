"""Reads an image file in any format of Pillow, tifffile or pillow-heif as an upright 8-bit picture, grey or RGB.

`read_channels` gives an array with all channels of a TIFF or of a .npy file.

`convert.py` calls this module in its processes, which do not load TensorFlow. docs/data.md states each policy.
"""

import contextlib
import importlib.util
import warnings

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

SUFFIXES = (
    ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".heic", ".heif", ".hif",
    ".avif", ".jp2", ".j2k", ".jpx", ".tga", ".ppm", ".pgm", ".pbm", ".pnm", ".pcx", ".psd",
)  # fmt: skip
# Pillow's names of them: it would start Ghostscript for a PostScript file of any name.
FORMATS = (
    "JPEG", "MPO", "PNG", "BMP", "DIB", "GIF", "WEBP", "TIFF", "HEIF", "AVIF", "JPEG2000", "TGA", "PPM", "PCX", "PSD",
)  # fmt: skip
ARRAY = ".npy"
MAX_PIXELS = 89_478_485  # as for training: Pillow's limit for a decompression bomb
BITS_PER_SAMPLE = 258  # a tag of TIFF
TIFFS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")  # the first bytes of a TIFF
EXTRA = "pip install 'moco_tf[convert]'"


class Unreadable(Exception):
    """Raised for an image that cannot become a picture; the message gives the reason in a few words."""


def read(file, size=0, stretch=False):
    """The picture in a binary file that is open for reading.

    Args:
      size: pixels that the shorter side will have. A larger JPEG may be decoded at a lower resolution, but never below
        twice `size`. 0: decodes all.
      stretch: whether to bring values of more than 8 bits, smallest to largest, to 0 to 255, as `eight_bits` does.

    Returns:
      (a PIL.Image in the mode L or RGB, whether the file is a JPEG of exactly this picture).

    Raises:
      Unreadable: with the reason.
    """
    with _refusing(), _heif():
        return _read(file, size, stretch)


def read_channels(file, size=0, stretch=False):
    """All channels of the image in a binary file that is open for reading: uint8 (H, W, C).

    A .npy file has the shape (H, W) or (H, W, C). The channels of a TIFF are its samples, or its pages if they have
    one size. Other images are grey or RGB.

    Args:
      size: the most pixels that the shorter side has; `shrink` shrinks each channel. 0: the size stays.
      stretch: as in `read`, channel by channel.

    Raises:
      Unreadable: with the reason.
    """
    with _refusing():
        head = file.read(6)
        file.seek(0)
        if head == b"\x93NUMPY":
            values = np.load(file, allow_pickle=False)  # a pickle would run code from the file
            values, bits = (values[..., np.newaxis] if values.ndim == 2 else values), 8 * values.itemsize
        elif head[:4] in TIFFS:
            values, bits = _channels_of_tiff(file)
        else:
            with _heif():
                picture = shrink(_read(file, size, stretch)[0], size)
            return np.atleast_3d(np.asarray(picture))
        if values.ndim != 3 or not values.size or values.dtype.kind not in "buif":
            raise Unreadable(f"{values.dtype} {values.shape}, not numbers (height, width, channels)")
        _require_pixels(*values.shape[:2])
        largest = None if values.dtype.kind in "if" else 1 if values.dtype.kind == "b" else 2**bits - 1
        if values.dtype != np.uint8 or bits < 8:
            stretch = stretch and (bits > 8 or largest is None)
            values = np.stack([eight_bits(values[..., c], largest, stretch) for c in range(values.shape[2])], axis=-1)
        channels = [np.asarray(shrink(Image.fromarray(values[..., c]), size)) for c in range(values.shape[2])]
        return np.stack(channels, axis=-1)


def shrink(image, size):
    """Shrinks an image, antialiased, until its shorter side has at most `size` pixels; 0: keeps it as it is."""
    shorter = min(image.size)
    if not size or shorter <= size:
        return image
    return image.resize([max(1, round(side * size / shorter)) for side in image.size], Image.Resampling.BICUBIC)


def eight_bits(values, largest, stretch):
    """Values of more than 8 bits -> uint8 of the same shape.

    Without `stretch`, each value is multiplied by 255/largest and rounded. With it, the smallest value of the image
    becomes 0 and the largest 255. Values that are not finite become 0, and so does an image of one value.

    largest: the largest value that the file's bits can hold; None if there is none (signed or floating point).

    Raises:
      Unreadable: there is neither `largest` nor `stretch`.
    """
    values = values.astype(np.result_type(values, np.float32))
    lowest = 0.0
    if stretch:
        finite = values[np.isfinite(values)]
        lowest, largest = (finite.min(), finite.max()) if finite.size else (0.0, 0.0)
    elif largest is None:
        raise Unreadable("signed or floating-point values, which have no largest one: give --stretch")
    scaled = (values - lowest) * (255 / (largest - lowest) if largest > lowest else 0)
    return np.rint(np.nan_to_num(scaled, nan=0, posinf=0, neginf=0)).astype(np.uint8)


@contextlib.contextmanager
def _refusing():
    """Turns whatever decoders raise into `Unreadable`; hides their warnings."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's remarks on damaged metadata, and on sizes, which come here
            yield
    except Unreadable:
        raise
    except MemoryError:
        raise Unreadable("not enough memory") from None
    except Exception as error:  # decoders meet hostile files, and raise what their authors did not foresee
        raise Unreadable(" ".join(str(error).split())[:200] or type(error).__name__) from None


def _read(file, size, stretch):
    try:
        Image.init()
        image = Image.open(file, formats=[name for name in FORMATS if name in Image.OPEN])
    except UnidentifiedImageError:
        file.seek(0)
        return _unknown(file, stretch), False
    _require_pixels(*image.size)
    if image.format == "TIFF" and max(image.tag_v2.get(BITS_PER_SAMPLE, (1,))) > 8:
        file.seek(0)
        return _deep_tiff(file, stretch), False
    whole = image.size
    if image.format in ("JPEG", "MPO") and size:  # MPO is what some telephones write
        factor = 2 * size / min(image.size)
        image.draft(None, [int(np.ceil(side * factor)) for side in image.size])
    image.load()  # a TIFF is turned here
    turned = ImageOps.exif_transpose(image)
    as_stored = image.format == "JPEG" and turned.size == whole and image.getexif().get(0x0112, 1) == 1
    picture = _grey_or_rgb(turned, image.format, stretch)
    picture.info = {}  # drops the colour profile and the place of the photograph
    return picture, as_stored and picture.mode == image.mode


def _grey_or_rgb(image, format, stretch):
    mode = image.mode
    if mode in ("L", "RGB"):
        return image
    if mode in ("1", "LA", "La"):
        return image.convert("L")
    if mode in ("I", "F") or mode.startswith("I;16"):
        of_16_bits = mode.startswith("I;16") or (mode == "I" and format in ("PNG", "PPM"))
        return Image.fromarray(eight_bits(np.asarray(image), 65535 if of_16_bits else None, stretch))
    return image.convert("RGB")  # drops alpha, keeps the colours below it


def _unknown(file, stretch):
    """The picture in a file that Pillow does not know: tifffile reads a TIFF, other files are refused."""
    head = file.read(12)
    file.seek(0)
    if head[:4] in TIFFS:
        return _deep_tiff(file, stretch)
    if head[4:8] == b"ftyp" and not importlib.util.find_spec("pillow_heif"):
        raise Unreadable(f"HEIC and its like need the package pillow-heif: {EXTRA}")
    raise Unreadable("empty" if not head else "no image that Pillow knows")


def _deep_tiff(file, stretch):
    """The first page of a TIFF, by tifffile."""
    tifffile = _tifffile()
    with tifffile.TiffFile(file) as tiff:
        page = tiff.pages[0]
        _require_pixels(page.imagewidth, page.imagelength)
        kind, channels = page.photometric, page.samplesperpixel
        is_grey = kind in (tifffile.PHOTOMETRIC.MINISBLACK, tifffile.PHOTOMETRIC.MINISWHITE) and channels <= 2
        if not is_grey and (kind != tifffile.PHOTOMETRIC.RGB or channels not in (3, 4)):
            raise Unreadable(f"a TIFF of {channels} channels, {kind.name}, which are neither grey nor RGB")
        values = page.asarray()
        bits = page.bitspersample if isinstance(page.bitspersample, int) else max(page.bitspersample)
        orientation = int(page.tags.valueof(274, 1))
    if channels > 1 and values.shape[0] == channels and values.shape[-1] != channels:  # the channels come first
        values = np.moveaxis(values, 0, -1)
    values = values.reshape(page.imagelength, page.imagewidth, channels)[..., : 1 if is_grey else 3]
    largest = 2**bits - 1 if values.dtype.kind in "ub" else None
    values = eight_bits(values, largest, stretch and bits > 8)
    if kind == tifffile.PHOTOMETRIC.MINISWHITE:
        values = 255 - values
    picture = Image.fromarray(values[..., 0] if is_grey else values)
    exif = Image.Exif()
    exif[0x0112] = orientation
    picture.info["exif"] = exif.tobytes()
    picture = ImageOps.exif_transpose(picture)
    picture.info = {}
    return picture


def _channels_of_tiff(file):
    """(values (H, W, C) of any type, bits of a sample) of a TIFF's first series: its samples, or its pages."""
    with _tifffile().TiffFile(file) as tiff:
        series = tiff.series[0]
        sides = [series.axes.find("Y"), series.axes.find("X")]
        others = [axis for axis, length in enumerate(series.shape) if axis not in sides and length > 1]
        if -1 in sides or len(others) > 1:
            raise Unreadable(
                f"a TIFF of {series.axes}, {series.shape}, which are more axes than height, width, channels"
            )
        _require_pixels(*(series.shape[axis] for axis in sides))
        values, bits = series.asarray(), tiff.pages[0].bitspersample
    order = [*sides, *others, *(axis for axis in range(values.ndim) if axis not in (*sides, *others))]
    height, width, *_ = (values.shape[axis] for axis in order)
    return values.transpose(order).reshape(height, width, -1), bits if isinstance(bits, int) else max(bits)


def _tifffile():
    try:
        import tifffile
    except ImportError:
        raise Unreadable(f"this TIFF needs the package tifffile: {EXTRA}") from None
    return tifffile


def _require_pixels(width, height):
    if width * height > MAX_PIXELS:
        raise Unreadable(f"more than {MAX_PIXELS} pixels")


@contextlib.contextmanager
def _heif():
    """Lets Pillow read HEIC if pillow-heif is installed, and open any size; `_require_pixels` refuses large ones."""
    with contextlib.suppress(ImportError):
        import pillow_heif

        pillow_heif.register_heif_opener()
    limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
    try:
        yield
    finally:
        Image.MAX_IMAGE_PIXELS = limit
