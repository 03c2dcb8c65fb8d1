"""Finds images that belong together, and images unlike all others, by the cosines of nearest images. Axes: N images.

Cosines pile up below 1, so the functions use z = -log(1 - cosine). Unrelated neighbours spread about evenly around the
median of z. Near-duplicates lie far above the median, and images unlike all others lie far below it.
"""

import numpy as np

NEAR, FAR = 4.0, 3.0  # spreads above and below the median
HIGHEST = 0.999  # threshold: exact copies, whose cosine is 1 apart from rounding, are always found


def near_threshold(cosines):
    """Returns the cosine from which images are near-duplicates: median of z plus four spreads, at most 0.999.

    The spread is the distance from the median down to the 16th percentile, which is one standard deviation of a normal
    distribution. Near-duplicates lie above the median, so they do not change the spread while less than half of the
    images have a near-duplicate.

    Args:
      cosines: (N,) of each image with the image nearest to it.
    """
    median, spread = _median_and_spread(cosines)
    return float(min(_cosine(median + NEAR * spread), HIGHEST))


def far_threshold(cosines):
    """Returns the cosine below which an image is far from all others.

    It is the median of z minus three spreads; `near_threshold` describes the spread.
    """
    median, spread = _median_and_spread(cosines)
    return float(_cosine(median - FAR * spread))


def _median_and_spread(cosines):
    lower, median = np.percentile(-np.log(np.maximum(1 - np.asarray(cosines, np.float64), 1e-6)), (16, 50))
    return median, median - lower


def _cosine(z):
    return 1 - np.exp(-z)


def connected(pairs):
    """Groups the images that pairs connect, directly or through other images.

    Args:
      pairs: (number, number) of two images, any number of pairs.

    Returns:
      A list of groups, ordered by their first numbers; each group is a sorted list of two or more numbers.
    """
    leader = {}

    def find(number):
        leader.setdefault(number, number)
        while leader[number] != number:
            leader[number] = leader[leader[number]]  # halves the path for the next search
            number = leader[number]
        return number

    for one, other in pairs:
        one, other = find(one), find(other)
        leader[max(one, other)] = min(one, other)
    groups = {}
    for number in sorted(leader):
        groups.setdefault(find(number), []).append(number)
    return list(groups.values())
