"""Weights that are functions of their names, for networks whose answers are stored and whose weights are not."""

import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent / "goldens"))
import tensors

IMAGE_SIZE, BATCH, SHOWN = 64, 4, 8


def filled(seed, name, shape):
    """A float32 array in PyTorch's layout; running statistics too differ from channel to channel."""
    value = tensors.parameter(seed, name, shape)
    if name.endswith(("running_mean", "running_var")):
        value = value + 0.1 * np.abs(tensors.parameter(seed, name.replace("running", "any"), shape))
    return value.astype("float32")


def images(seed):
    """(BATCH, 3, IMAGE_SIZE, IMAGE_SIZE), float64."""
    return tensors.images(seed, 0, 0, BATCH, IMAGE_SIZE).astype("float64")


def excerpt(value):
    """The largest magnitude of an array and about SHOWN of its values, evenly spread."""
    flat = np.asarray(value).ravel()
    return {"largest": float(np.abs(flat).max()), "every": flat[:: max(1, flat.size // SHOWN)].tolist()}
