"""The files of TensorBoard's embedding projector: features, their names, and a sprite of small pictures."""

import math

import numpy as np
import tensorflow as tf

from moco_tf import files

CONFIG = """embeddings {{
  tensor_name: "features"
  tensor_path: "features.tsv"
  metadata_path: "metadata.tsv"
  sprite {{
    image_path: "sprite.png"
    single_image_dim: {height}
    single_image_dim: {width}
  }}
}}
"""


def write(folder, features, names, pictures):
    """Writes the projector's files into a folder that `tensorboard --logdir` takes.

    features: (N, D); names: N texts; pictures: uint8 (N, T, T, 3).
    """
    with files.aside(folder / "features.tsv") as writing:
        np.savetxt(writing, features, fmt="%.6g", delimiter="\t")
    files.write_text(folder / "metadata.tsv", "".join(" ".join(name.split()) + "\n" for name in names))
    files.write_bytes(folder / "sprite.png", tf.io.encode_png(sprite(pictures)).numpy())
    _, height, width, _ = pictures.shape
    files.write_text(folder / "projector_config.pbtxt", CONFIG.format(height=height, width=width))


def sprite(pictures):
    """Puts pictures (N, H, W, 3) row by row into a square of ceil(sqrt(N)) per side, as the projector expects them."""
    count, height, width, _ = pictures.shape
    side = math.ceil(math.sqrt(count))
    filled = np.zeros((side * side, height, width, 3), np.uint8)
    filled[:count] = pictures
    rows = filled.reshape(side, side, height, width, 3).transpose(0, 2, 1, 3, 4)
    return rows.reshape(side * height, side * width, 3)
