"""Which image files are exact copies of one another: the same bytes, or other files of the same pixels."""

import hashlib

from moco_tf.data import archive, encoded
from moco_tf.data.errors import ERRORS


def copies(paths):
    """What each file is a copy of.

    Args:
      paths: of image files; one that is gone or cannot be decoded any more equals none.

    Returns:
      For each (place of the first file with its bytes, place of the first with its pixels and other bytes); None where
      there is none before it.
    """
    by_bytes, by_pixels, found = {}, {}, []
    for place, path in enumerate(paths):
        try:
            content = archive.read(path)
            of_bytes = by_bytes.setdefault(hashlib.sha256(content).digest(), place)
            if of_bytes != place:  # its pixels are known
                found.append((of_bytes, None))
                continue
            pixels = encoded.decode_file(content).numpy()
        except (OSError, ValueError, *ERRORS):
            found.append((None, None))
            continue
        of_pixels = by_pixels.setdefault(
            hashlib.sha256(f"{pixels.shape} ".encode() + pixels.tobytes()).digest(), place
        )
        found.append((None, None if of_pixels == place else of_pixels))
    return found
