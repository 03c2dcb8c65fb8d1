"""AP against a naive loop, mean IoU against a naive loop."""

import numpy as np
import pytest

from moco_tf.transfer.average_precision import average_precision
from moco_tf.transfer.mean_iou import confusions, iou_of_classes, mean_iou

pytest.importorskip("pycocotools")


def iou(a, b):
    width = max(0.0, min(a[2], b[2]) - max(a[0], b[0]))
    height = max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
    area = lambda box: (box[2] - box[0]) * (box[3] - box[1])  # noqa: E731
    return width * height / (area(a) + area(b) - width * height)


def naive(truth, detections, least, of_class=None):
    """AP at one IoU, of a class or of all as one: precision at 101 recalls, in percent."""
    ranked = sorted(
        ((score, image, box) for image, (boxes, scores, classes) in enumerate(detections)
         for box, score, one in zip(boxes, scores, classes, strict=True) if of_class in (None, one)),
        key=lambda found: -found[0],
    )  # fmt: skip
    wanted = [[box for box, one in zip(boxes, of, strict=True) if of_class in (None, one)] for boxes, of, _ in truth]
    taken, right = [set() for _ in truth], []
    for _, image, box in ranked:
        open_ones = [(iou(box, there), n) for n, there in enumerate(wanted[image]) if n not in taken[image]]
        best = max(open_ones, default=(0, None))
        right.append(best[0] >= least)
        if best[0] >= least:
            taken[image].add(best[1])
    total = sum(map(len, wanted))
    if not total:
        return None
    recall = np.cumsum(right) / total
    precision = np.cumsum(right) / np.arange(1, len(right) + 1)
    at = [max(precision[recall >= level - 1e-12], default=0.0) for level in np.linspace(0, 1, 101)]
    return 100 * np.mean(at)


def random_case(seed, images=6, classes=3):
    rng = np.random.default_rng(seed)
    truth, found = [], []
    for _ in range(images):
        count = rng.integers(0, 5)
        corner, side = rng.uniform(0, 60, (count, 2)), rng.uniform(10, 30, (count, 2))
        boxes, of = np.concatenate([corner, corner + side], axis=1), rng.integers(0, classes, count)
        truth.append((boxes, of, np.zeros(count, bool)))
        near = boxes + rng.normal(0, 3, boxes.shape)
        more = rng.uniform(0, 40, (3, 2))
        candidates = np.concatenate([near, np.concatenate([more, more + 25], axis=1)])
        guessed = np.concatenate(
            [np.where(rng.random(count) < 0.8, of, (of + 1) % classes), rng.integers(0, classes, 3)]
        )
        found.append((candidates, rng.permutation(100)[: len(candidates)] / 100 + rng.random() / 1000, guessed))
    return truth, found


@pytest.mark.parametrize("seed", range(4))
def test_average_precision_is_the_naive_loops(seed):
    truth, found = random_case(seed)
    result = average_precision(truth, found, 3)
    for name, least in (("ap50", 0.5), ("ap75", 0.75)):
        each = [naive(truth, found, least, one) for one in range(3)]
        assert result[name] == pytest.approx(np.mean([value for value in each if value is not None]), abs=1e-6)
    assert result["ap50_any_class"] == pytest.approx(naive(truth, found, 0.5), abs=1e-6)
    levels = np.linspace(0.5, 0.95, 10)
    each = [[naive(truth, found, least, one) for least in levels] for one in range(3)]
    assert result["ap"] == pytest.approx(np.mean([value for value in np.ravel(each) if value is not None]), abs=1e-6)
    assert result["ap_of_class"] == pytest.approx([np.mean(values) for values in each], abs=1e-6)


BOX = np.array([[10.0, 10, 30, 30]])


def test_boxes_found_exactly_have_100_and_nothing_found_has_0():
    truth = [(BOX, np.array([1]), np.array([False]))]
    right = average_precision(truth, [(BOX, np.array([0.9]), np.array([1]))], 2)
    assert [right[name] for name in ("ap", "ap50", "ap75", "ap50_any_class")] == pytest.approx([100] * 4)
    assert np.isnan(right["ap_of_class"][0]) and right["ap_of_class"][1] == pytest.approx(100)
    nothing = average_precision(truth, [(np.zeros((0, 4)), np.zeros(0), np.zeros(0, int))], 2)
    assert nothing["ap"] == nothing["ap50_any_class"] == 0 and nothing["ap_of_class"][1] == 0


def test_a_box_of_another_class_counts_only_without_regard_to_classes():
    truth = [(BOX, np.array([1]), np.array([False]))]
    other = average_precision(truth, [(BOX, np.array([0.9]), np.array([0]))], 2)
    assert other["ap50"] == 0 and other["ap50_any_class"] == pytest.approx(100)


def test_crowds_neither_count_nor_make_a_find_wrong():
    far = BOX + 50
    truth = [(np.concatenate([BOX, far]), np.array([0, 0]), np.array([False, True]))]
    both = np.concatenate([far, BOX])
    assert average_precision(truth, [(both, np.array([0.9, 0.8]), np.array([0, 0]))], 1)["ap50"] == pytest.approx(100)
    without = [(truth[0][0], truth[0][1], np.array([False, False]))]
    assert average_precision(without, [(BOX, np.array([0.8]), np.array([0]))], 1)["ap50"] < 60


def test_without_anything_to_find_it_is_nan():
    nothing = [(np.zeros((0, 4)), np.zeros(0, int), np.zeros(0, bool))]
    assert np.isnan(average_precision(nothing, [(BOX, np.array([0.9]), np.array([0]))], 1)["ap"])


def test_intersection_over_union_is_the_naive_loops():
    rng = np.random.default_rng(0)
    truth, predicted = rng.integers(0, 4, (5, 7, 9)), rng.integers(0, 4, (5, 7, 9))
    truth[rng.random(truth.shape) < 0.1] = 255
    confusion = sum(confusions(t, p, 5) for t, p in zip(truth, predicted, strict=True))
    expected = []
    for one in range(5):
        both = either = 0
        for t, p in zip(truth.ravel(), predicted.ravel(), strict=True):
            if t != 255:
                both += t == one and p == one
                either += t == one or p == one
        expected.append(100 * both / either if either else np.nan)
    np.testing.assert_allclose(iou_of_classes(confusion), expected)
    assert mean_iou(confusion) == pytest.approx(np.nanmean(expected)) and np.isnan(expected[4])
