"""When the kNN monitor is shown: where its accuracy means something, and with the reason in the log where not."""

import contextlib
import types
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf

from moco_tf.config import make
from moco_tf.data import dataset, tfds
from moco_tf.data.inputs.image import Preprocessing
from moco_tf.data.sources import Source
from moco_tf.evaluate import knn_monitor


@pytest.fixture
def monitor(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(knn_monitor.log, "propagate", True)

    def monitor(*paths, **settings):
        """(the monitor of a run on a folder with images at these paths, what was logged)."""
        png = tf.io.encode_png(np.zeros((4, 5, 3), np.uint8)).numpy()
        for path in paths:
            (tmp_path / "v" / path).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / "v" / path).write_bytes(png)
        config = make(dataset=str(tmp_path / "v"), **settings)
        source = dataset.find(config.dataset, "", config.train_split, config.max_bad_fraction).open()
        with caplog.at_level("INFO", "moco_tf"):
            found = knn_monitor.of_run(config, source, types.SimpleNamespace(path=tmp_path, begun=False))
        return found, caplog.text

    return monitor


def test_two_classes_with_images_in_both_splits_have_a_monitor(monitor):
    found, text = monitor("train/a/1.png", "train/b/2.png", "train/c/3.png", "val/a/4.png", "val/b/5.png", "val/6.png")
    assert found and "No kNN monitor" not in text


@pytest.mark.parametrize(
    "paths, reason",
    [
        (("train/images/1.png", "val/images/2.png"), "there is only 'images'"),
        (("train/a/1.png", "train/b/2.png", "val/a/3.png"), "there is only 'a'"),
        (("train/a/1.png", "train/b/2.png", "val/c/3.png", "val/d/4.png"), "there is none"),
        (("train/a/1.png", "train/b/2.png", "val/3.png"), "v/val have no labels"),
    ],
)
def test_without_two_classes_in_both_splits_there_is_no_monitor_and_a_reason(monitor, paths, reason):
    found, text = monitor(*paths)
    assert found is None and "No kNN monitor: " in text and reason in text


@pytest.mark.parametrize(
    "paths, settings",
    [
        (("train/a/1.png", "train/b/2.png"), {"eval_split": "train"}),
        (("a/1.png", "b/2.png"), {"eval_split": "."}),
        (("a/1.png", "b/2.png", "test/c/3.png", "test/d/4.png"), {}),  # test is read as a class
        (("train/a/1.png", "train/b/2.png", "val/a/3.png", "val/b/4.png"), {"train_split": "."}),
    ],
)
def test_images_that_are_trained_on_do_not_judge(monitor, paths, settings):
    found, text = monitor(*paths, **settings)
    assert found is None and "are trained on, and each would find itself" in text


def test_a_link_to_the_training_images_does_not_judge(monitor, tmp_path):
    (tmp_path / "v").mkdir()
    (tmp_path / "v/val").symlink_to("train")
    found, text = monitor("train/a/1.png", "train/b/2.png")
    assert found is None and "2 of the 2 images of" in text


def test_classes_of_folders_that_are_listed_alone_are_compared_by_name(monitor):
    paths = ("one/b/1.png", "one/c/2.png", "two/a/3.png", "two/b/4.png", "two/c/5.png")
    found, _ = monitor(*paths, train_split="one", eval_split="two")
    assert found.bank.class_names == found.queries.class_names == ("b", "c", "a")
    assert found.bank.labels.numpy().tolist() == [0, 1] and found.queries.labels.numpy().tolist() == [2, 0, 1]


def test_parts_of_a_split_of_tfds_that_overlap_do_not_judge():
    def part(*shards):
        instructions = tuple(types.SimpleNamespace(filename=f, skip=s, take=t) for f, s, t in shards)
        return tfds.Prepared("a set", instructions, None, ("a", "b"), True)

    whole, last = part(("0", 0, 10), ("1", 0, 10)), part(("1", 5, 5))
    assert whole.shared_with(last) == last.shared_with(whole) == 5
    assert part(("0", 0, 10), ("1", 0, 5)).shared_with(last) == 0
    assert "5 of the 5 images of a set are trained on" in knn_monitor._means_nothing(whole, last)


class Mean:
    """A stand-in for a model: its features are the means of the channels."""

    preprocessing = Preprocessing(8, crop_ratio=1.0)

    def encode(self, images):
        return {"features": tf.reduce_mean(images, axis=(1, 2))}


def test_a_sample_without_labels_is_named(tmp_path):
    png = tf.constant([tf.io.encode_png(np.zeros((4, 5, 3), np.uint8)).numpy()] * 3)
    bank, queries = (
        Source(name, png, tf.constant(labels, tf.int64), ("a", "b"))
        for name, labels in (("bank", [0, 1, 0]), ("queries", [-1, 1, -1]))
    )
    found = knn_monitor.KNNMonitor(bank, queries, limit=2)
    found.set_model(Mean())
    with pytest.raises(ValueError, match="takes 2 evenly spread images, and none of those of queries has a label"):
        found.evaluate()


@pytest.mark.parametrize("most, read_again", [(2**20, False), (0, True)])
def test_small_views_are_kept_between_evaluations(tmp_path, monkeypatch, most, read_again):
    paths = []
    for shade in range(8):
        pixels = np.full((12, 12, 3), (30 * shade, 0, 90), np.uint8)
        paths.append(str(tmp_path / f"{shade}.png"))
        Path(paths[-1]).write_bytes(tf.io.encode_png(pixels).numpy())
    images = Source("shades", tf.constant(paths), tf.constant([0, 1] * 4, tf.int64), ("a", "b"), tf.io.read_file)
    monkeypatch.setattr(knn_monitor.KNNMonitor, "MOST_KEPT", most)
    knn = knn_monitor.KNNMonitor(images, images)
    knn.set_model(Mean())
    first = knn.evaluate()
    for path in paths:
        Path(path).unlink()
    with pytest.raises(tf.errors.NotFoundError) if read_again else contextlib.nullcontext():
        assert knn.evaluate() == first
