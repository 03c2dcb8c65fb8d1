"""Keras callbacks of a user's own, by `--callbacks=module:function`."""

import re
import sys
import threading
from pathlib import Path

import pytest

from moco_tf.train import main

TINY = ["--dataset=embedded", "--train_split=test", "--arch=resnet10", "--width=4", "--image_size=32", "--dim=8",
        "--augment=cifar", "--batch_size=400", "--queue_size=32", "--knn_every=0", "--epochs=2"]  # fmt: skip
MODULE = """
import keras

class Notes(keras.callbacks.Callback):
    def __init__(self, path):
        super().__init__()
        self.path = path

    def on_epoch_end(self, epoch, logs=None):
        with open(self.path, "a") as file:
            print(epoch, self.model.steps_done, *sorted(logs), file=file)

def notes(config):
    return [Notes(config.run_dir + ".txt")]

class Early(keras.callbacks.Callback):
    def on_epoch_end(self, epoch, logs=None):
        self.model.stop_training = True

def early(config):
    return [Early()]

def number(config):
    return 7

def fails(config):
    raise KeyError("here")
"""


@pytest.fixture
def module(tmp_path, monkeypatch):
    (tmp_path / "own_callbacks.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    sys.modules.pop("own_callbacks", None)


def test_own_callbacks_see_each_epochs_figures(module):
    assert main([*TINY, "--callbacks=own_callbacks:notes", f"--run_dir={module}/run"]) == 0
    lines = (module / "run.txt").read_text().splitlines()
    assert [line.split()[:2] for line in lines] == [["0", "5"], ["1", "10"]]
    assert {"loss", "learning_rate", "contrast_top1"} <= set(lines[0].split())


def test_a_run_that_a_callback_stops_ends_there_and_says_so(module, capsys):
    flags = [*TINY, "--growing_sizes=16", "--callbacks=own_callbacks:early", f"--run_dir={module}/run"]
    assert main(flags) == 0  # two sizes, so two calls of fit
    checkpoint = module / "run/checkpoints/step-000000005"
    assert f"Done: step 5 of 10. {checkpoint}" in capsys.readouterr().out and checkpoint.exists()
    assert len((module / "run/metrics.csv").read_text().splitlines()) == 2


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ("own_callbacks:number", "gives int"),
        ("own_callbacks:fails", "KeyError: 'here'"),
        ("own_callbacks:nothing", "AttributeError"),
        ("nowhere:nothing", "ModuleNotFoundError"),
        ("own_callbacks", "names a function of a run's settings"),
    ],
)
def test_what_gives_no_callbacks_is_refused_in_a_line(module, capsys, value, said):
    assert main([*TINY, f"--callbacks={value}", f"--run_dir={module}/run"]) == 2
    line = capsys.readouterr().err
    assert said in line and line.count("\n") == 1


def test_a_run_outside_of_the_main_thread_takes_no_signals_and_trains(tmp_path):
    found = []
    thread = threading.Thread(target=lambda: found.append(main([*TINY, "--max_steps=1", f"--run_dir={tmp_path}/run"])))
    thread.start()
    thread.join()
    assert found == [0]


def test_the_documented_lines_log_to_mlflows_files(tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow", reason="mlflow is not installed")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")  # newer versions ask for a database otherwise
    text = (Path(__file__).parent.parent / "docs/training.md").read_text()
    (code,) = [block for block in re.findall(r"```python\n(.*?)```", text, re.S) if "mlflow" in block]
    (tmp_path / "tracking.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    try:
        assert main([*TINY, "--callbacks=tracking:mlflow_callbacks", "--run_dir=run"]) == 0
        ((run,),) = [mlflow.search_runs(experiment_names=["moco_tf"], output_format="list")]
        history = mlflow.MlflowClient().get_metric_history(run.info.run_id, "loss")
    finally:
        mlflow.end_run()
        sys.modules.pop("tracking", None)
    assert [point.step for point in history] == [5, 10] and run.data.params["method"] == "moco"
