"""Where a run's wall time goes: what counts as a step, as waiting, as evaluation."""

import subprocess
import sys
import textwrap
import types

import pytest

from moco_tf import callbacks, run_folder
from moco_tf.config import make


@pytest.fixture
def clock(monkeypatch):
    """A clock that goes on when it is told to."""
    clock = types.SimpleNamespace(now=100.0)
    monkeypatch.setattr(callbacks.time, "perf_counter", lambda: clock.now)
    return clock


def test_the_share_of_steps_leaves_out_the_first_step_and_evaluation(clock):
    monitor, saver = types.SimpleNamespace(seconds=2.0), types.SimpleNamespace(seconds=0.0)  # evaluated before
    wall_time = callbacks.WallTime(clock.now, types.SimpleNamespace(seconds=0.0), monitor, saver)
    wall_time._model = model = types.SimpleNamespace(seconds_waited=0.0)

    def pass_by(seconds):
        clock.now += seconds

    def step(seconds, waits=0.0):
        wall_time.on_train_batch_begin(0)
        pass_by(seconds)
        model.seconds_waited += waits
        wall_time.on_train_batch_end(0)

    def epoch_end():
        logs = {}
        wall_time.on_epoch_end(0, logs)
        return logs.get("step_share"), logs.get("data_wait")

    pass_by(5)
    step(4, waits=1)  # traces: 9 seconds since the run began, 2 of them evaluation
    assert wall_time.start == 7
    step(3, waits=1)
    pass_by(2)  # of something else
    assert epoch_end() == (0.6, 0.2)  # 3 and 1 of 5
    pass_by(10)
    monitor.seconds += 10
    pass_by(1)
    saver.seconds += 1
    step(4)
    assert epoch_end() == (0.8, 0)  # 4 of 5, the evaluation apart
    pass_by(0.5)
    parts = "start 7.0, steps 6.0, waiting for images 1.0, evaluation 12.0, saving 1.0, other 2.5"
    assert str(wall_time) == f"30 s: {parts}"


def test_an_epoch_of_the_first_step_alone_has_no_share(clock):
    wall_time = callbacks.WallTime(clock.now, *[types.SimpleNamespace(seconds=0.0)] * 3)
    wall_time._model = types.SimpleNamespace(seconds_waited=0.0)
    wall_time.on_train_batch_begin(0)
    clock.now += 1
    wall_time.on_train_batch_end(0)
    logs = {}
    wall_time.on_epoch_end(0, logs)
    assert logs == {}


def test_a_run_of_a_version_without_a_column_goes_on(tmp_path):
    run = run_folder.RunFolder(make(run_dir=str(tmp_path)))
    (tmp_path / "metrics.csv").write_text("epoch,step,loss\n1,10,2.5\n")
    run.begin(make(run_dir=str(tmp_path)), 100, ("contrast_top1", "learning_rate"))
    run.rewind(10, 10)
    run.add_row({"epoch": 2, "step": 20, "loss": 2.0, "step_share": 0.9})
    first, second = run.rows()
    assert (first["loss"], first["step_share"], second["step_share"]) == ("2.5", "", "0.9")
    assert list(first) == [
        "epoch",
        "step",
        "loss",
        "contrast_top1",
        "learning_rate",
        "images_per_second",
        "step_share",
        "data_wait",
        "knn_top1",
    ]


def test_a_step_that_waits_for_nothing_is_no_wait_on_one_core():
    """With one thread, TensorFlow might take the time after the step, unless that waits for it."""
    code = """
        import os
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
        from moco_tf.startup import load_tensorflow
        load_tensorflow(training=True)
        import time
        import numpy as np
        import tensorflow as tf
        import moco_tf
        backbone = moco_tf.encoders.resnet.resnet10(image_size=32, width=16, stem="cifar")
        model = moco_tf.MoCo(backbone, dim=16, queue_size=64)
        model.compile(moco_tf.SGD(0.01))
        images = tf.zeros((32, 32, 32, 3))
        data = tf.data.Dataset.from_tensors((images, images)).cache().repeat()
        model.fit(data, steps_per_epoch=1, verbose=0)
        before, begun = model.seconds_waited, time.perf_counter()
        model.fit(data, steps_per_epoch=8, verbose=0)
        print((model.seconds_waited - before) / (time.perf_counter() - begun))
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=True)
    assert float(done.stdout) < 0.2
