"""What version 0.1 wrote before its classes moved loads, and goes on as that version did.

`of_0_1/` was made at commit 24680be: `.keras` files of four tiny models after two steps with their weights after two
more, and a run folder after four steps with its checkpoint and metrics after eight.
"""

import csv
import shutil
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf

import moco_tf  # noqa: F401 - registers the classes
from moco_tf import build
from moco_tf.train import main

FILES = Path(__file__).parent / "of_0_1"


@pytest.mark.parametrize("name", ["moco", "moco_v3", "end_to_end", "memory_bank"])
def test_a_keras_file_loads_and_learns_on_as_that_version_did(name):
    model = keras.models.load_model(FILES / f"{name}.keras")
    pair = np.random.default_rng(0).normal(size=(2, 8, 8, 8, 3)).astype("float32")
    data = (pair[0], np.arange(8)) if name == "memory_bank" else tuple(pair)
    model.fit(tf.data.Dataset.from_tensor_slices(data).batch(4), verbose=0)
    with np.load(FILES / "two_steps_later.npz") as later:
        found = np.concatenate([v.numpy().ravel().astype("float64") for v in model.weights])
        np.testing.assert_allclose(found, later[name], rtol=1e-4, atol=1e-5)


def test_a_momentum_that_rises_still_does_under_its_new_name():
    assert keras.models.load_model(FILES / "moco.keras").momentum_rise_steps == 20


def test_a_run_goes_on_and_comes_to_what_that_version_came_to(tmp_path, capsys):
    shutil.copytree(FILES / "run", tmp_path / "run")
    flags = f"--flagfile={tmp_path / 'run/config.flags'}"
    assert main([flags, "--max_steps=8", f"--run_dir={tmp_path / 'run'}"]) == 0
    assert "Going on from step 4 of 8" in capsys.readouterr().out
    rows = []
    for run in (tmp_path / "run", FILES / "run_later"):
        with open(run / "metrics.csv", newline="") as file:
            rows.append(list(csv.DictReader(file)))
    for row, later in zip(*rows, strict=True):
        for name in set(later) - {"images_per_second", "step_share", "data_wait", "knn_top1"}:
            assert float(row[name]) == pytest.approx(float(later[name]), rel=1e-4), name
    found, expected = (
        tf.train.load_checkpoint(run / "checkpoints/step-000000008/state")
        for run in (tmp_path / "run", FILES / "run_later")
    )
    weights = {
        name
        for name in expected.get_variable_to_shape_map()
        if "query_encoder" in name and not name.startswith("_CHECKPOINTABLE")
    }
    assert len(weights) > 20
    for name in weights:
        np.testing.assert_allclose(
            found.get_tensor(name), expected.get_tensor(name), rtol=1e-3, atol=1e-4, err_msg=name
        )


def test_a_run_is_judged(tmp_path):
    shutil.copytree(FILES / "run", tmp_path / "run")
    model = build.trained(tmp_path / "run")
    assert model.steps_done == 4 and np.isfinite(model.predict(np.zeros((1, 16, 16, 3), np.uint8), verbose=0)).all()
