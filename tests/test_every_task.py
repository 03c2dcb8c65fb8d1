"""What holds for every pretext task of the package, named once: it goes on bit for bit, and its encoder is served."""

import json

import every_task
import keras
import numpy as np
import pytest
import tensorflow as tf
from every_task import TASKS, flags, of_text
from test_saved_model import c_api
from test_train import assert_a_run_goes_on, rows

import moco_tf
from moco_tf import build
from moco_tf.encoders import vit
from moco_tf.evaluate import finetune, knn
from moco_tf.serving import export
from moco_tf.train import main


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    every_task.write_data(folder)
    return folder


@pytest.fixture(autouse=True)
def _a_small_transformer(monkeypatch):
    monkeypatch.setattr(vit, "vit_tiny", every_task.small_transformer)


DAILY = ("cluster", "simcse")  # of images and of words; the others are slow, and begin with `-m slow`


@pytest.mark.parametrize(
    "words",
    [
        words if words in DAILY else pytest.param(words, marks=pytest.mark.slow)
        for words in (*TASKS, "exemplar --loss=triplet")
    ],
)
def test_a_run_goes_on_bit_for_bit_and_its_encoder_is_judged_and_served(words, data, tmp_path):
    task, *more = words.split()
    whole = assert_a_run_goes_on(tmp_path, [*flags(task, data), *more], at=9, steps=12)
    dataset = flags(task, data)[1]
    judged = [dataset, "--train_split=train", "--eval_split=train", f"--output={tmp_path / 'knn'}"]
    assert knn.main([f"--encoder={whole}", "--k=3", *judged]) == 0
    tuned = [f"--output={tmp_path / 'tuned'}", "--labels=100", "--epochs=1", *judged[:3]]
    assert finetune.main([f"--encoder={whole}", *tuned]) == (2 if of_text(task) else 0)  # that crops images
    assert 0 <= json.loads((tmp_path / "knn/summary.json").read_text())["top1"] <= 100
    assert export.main(["encoder", f"--run_dir={whole}", f"--output={tmp_path / 'served'}"]) == 0
    model = build.trained(whole)
    model.compile(moco_tf.SGD(0.1))  # a run's rate is a function, which no file keeps
    model.save(tmp_path / "model.keras")
    request = np.array([b"thing 1", b"two things"]) if of_text(task) else np.full((2, 8, 8, 3), 99, np.uint8)
    wanted = model.predict([text.decode() for text in request] if of_text(task) else request, verbose=0)
    loaded = keras.models.load_model(tmp_path / "model.keras")
    np.testing.assert_array_equal(loaded.predict(tf.constant(request), verbose=0), wanted)
    (served,) = c_api(tmp_path / "served/1", model, [("serving_default", request, None)], tmp_path)
    np.testing.assert_allclose(served["features"], wanted, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("task", TASKS)
def test_replicas_begin_with_the_loss_of_one_and_half_precision_trains(task, data, tmp_path):
    losses = {}
    for name, more in {"one": [], "four": ["--virtual_replicas=4"], "half": ["--precision=bfloat16"]}.items():
        more = [*more, "--bn_groups=4", "--max_steps=1"]
        assert main([*flags(task, data), *more, f"--run_dir={tmp_path / name}"]) == 0
        losses[name] = float(rows(tmp_path / name)[-1]["loss"])
    assert losses["one"] == pytest.approx(losses["four"], abs=1e-5)
    if task == "cluster":  # features that are rounded fall into other groups, whose images weigh otherwise
        assert np.isfinite(losses["half"]) and losses["half"] > 0
    else:
        assert losses["one"] == pytest.approx(losses["half"], rel=0.1)
