"""The pages of search: images of a folder with what there is to say of each, as HTML that opens from disk."""

import time

import tensorflow as tf

from moco_tf.data import archive, arrays, encoded
from moco_tf.data.errors import ERRORS
from moco_tf.data.resize import resize
from moco_tf.evaluate import page

SIDE = 240  # of a thumbnail's longer side, pixels: sharp on screens of two pixels a point


def row(figures):
    """Figures side by side."""
    return f'<div class="row files">{"".join(figures)}</div>'


def figure(path, name, lines, mark="", kind=""):
    """An image file, HTML.

    Args:
      path: of the file; name: what it is called on the page.
      lines: texts below the name; mark: one that stands out; kind: "query", or nothing.
    """
    title = page.text(name)
    thumbnail = _thumbnail(path)
    picture = page.image(thumbnail, title) if thumbnail else '<div class="missing">cannot be read</div>'
    caption = "".join(f"<span>{page.text(line)}</span>" for line in lines)
    marked = f'<span class="mark">{page.text(mark)}</span>' if mark else ""
    # Isolated, so that a name from right to left turns nothing round.
    return page.figure(picture, f"<span><bdi>{title}</bdi></span>{caption}{marked}", kind, title)


def facts(image):
    """Texts on a `parts.Image`: its size on the screen and on disk, and its date."""
    date = time.strftime("%Y-%m-%d %H:%M", time.localtime(image.mtime_ns / 1e9))
    return [f"{image.width} x {image.height}, {_bytes(image.size)}", date]


def _bytes(size):
    return f"{size / 1e6:.1f} MB" if size >= 1e6 else f"{size / 1e3:.1f} kB"


def _thumbnail(path):
    """A small JPEG of a file; None where it is gone, or cannot be decoded any more."""
    try:
        image = arrays.shown(encoded.decode_file(archive.read(path)))
    except (OSError, ValueError, *ERRORS):
        return None
    height, width = image.shape[:2]
    scale = min(1, SIDE / max(height, width))
    small = resize(image, (max(1, round(height * scale)), max(1, round(width * scale))))
    return tf.io.encode_jpeg(tf.cast(tf.round(small), tf.uint8), quality=85).numpy()
