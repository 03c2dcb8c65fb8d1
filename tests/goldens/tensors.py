"""Deterministic tensors behind the golden files in this folder (NumPy only).

Every tensor is a function of a seed and a name, so that no weights need to be stored:
RandomState(crc32("<seed>/<name>")).standard_normal(shape), scaled by its role.
`name` is the parameter's name in the official PyTorch modules; the key encoder starts as a copy
of the query encoder, so ask for the query encoder's name in both cases.
"""

import zlib

import numpy as np


def _normal(seed, name, shape):
    return np.random.RandomState(zlib.crc32(f"{seed}/{name}".encode())).standard_normal(shape)


def parameter(seed, name, shape):
    """The initial value of one parameter or buffer, in PyTorch's layout, float64.

    Linear weights are (out, in); convolution weights are (out, in, height, width).
    `name` keeps its `encoder_q.` (v1, v2) or `base_encoder.` / `predictor.` (v3) prefix.
    """
    z = _normal(seed, name, shape)
    if name.endswith("running_mean"):
        return np.zeros(shape)
    if name.endswith("running_var"):
        return np.ones(shape)
    if len(shape) == 4:
        return z * np.sqrt(2.0 / np.prod(shape[1:]))
    if len(shape) >= 2:  # linear weights, and the ViT's cls_token (1, 1, dim)
        return z * np.sqrt(1.0 / np.prod(shape[1:]))
    if name.endswith("bias"):
        return 0.1 * z
    return 1 + 0.1 * z  # a normalisation layer's gain


def queue(seed, dim, size):
    """The initial queue (dim, size), float64, each column of unit length."""
    q = _normal(seed, "queue", (dim, size))
    return q / np.linalg.norm(q, axis=0, keepdims=True)


def images(seed, step, view, batch, size):
    """One batch of views, (batch, 3, size, size), float32. view 0 is the query (x1), 1 the key (x2).

    The evaluation batch behind `eval_*` is images(seed, 10**6, 0, 4, size).
    """
    return _normal(seed, f"images/{step}/{view}", (batch, 3, size, size)).astype(np.float32)
