"""Finds image files that are exact copies: files with the same bytes, or files of other bytes with the same pixels."""

import hashlib

from moco_tf.data import archive, encoded
from moco_tf.data.errors import ERRORS


def copies(paths):
    """Finds the earlier file that each file is a copy of.

    Args:
      paths: of image files; a file that is gone or no longer decodes is a copy of no file.

    Returns:
      For each file (place of the first file with the same bytes, place of the first file with the same pixels but
      other bytes); None where no earlier file is equal.
    """
    by_bytes, by_pixels, found = {}, {}, []
    for place, path in enumerate(paths):
        try:
            content = archive.read(path)
            of_bytes = by_bytes.setdefault(hashlib.sha256(content).digest(), place)
            if of_bytes != place:  # the pixels are known already
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
