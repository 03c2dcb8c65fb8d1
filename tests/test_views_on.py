"""Views that the training step makes, a batch at once: those that the host makes, and exact where a run goes on."""

import dataclasses
import functools
import os
import types

import numpy as np
import pytest
import tensorflow as tf
from every_task import write
from test_preprocessing import photograph
from test_train import assert_a_run_goes_on

from moco_tf.data import __main__ as data_command
from moco_tf.data import augment, sources, views
from moco_tf.data.inputs.image import Preprocessing
from moco_tf.pretext import crops, siblings
from moco_tf.train import main

NUMBER, SIZE = 24, 20
IMAGE = tf.constant(np.round(photograph(30, 24)), tf.uint8)
LEVEL = 1 / (255 * 0.225)  # of 256, in normalised views
FLAGS = [
    "--arch=resnet10",
    "--width=4",
    "--stem=cifar",
    "--image_size=8",
    "--augment=cifar",
    "--batch_size=8",
    "--epochs=1",
    "--queue_size=16",
    "--bn_groups=2",
    "--knn_every=0",
    "--views_on=device",
]


def stacked(made):
    return tf.nest.map_structure(lambda *each: tf.stack(each), *made)


def for_seeds(function):
    """What (seed) -> views gives for `NUMBER` seeds, as batches."""
    return stacked([function(tf.constant((5, number), tf.int64)) for number in range(NUMBER)])


@pytest.mark.parametrize("name", augment.RECIPES)
def test_a_batch_is_distorted_as_its_images_are_one_by_one(name):
    task = augment.RECIPES[name](SIZE)
    views = (task.query, dataclasses.replace(task.key, blur_probability=0.5, solarize_probability=0.5))
    expected = for_seeds(lambda seed: augment.random_views({"image": IMAGE}, seed, views, task.preprocessing))
    cut = for_seeds(lambda seed: augment.random_crops({"image": IMAGE}, seed, views, SIZE))
    for compiled in (False, True):
        distort = tf.function(lambda batch: augment.distorted(batch, views, task.preprocessing), jit_compile=compiled)
        for batch, alone in zip(distort(cut), expected, strict=True):
            np.testing.assert_allclose(batch, alone, atol=0.01 * LEVEL)


@pytest.mark.parametrize("size", [SIZE, 40], ids=["smaller", "larger"])
def test_crops_of_a_batch_are_those_of_its_images(size):
    views = (augment.View(), augment.View(crop_scale=(0.5, 1.0)))
    expected = for_seeds(lambda seed: augment.random_crops({"image": IMAGE}, seed, views, size))
    whole = for_seeds(lambda seed: augment.pictures({"image": IMAGE}, seed, len(views)))
    for batch, alone in zip(augment.crops_of(whole, views, size), expected, strict=True):
        np.testing.assert_allclose(batch.image, alone.image, atol=2e-3)
        np.testing.assert_array_equal(batch.uniforms, alone.uniforms)


@pytest.mark.parametrize("where", ["both", "device"])
def test_the_step_makes_the_views_that_the_host_would_make(where):
    """Within the rounding of a crop to 8 bits, and where XLA rounds a side of a box as the host does."""
    inputs = Preprocessing(image_size=SIZE)
    on_host, elsewhere = (crops.Options(positives=2, views_on=name) for name in ("host", where))
    record = {"image": tf.io.encode_png(IMAGE)}
    expected = for_seeds(lambda seed: crops.views(record, seed, inputs, on_host))
    begun = for_seeds(lambda seed: crops.views(record, seed, inputs, elsewhere))
    finished = tf.function(crops.on_device(inputs, elsewhere), jit_compile=True)(begun)
    assert len(finished) == 3
    for batch, alone in zip(finished, expected, strict=True):
        assert batch.dtype == tf.float32
        near = np.abs(batch - alone).max(axis=(1, 2, 3)) < 3 * LEVEL
        assert near.mean() > 0.9
    assert crops.on_device(inputs, on_host) is None and siblings.on_device is crops.on_device


def test_a_view_does_not_depend_on_its_batch():
    """So replicas see what one device would see, bit for bit."""
    inputs, options = Preprocessing(image_size=SIZE), crops.Options(views_on="device")
    begun = for_seeds(lambda seed: crops.views({"image": tf.io.encode_png(IMAGE)}, seed, inputs, options))
    finish = tf.function(crops.on_device(inputs, options), jit_compile=True)
    halves = [finish(tf.nest.map_structure(lambda t, p=part: tf.split(t, 2)[p], begun)) for part in (0, 1)]
    for whole, *parts in zip(finish(begun), *halves, strict=True):
        np.testing.assert_array_equal(whole, tf.concat(parts, axis=0))


@pytest.mark.parametrize("replicas, worker", [(1, (0, 1)), (4, (0, 2)), (4, (1, 2))])
def test_pictures_in_memory_are_those_read_one_by_one(replicas, worker):
    source = sources.embedded("train").only(range(40))
    source = dataclasses.replace(source, stand_ins=np.where(np.arange(40) % 7, np.arange(40), 1))
    inputs, options = Preprocessing(image_size=SIZE), crops.Options(views_on="device", positives=2)

    def batches(at_once):
        task = functools.partial(crops.views, inputs=inputs, options=options)
        made = views.batches(source, task, 16, 3, 1, replicas, worker, most=2, at_once=at_once)
        return list(made.take(8).as_numpy_iterator())

    for read, kept in zip(batches(None), batches(crops.at_once(source, options)), strict=True):
        tf.nest.map_structure(np.testing.assert_array_equal, read, kept)
    assert crops.at_once(source, crops.Options()) is None


def test_a_memory_bank_takes_the_first_view_alone():
    inputs, options = Preprocessing(image_size=SIZE), crops.Options(views_on="device")
    source = sources.embedded("train").only(range(32))
    task = functools.partial(crops.views, inputs=inputs, options=options)
    made = views.batches(source, task, 16, 0, most=1, at_once=crops.at_once(source, options))
    (view,) = crops.on_device(inputs, options)(next(iter(made))["views"])
    assert view.shape == (16, SIZE, SIZE, 3)


def test_streams_and_images_above_a_third_of_the_memory_are_refused(monkeypatch):
    options, stream = crops.Options(views_on="device"), types.SimpleNamespace(name="a stream")
    with pytest.raises(ValueError, match="a stream is read one by one; --views_on=device keeps"):
        crops.at_once(stream, options)
    monkeypatch.setattr(os, "sysconf", lambda name: {"SC_PAGE_SIZE": 1024, "SC_PHYS_PAGES": 250}[name])
    source = sources.embedded("train").only(range(40))
    with pytest.raises(ValueError, match=r"40 images of 32 x 32 pixels take .* more than a third"):
        crops.at_once(source, options)


@pytest.mark.parametrize(
    "more",
    [
        (),
        pytest.param(("--virtual_replicas=4", "--bn_groups=4"), marks=pytest.mark.slow),
        pytest.param(("--symmetric", "--positives=2"), marks=pytest.mark.slow),
    ],
)
def test_a_run_with_views_of_the_device_goes_on_bit_for_bit(tmp_path, more):
    """On two replicas, and machines, every day in tests/test_workers.py."""
    write(tmp_path / "data/train", 32)
    flags = [f"--dataset={tmp_path / 'data'}", *FLAGS, *more]
    assert_a_run_goes_on(tmp_path, flags)


def test_images_of_several_sizes_are_refused_with_the_way_out(tmp_path, capsys):
    write(tmp_path / "data/train", 8)
    write(tmp_path / "data/train", 24, size=13)
    flags = [f"--dataset={tmp_path / 'data'}", *FLAGS, f"--run_dir={tmp_path / 'run'}"]
    for refusing in (main, data_command.main):  # the other one runs into nothing that this one refuses
        assert refusing(flags) == 2
        error = capsys.readouterr().err
        assert "are of several sizes" in error and "12 x 12" in error and "13 x 13" in error
        assert "--views_on=both" in error
    assert main([f"--dataset={tmp_path / 'data'}", *FLAGS, f"--run_dir={tmp_path / 'other'}", "--views_on=both"]) == 0
