"""Which images belong together, and which to none, by the cosines of nearest images. Axes: N images.

Cosines pile up below 1, so they are looked at as z = -log(1 - cosine), in which unrelated neighbours spread about
evenly around their median; near-duplicates lie far above it, and images unlike all others far below.
"""

import numpy as np

NEAR, FAR = 4.0, 3.0  # how many spreads above, or below, the median
HIGHEST = 0.999  # threshold, so that exact copies, whose cosine is 1 but for rounding, are found in any case


def near_threshold(cosines):
    """The cosine from which images are near-duplicates: median of z plus four spreads, at most 0.999.

    The spread is the distance from the median down to the 16th percentile, one standard deviation of a normal
    distribution: near-duplicates lie above the median and have no part in it while less than half have one.

    Args:
      cosines: (N,) of each image with the one nearest to it.
    """
    median, spread = _median_and_spread(cosines)
    return float(min(_cosine(median + NEAR * spread), HIGHEST))


def far_threshold(cosines):
    """The cosine below which an image is far from all others: median of z less three spreads (`near_threshold`)."""
    median, spread = _median_and_spread(cosines)
    return float(_cosine(median - FAR * spread))


def _median_and_spread(cosines):
    lower, median = np.percentile(-np.log(np.maximum(1 - np.asarray(cosines, np.float64), 1e-6)), (16, 50))
    return median, median - lower


def _cosine(z):
    return 1 - np.exp(-z)


def connected(pairs):
    """Groups of images that pairs connect, directly or by way of others.

    Args:
      pairs: (number, number) of two images, any number of them.

    Returns:
      A list of groups, sorted lists of two numbers or more, by their first.
    """
    leader = {}

    def find(number):
        leader.setdefault(number, number)
        while leader[number] != number:
            leader[number] = leader[leader[number]]  # halves the way of the next one
            number = leader[number]
        return number

    for one, other in pairs:
        one, other = find(one), find(other)
        leader[max(one, other)] = min(one, other)
    groups = {}
    for number in sorted(leader):
        groups.setdefault(find(number), []).append(number)
    return list(groups.values())
