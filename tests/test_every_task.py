"""What holds for every pretext task of the package, named once: it goes on bit for bit, and its encoder is served."""

import json
import pkgutil

import numpy as np
import pytest
import tensorflow as tf
from test_train import assert_same_run, rows
from test_views_on import write

from moco_tf import config as config_lib
from moco_tf import pretext
from moco_tf.evaluate import finetune, knn
from moco_tf.serving import export
from moco_tf.train import main

TASKS = [module.name for module in pkgutil.iter_modules(pretext.__path__)]
FLAGS = [
    *("--arch=resnet10", "--width=4", "--stem=cifar", "--image_size=8", "--batch_size=8", "--queue_size=16"),
    *("--knn_every=0", "--epochs=2", "--lr=0.01", "--lr_scaling=none", "--positives_from=keys"),
]


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Sixteen things, which are classes, too, of three pictures each."""
    folder = tmp_path_factory.mktemp("images")
    for thing in range(16):
        write(folder / "train" / f"thing-{thing:02}", 3)
    return folder


def flags(task, images):
    wanted = config_lib.task_module(task).Options.__dataclass_fields__
    own = [flag for flag in FLAGS if task != "labels" or "positives_from" not in flag]
    return [f"--pretext={task}", f"--dataset={images}", *own, *(["--augment=cifar"] if "augment" in wanted else [])]


# Slow: of these, other tests say the same every day.
ELSEWHERE = ("crops", "labels", "siblings")


@pytest.mark.parametrize(
    "task", [pytest.param(task, marks=pytest.mark.slow) if task in ELSEWHERE else task for task in TASKS]
)
def test_a_run_goes_on_bit_for_bit_and_its_encoder_is_judged_and_served(task, images, tmp_path):
    whole = tmp_path / "whole"
    assert main([*flags(task, images), f"--run_dir={whole}"]) == 0
    steps = int(rows(whole)[-1]["step"])
    for last in (steps // 2 - 1, steps):
        assert main([*flags(task, images), f"--run_dir={tmp_path / 'parts'}", f"--max_steps={last}"]) == 0
    assert_same_run(whole, tmp_path / "parts")
    data = [f"--dataset={images}", "--train_split=train", "--eval_split=train", f"--output={tmp_path / 'knn'}"]
    assert knn.main([f"--encoder={whole}", "--k=3", *data]) == 0
    tuned = [f"--output={tmp_path / 'tuned'}", "--labels=100", "--epochs=1", *data[:3]]
    assert finetune.main([f"--encoder={whole}", *tuned]) == 0
    assert 0 <= json.loads((tmp_path / "knn/summary.json").read_text())["top1"] <= 100
    assert export.main(["encoder", f"--run_dir={whole}", f"--output={tmp_path / 'served'}"]) == 0
    (folder,) = (tmp_path / "served").rglob("saved_model.pb")
    served = tf.saved_model.load(folder.parent).signatures["serving_default"]
    pixels = tf.zeros((2, 8, 8, 3), tf.uint8)
    assert np.isfinite(next(iter(served(pixels).values()))).all()


@pytest.mark.slow
@pytest.mark.parametrize("task", TASKS)
def test_two_replicas_begin_with_the_loss_of_one_and_half_precision_trains(task, images, tmp_path):
    losses = {}
    for name, more in {"one": [], "two": ["--virtual_replicas=2"], "half": ["--precision=bfloat16"]}.items():
        more = [*more, "--bn_groups=2", "--max_steps=1"]
        assert main([*flags(task, images), *more, f"--run_dir={tmp_path / name}"]) == 0
        losses[name] = float(rows(tmp_path / name)[-1]["loss"])
    assert losses["one"] == pytest.approx(losses["two"], abs=1e-5)
    assert losses["one"] == pytest.approx(losses["half"], rel=0.1)
