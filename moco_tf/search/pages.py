"""The pages of search: images of a folder with facts on each, as HTML that opens from disk."""

import time

import tensorflow as tf

from moco_tf.data import archive, arrays, encoded
from moco_tf.data.errors import ERRORS
from moco_tf.data.resize import resize
from moco_tf.evaluate import page

SIDE = 240  # pixels of a thumbnail's longer side: sharp on screens with two pixels per point


def row(figures):
    """Puts figures side by side."""
    return f'<div class="row files">{"".join(figures)}</div>'


def figure(path, name, lines, mark="", kind=""):
    """Shows an image file as HTML.

    Args:
      path: of the file; name: its name on the page.
      lines: texts below the name; mark: a text that stands out; kind: "query", or nothing.
    """
    title = page.text(name)
    thumbnail = _thumbnail(path)
    picture = page.image(thumbnail, title) if thumbnail else '<div class="missing">cannot be read</div>'
    caption = "".join(f"<span>{page.text(line)}</span>" for line in lines)
    marked = f'<span class="mark">{page.text(mark)}</span>' if mark else ""
    # <bdi> isolates the name, so a right-to-left name does not reverse other text.
    return page.figure(picture, f"<span><bdi>{title}</bdi></span>{caption}{marked}", kind, title)


def facts(image):
    """Returns texts on a `parts.Image`: its size in pixels and on disk, and its date."""
    date = time.strftime("%Y-%m-%d %H:%M", time.localtime(image.mtime_ns / 1e9))
    return [f"{image.width} x {image.height}, {_bytes(image.size)}", date]


def _bytes(size):
    return f"{size / 1e6:.1f} MB" if size >= 1e6 else f"{size / 1e3:.1f} kB"


def _thumbnail(path):
    """Returns a small JPEG of a file; None if the file is gone or no longer decodes."""
    try:
        image = arrays.shown(encoded.decode_file(archive.read(path)))
    except (OSError, ValueError, *ERRORS):
        return None
    height, width = image.shape[:2]
    scale = min(1, SIDE / max(height, width))
    small = resize(image, (max(1, round(height * scale)), max(1, round(width * scale))))
    return tf.io.encode_jpeg(tf.cast(tf.round(small), tf.uint8), quality=85).numpy()
