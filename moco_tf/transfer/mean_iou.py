"""Intersection over union of masks, as in PASCAL VOC's segmentation: over the pixels of all images together."""

import numpy as np


def confusions(truth, predicted, classes, ignored=255):
    """Counts the pixels of each pair (true class, predicted class), int64 (L, L); leaves out the value `ignored`.

    truth, predicted: integers of one shape, 0 to L - 1.
    """
    counted = truth != ignored
    pairs = truth[counted].astype(np.int64) * classes + predicted[counted]
    return np.bincount(pairs, minlength=classes**2).reshape(classes, classes)


def iou_of_classes(confusion):
    """Returns intersection over union of each class, percent, (L,); NaN for a class neither present nor predicted."""
    both = np.diag(confusion).astype(np.float64)
    either = confusion.sum(axis=0) + confusion.sum(axis=1) - both
    return 100 * np.divide(both, either, out=np.full(len(both), np.nan), where=either > 0)


def mean_iou(confusion):
    """Returns the mean over the classes, in percent."""
    return float(np.nanmean(iou_of_classes(confusion)))
