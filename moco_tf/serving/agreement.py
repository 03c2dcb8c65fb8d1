"""How far two answers of an encoder are apart, {output's name: array} each: of a server, a file, or TensorFlow."""

import numpy as np

TOLERANCE = 1e-4  # of an output's largest value


def deviations(answer, expected):
    """Returns {output's name: max|difference| / max|value|} of two answers; infinite where names or shapes differ."""
    return {name: _deviation(answer.get(name), expected.get(name)) for name in sorted(answer.keys() | expected.keys())}


def _deviation(answer, expected):
    if answer is None or expected is None or np.shape(answer) != np.shape(expected):
        return float("inf")
    answer, expected = np.asarray(answer).astype(np.float64), np.asarray(expected).astype(np.float64)
    return float(np.abs(answer - expected).max() / max(np.abs(expected).max(), np.finfo(np.float32).tiny))


def deviation(answer, expected):
    """Returns the largest of `deviations`, or NaN."""
    return float(np.max(list(deviations(answer, expected).values())))  # Python's max would ignore NaN
