import csv

import numpy as np
import pytest

from moco_tf.evaluate import plots, scores


def test_accuracies_and_confusions_equal_a_naive_loops():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 8, 200)
    ranked = np.array([rng.permutation(9)[:5] - 1 for _ in labels])  # -1: none
    found = scores.score(ranked, labels, classes=9)
    pairs = {}
    for label, ranks in zip(labels, ranked, strict=True):
        pairs[label, ranks[0]] = pairs.get((label, ranks[0]), 0) + 1
    assert found.top1 == pytest.approx(100 * sum(r[0] == t for r, t in zip(ranked, labels, strict=True)) / 200)
    assert found.top5 == pytest.approx(100 * sum(t in r for r, t in zip(ranked, labels, strict=True)) / 200)
    for label in range(8):
        mine = ranked[labels == label]
        assert found.of_class[label] == pytest.approx(100 * (mine[:, 0] == label).mean())
    assert np.isnan(found.of_class[8]) and found.counts[8] == 0
    assert {(a, b): n for a, b, n in found.confusions} == pairs


def test_five_classes_have_no_top5():
    assert scores.score(np.zeros((3, 5), int), np.array([0, 1, 4]), classes=5).top5 is None


def test_ten_thousand_classes_make_a_picture_of_the_least_recognised(tmp_path):
    labels = np.arange(10_000)
    ranked = labels[:, None].copy()
    ranked[17] = 4000
    found = scores.score(ranked, labels, classes=10_000)
    assert len(found.confusions) == 10_000
    plots.confusion(tmp_path / "confusion.png", found.confusions, found.counts, [str(n) for n in labels])
    assert (tmp_path / "confusion.png").stat().st_size > 1000


def test_without_matplotlib_one_line_says_how_to_get_pictures(tmp_path, monkeypatch, caplog):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    monkeypatch.delattr(plots.pyplot, "said", raising=False)
    monkeypatch.setattr(plots.log, "propagate", True)
    monkeypatch.setattr(plots.log, "handlers", [])  # an earlier test's would show the line once more
    with caplog.at_level("INFO", "moco_tf"):
        for _ in range(2):
            plots.curves(tmp_path / "x.png", [{"k": 1, "top1": 2.0}], "k", "top1")
    assert [r.message for r in caplog.records] == [
        "No pictures: they need matplotlib, which `pip install 'moco_tf[eval]'` brings."
    ]
    assert not list(tmp_path.iterdir())


def test_class_names_with_commas_and_quotes_survive_the_files(tmp_path):
    rows = [{"class": 'a, "b"', "images": 1}]
    scores.write_rows(tmp_path / "x.csv", rows)
    with open(tmp_path / "x.csv", newline="") as file:
        assert list(csv.DictReader(file)) == [{"class": 'a, "b"', "images": "1"}]


def test_class_names_with_dollars_are_no_formulas_in_pictures(tmp_path):
    names, labels = ["$5", r"$\10$", "plain"], np.array([0, 1, 2])
    found = scores.score(labels[:, None], labels, classes=3)
    plots.confusion(tmp_path / "confusion.png", found.confusions, found.counts, names)
    plots.points(tmp_path / "map.png", np.zeros((3, 2)), labels, names)
    assert (tmp_path / "confusion.png").exists() and (tmp_path / "map.png").exists()
