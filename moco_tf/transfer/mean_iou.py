"""Intersection over union of masks, as PASCAL VOC's segmentation is judged: over the pixels of all images together."""

import numpy as np


def confusions(truth, predicted, classes, ignored=255):
    """Pixels of each pair (true class, predicted class), int64 (L, L); those of value `ignored` are left out.

    truth, predicted: integers of one shape, 0 to L - 1.
    """
    counted = truth != ignored
    pairs = truth[counted].astype(np.int64) * classes + predicted[counted]
    return np.bincount(pairs, minlength=classes**2).reshape(classes, classes)


def iou_of_classes(confusion):
    """Intersection over union of each class, in percent, (L,); NaN of one that is neither there nor predicted."""
    both = np.diag(confusion).astype(np.float64)
    either = confusion.sum(axis=0) + confusion.sum(axis=1) - both
    return 100 * np.divide(both, either, out=np.full(len(both), np.nan), where=either > 0)


def mean_iou(confusion):
    """The mean over the classes, in percent."""
    return float(np.nanmean(iou_of_classes(confusion)))
