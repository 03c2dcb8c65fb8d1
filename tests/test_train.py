"""The command: its files, its refusals, and that an interrupted run goes on bit for bit."""

import contextlib
import csv
import fcntl
import gc
import logging
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from moco_tf import build, callbacks
from moco_tf.command import ConfigError
from moco_tf.data import sources
from moco_tf.train import main

REPOSITORY = Path(__file__).parent.parent
STEPS = 20  # an epoch of 2,000 images in batches of 100
TINY = [
    "--arch=resnet10",
    "--width=4",
    "--stem=imagenet",
    "--image_size=32",
    "--augment=cifar",
    "--train_split=test",  # the small one of the embedded images
    "--batch_size=100",
    "--queue_size=140",
    "--bn_groups=4",
    "--lr_per=step",
    "--epochs=2",
    "--head=linear",
    "--dim=16",
    "--momentum=0.9",
    "--knn_every=0",
]


def start(run_dir, *arguments):
    command = [sys.executable, "-m", "moco_tf.train", *TINY, f"--run_dir={run_dir}", *arguments]
    return subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def last_checkpoint(run_dir):
    return max((int(p.name.removeprefix("step-")) for p in Path(run_dir).glob("checkpoints/step-*")), default=0)


def wait_for_step(process, run_dir, step):
    while last_checkpoint(run_dir) < step:
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.02)


def tensors(run_dir):
    reader = tf.train.load_checkpoint(Path(run_dir) / f"checkpoints/step-{last_checkpoint(run_dir):09d}/state")
    names = set(reader.get_variable_to_shape_map()) - {"_CHECKPOINTABLE_OBJECT_GRAPH"}  # layers' names, not numbers
    return {name: reader.get_tensor(name) for name in names}


def rows(run_dir):
    with open(Path(run_dir) / "metrics.csv", newline="") as file:
        return list(csv.DictReader(file))


def assert_same_run(a, b):
    x, y = tensors(a), tensors(b)
    assert x.keys() == y.keys() and len(x) > 50
    assert not [name for name in x if not np.array_equal(x[name], y[name])]
    timeless = [
        [{k: v for k, v in row.items() if k not in ("images_per_second", "step_share")} for row in rows(run)]
        for run in (a, b)
    ]
    assert timeless[0] == timeless[1]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("undisturbed")
    process = start(run_dir, "--checkpoint_every=7")
    output = process.communicate()[0]
    assert process.returncode == 0, output
    return run_dir


def run_and_kill(run_dir, kills, *flags):
    """A run that is killed so many times, and then ended."""
    seed = os.environ.get("KILL_SEED", str(time.time_ns()))
    print(f"KILL_SEED={seed}")  # shown on failure: repeats the moments
    moments = random.Random(seed)
    for step in sorted(moments.sample(range(3, 2 * STEPS - 10), kills)):
        process = start(run_dir, "--checkpoint_every=3", *flags)
        wait_for_step(process, run_dir, step - step % 3)
        time.sleep(moments.uniform(0, 0.1))
        process.send_signal(signal.SIGKILL)
        process.wait()
    process = start(run_dir, "--checkpoint_every=3", *flags)
    output = process.communicate()[0]
    assert process.returncode == 0, output
    assert "Going on from step" in output


def test_the_last_line_says_where_the_wall_time_went(undisturbed):
    whole, parts = re.search(r"Wall time (\d+) s: (.*)\.$", (undisturbed / "train.log").read_text(), re.M).groups()
    parts = {name: float(seconds) for name, seconds in re.findall(r"([a-z ]+) (-?[\d.]+)", parts)}
    assert [name.strip() for name in parts] == [
        "start",
        "steps",
        "waiting for images",
        "evaluation",
        "saving",
        "other",
    ]
    assert abs(sum(parts.values()) - float(whole)) < 1 and min(parts.values()) > -0.1
    assert all(0 < float(row["step_share"]) <= 1 for row in rows(undisturbed))


@pytest.mark.parametrize("kills", [1, pytest.param(5, marks=pytest.mark.slow)])
def test_a_killed_run_ends_with_the_same_bytes_as_an_undisturbed_one(undisturbed, tmp_path, kills):
    run_and_kill(tmp_path, kills)
    assert_same_run(undisturbed, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("replicas", [0, 2])
@pytest.mark.parametrize("method", [["end_to_end", "--shared=none"], ["memory_bank", "--loss=nce"], ["moco_v3"]])
def test_a_killed_run_of_another_method_does_too(tmp_path, method, replicas):
    flags = [f"--method={method[0]}", *method[1:], f"--virtual_replicas={replicas}"]
    process = start(tmp_path / "whole", "--checkpoint_every=7", *flags)
    output = process.communicate()[0]
    assert process.returncode == 0, output
    run_and_kill(tmp_path / "killed", 1, *flags)
    assert_same_run(tmp_path / "whole", tmp_path / "killed")


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_a_signal_saves_and_says_how_to_go_on(undisturbed, tmp_path, capsys, number):
    process = start(tmp_path, "--checkpoint_every=2")
    wait_for_step(process, tmp_path, 2)
    process.send_signal(number)
    output = process.communicate()[0]
    assert process.returncode == 128 + number
    stopped = last_checkpoint(tmp_path)
    assert f"--flagfile={tmp_path}/config.flags --run_dir={tmp_path}" in output.splitlines()[-1]
    arguments = output.splitlines()[-1].partition("Go on with: python -m moco_tf.train ")[2].split()
    assert main(arguments) == 0
    assert f"Going on from step {stopped}" in capsys.readouterr().out
    assert_same_run(undisturbed, tmp_path)


def test_a_run_folder_holds_what_the_contract_says(undisturbed):
    assert [r["epoch"] for r in rows(undisturbed)] == ["1", "2"]
    assert list(rows(undisturbed)[0]) == [
        *("epoch", "step", "loss"),
        *("contrast_top1", "positive_similarity", "negative_similarity", "feature_std", "learning_rate", "momentum"),
        *("images_per_second", "step_share", "knn_top1"),
    ]
    assert {p.name for p in undisturbed.iterdir()} >= {
        "config.flags",
        "metrics.csv",
        "checkpoints",
        "tensorboard",
        "train.log",
    }
    assert len(list((undisturbed / "checkpoints").iterdir())) == 3
    assert list((undisturbed / "tensorboard").iterdir())


def test_tensorboard_shows_the_picture_of_the_views_that_the_run_folder_has(undisturbed):
    events = EventAccumulator(str(undisturbed / "tensorboard"), {"tensors": 0}).Reload()
    assert events.SummaryMetadata("views").plugin_data.plugin_name == "images"
    (event,) = events.Tensors("views")
    width, height, png = event.tensor_proto.string_val
    assert png == (undisturbed / "views.png").read_bytes()
    assert tf.io.decode_png(png).shape == (int(height), int(width), 3) == (2 * 96, 8 * 96, 3)


def test_a_finished_run_says_so(undisturbed, capsys):
    assert main([*TINY, f"--run_dir={undisturbed}"]) == 0
    assert f"{undisturbed} is finished, at step 40 of 40" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--lr=0.5", "--seed=4"], "other --lr (there 0.03, here 0.5), --seed (there 0, here 4)"),
        (["--noresume"], "--noresume starts a new run, but"),
        (["--max_bad_fraction=1.5"], "--max_bad_fraction lies between 0 and 1; got 1.5"),
        (["--dataset=/no/such/folder"], "/no/such/folder"),
        (["--train_split=other"], "'other'"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line_with_status_2(undisturbed, capsys, arguments, message):
    before = {p: p.stat().st_mtime_ns for p in undisturbed.rglob("*") if p.name != ".lock"}
    assert main([*TINY, f"--run_dir={undisturbed}", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert before == {p: p.stat().st_mtime_ns for p in undisturbed.rglob("*") if p.name != ".lock"}


def test_a_damaged_checkpoint_is_refused_in_one_line_with_status_2(undisturbed, tmp_path, capsys):
    shutil.copytree(undisturbed, tmp_path / "run")
    (data,) = (tmp_path / "run/checkpoints").glob(f"step-{last_checkpoint(undisturbed):09d}/state.data*")
    data.write_bytes(data.read_bytes()[:-10_000])
    assert main([*TINY, f"--run_dir={tmp_path / 'run'}"]) == 2
    error = capsys.readouterr().err
    assert f"{data.parent} cannot be read" in error and "the checkpoint before it is taken" in error
    assert error.count("\n") == 1


def test_fewer_images_than_a_batch_are_refused(tmp_path, capsys):
    assert main([*TINY, f"--run_dir={tmp_path}", "--batch_size=20000"]) == 2
    error = capsys.readouterr().err
    assert "2000 images are fewer than --batch_size=20000" in error and error.count("\n") == 1


def test_a_folder_in_use_is_refused(tmp_path, capsys):
    process = start(tmp_path, "--checkpoint_every=1", "--epochs=60")
    wait_for_step(process, tmp_path, 1)
    assert main([*TINY, f"--run_dir={tmp_path}"]) == 2
    assert "another process is training in" in capsys.readouterr().err
    process.kill()
    process.wait()


def locked(run_dir):
    """Whether another holder of the folder would be refused; flock tells holders in one process apart, too."""
    with open(Path(run_dir) / ".lock") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        return False


@pytest.fixture
def held_by_nobody_afterwards():
    """Objects of a run need not be collected for its folder to be free."""
    gc.disable()
    before = list(logging.getLogger("moco_tf").handlers)
    yield
    gc.enable()
    files = [h for h in logging.getLogger("moco_tf").handlers if isinstance(h, logging.FileHandler)]
    assert not [handler for handler in files if handler not in before]


@pytest.mark.slow
@pytest.mark.usefixtures("held_by_nobody_afterwards")
def test_a_run_goes_on_and_others_begin_in_the_same_process_as_in_new_ones(undisturbed, tmp_path):
    one, other = (f"--run_dir={tmp_path / name}" for name in ("one", "other"))
    assert main([*TINY, one, "--epochs=1", "--lr_schedule=step"]) == 0
    assert not locked(tmp_path / "one")
    assert main([*TINY, other]) == 0
    assert main([*TINY, one, "--lr=9", "--lr_schedule=step"]) == 2
    assert main([*TINY, one, "--lr_schedule=step"]) == 0
    assert [row["step"] for row in rows(tmp_path / "one")] == ["20", "40"]
    x, y = tensors(undisturbed), tensors(tmp_path / "other")
    assert not [name for name in x if not np.array_equal(x[name], y[name])]
    logs = {name: (tmp_path / name / "train.log").read_text() for name in ("one", "other")}
    assert {name: text.count("Done: step 40 of 40") for name, text in logs.items()} == {"one": 1, "other": 1}
    assert f"{tmp_path}/one" not in logs["other"] and f"{tmp_path}/other" not in logs["one"]


@pytest.mark.usefixtures("held_by_nobody_afterwards")
@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError, ConfigError, callbacks.TrainingStopped])
def test_however_training_ends_its_folder_is_free_and_its_log_closed(tmp_path, monkeypatch, error):
    def fail(*_, **__):
        assert locked(tmp_path)
        logging.getLogger("moco_tf").info("in the log")
        raise error("ends here")

    monkeypatch.setattr(build, "steps_per_epoch", fail)
    with contextlib.suppress(RuntimeError, callbacks.TrainingStopped):
        main([*TINY, f"--run_dir={tmp_path}"])
    assert not locked(tmp_path)
    logging.getLogger("moco_tf").info("not in the log")
    assert (tmp_path / "train.log").read_text().count("in the log") == 1


def test_a_loss_that_is_no_number_stops_with_step_rate_and_the_last_good_checkpoint(tmp_path, capsys):
    arguments = ["--lr=1e4", "--weight_decay=1", "--lr_schedule=step", "--checkpoint_every=1"]  # grows to overflow
    assert main([*TINY, f"--run_dir={tmp_path}", *arguments]) == 1
    line = capsys.readouterr().out.splitlines()[-1]
    step = int(line.partition("at step ")[2].partition(",")[0])
    assert "Stopped: the loss is nan" in line and "learning rate 10000" in line
    assert f"the last good checkpoint is {tmp_path}/checkpoints/step-{step - 2:09d}." in line
    assert (tmp_path / f"checkpoints/step-{step - 2:09d}").exists()


class SignalAt(keras.callbacks.Callback):
    """Sends this process a signal after one step."""

    def __init__(self, number, step):
        super().__init__()
        self.number = number
        self.step = step

    def on_train_batch_end(self, batch, logs=None):
        if int(self.model.step) == self.step:
            os.kill(os.getpid(), self.number)


def test_a_signal_in_an_epochs_last_step_loses_no_row(undisturbed, tmp_path, monkeypatch):
    stop = SignalAt(signal.SIGINT, STEPS)
    monkeypatch.setattr(callbacks, "StopOnNaN", lambda: stop)  # the first callback of each fit
    assert main([*TINY, f"--run_dir={tmp_path}"]) == 128 + signal.SIGINT
    assert last_checkpoint(tmp_path) == STEPS
    assert [r["step"] for r in rows(tmp_path)] == [str(STEPS)]
    assert main([*TINY, f"--run_dir={tmp_path}"]) == 0
    assert_same_run(undisturbed, tmp_path)


@pytest.fixture
def without_its_last_checkpoint(undisturbed, tmp_path):
    """A run that was killed between its last epoch's row and its checkpoint; it stands a few steps before."""
    run_dir = tmp_path / "run"
    shutil.copytree(undisturbed, run_dir)
    shutil.rmtree(run_dir / f"checkpoints/step-{2 * STEPS:09d}")
    assert STEPS < last_checkpoint(run_dir) < 2 * STEPS
    return run_dir


def test_an_epochs_end_is_saved_after_its_row_is_written(without_its_last_checkpoint, monkeypatch):
    def fail(*_):
        raise RuntimeError("the disk is full")

    before = last_checkpoint(without_its_last_checkpoint)
    monkeypatch.setattr(callbacks.Recorder, "on_epoch_end", fail)
    with pytest.raises(RuntimeError, match="disk"):
        main([*TINY, f"--run_dir={without_its_last_checkpoint}"])
    assert last_checkpoint(without_its_last_checkpoint) == before


def test_max_steps_ends_with_a_checkpoint_and_a_row_and_the_run_can_go_on(tmp_path):
    assert main([*TINY, f"--run_dir={tmp_path}", "--max_steps=3"]) == 0
    assert last_checkpoint(tmp_path) == 3
    assert [(r["epoch"], r["step"]) for r in rows(tmp_path)] == [("1", "3")]
    assert main([*TINY, f"--run_dir={tmp_path}", "--max_steps=5"]) == 0
    assert [(r["epoch"], r["step"]) for r in rows(tmp_path)] == [("1", "5")]


def test_a_row_whose_checkpoint_was_not_written_is_written_once(undisturbed, without_its_last_checkpoint):
    written = [("1", str(STEPS)), ("2", str(2 * STEPS))]
    assert [(r["epoch"], r["step"]) for r in rows(without_its_last_checkpoint)] == written
    assert main([*TINY, f"--run_dir={without_its_last_checkpoint}"]) == 0
    assert [(r["epoch"], r["step"]) for r in rows(without_its_last_checkpoint)] == written
    assert_same_run(undisturbed, without_its_last_checkpoint)


@pytest.mark.parametrize(
    "flags",
    [
        ["--method=memory_bank", "--loss=nce"],
        ["--method=end_to_end", "--shared=none"],
    ],
    ids=lambda flags: " ".join(flags),
)
def test_other_methods_go_on_bit_for_bit_too(tmp_path, flags):
    arguments = [*TINY, *flags, "--epochs=1"]
    assert main([*arguments, f"--run_dir={tmp_path / 'whole'}", "--max_steps=4", "--checkpoint_every=2"]) == 0
    shutil.copytree(tmp_path / "whole", tmp_path / "halves")
    shutil.rmtree(tmp_path / "halves/checkpoints/step-000000004")  # as if killed before it was there
    assert main([*arguments, f"--run_dir={tmp_path / 'halves'}", "--max_steps=4"]) == 0
    assert "Going on from step 2 of 4." in (tmp_path / "halves/train.log").read_text()
    x, y = tensors(tmp_path / "whole"), tensors(tmp_path / "halves")
    assert x.keys() == y.keys() and len(x) > 40
    assert not [name for name in x if not np.array_equal(x[name], y[name])]
    assert rows(tmp_path / "whole")[0]["loss"] == rows(tmp_path / "halves")[0]["loss"]
    assert "momentum" not in rows(tmp_path / "whole")[0]
    assert build.trained(tmp_path / "halves").steps_done == 4  # a bank of as many records as the run had


def test_a_bank_is_refused_where_it_does_not_fit(tmp_path, capsys, monkeypatch):
    arguments = [*TINY, "--method=memory_bank", f"--run_dir={tmp_path}"]
    assert main([*arguments, "--queue_size=1901"]) == 2
    assert "at most 1900 of 2000 with --batch_size=100; got 1901" in capsys.readouterr().err
    monkeypatch.setattr(os, "sysconf", lambda name: 200 if name == "SC_PHYS_PAGES" else 4096)
    assert main([*arguments, "--dim=128"]) == 2
    error = capsys.readouterr().err
    assert "128 numbers for each of 2000 images, 0.00102 GB, more than a third of this machine's 0.000819 GB" in error
    assert error.count("\n") == 1 and not (tmp_path / "config.flags").exists()


def test_a_bank_goes_on_with_the_images_that_it_began_with(tmp_path, capsys):
    shades(tmp_path / "data", 12)
    arguments = folder_run(tmp_path, "--method=memory_bank", "--queue_size=4", "--epochs=9")
    assert main([*arguments, "--max_steps=1"]) == 0
    shades(tmp_path / "data", 16)  # left out
    assert main([*arguments, "--max_steps=2"]) == 0
    (tmp_path / "run/data.json").write_text('{"images": 13}')
    assert main([*arguments, "--max_steps=3"]) == 2
    assert "had 13, --dataset has 12" in capsys.readouterr().err


def test_a_folder_of_images_trains_with_knn_where_it_has_labels(tmp_path, capsys):
    rng = np.random.default_rng(0)
    for split, count in (("train", 12), ("test", 4)):
        for name, shade in (("dark", 40), ("light", 200)):
            folder = tmp_path / "data" / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                image = np.clip(rng.normal(shade, 20, (36, 48, 3)), 0, 255).astype("uint8")
                (folder / f"{i}.png").write_bytes(tf.io.encode_png(image).numpy())
    arguments = ["--train_split=train", "--batch_size=8", "--queue_size=16", "--epochs=1", "--knn_every=1"]
    assert main([*TINY, f"--run_dir={tmp_path / 'run'}", f"--dataset={tmp_path / 'data'}", *arguments]) == 0
    assert rows(tmp_path / "run")[0]["knn_top1"] == "100.0"
    assert "kNN top-1: untrained 100.0 %, raw pixels 100.0 %, epoch 1 100.0 %" in capsys.readouterr().out


def shades(folder, count):
    """Writes small images of different shades."""
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        image = np.full((36, 48, 3), 10 * i, "uint8")
        (folder / f"{i:02d}.png").write_bytes(tf.io.encode_png(image).numpy())


def folder_run(tmp_path, *arguments):
    data = [f"--dataset={tmp_path / 'data'}", "--train_split=train"]
    return [*TINY, "--batch_size=8", f"--run_dir={tmp_path / 'run'}", *data, *arguments]


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    """A run of one step, of two, on a folder of eight images."""
    folder = tmp_path_factory.mktemp("begun")
    shades(folder / "data", 8)
    assert main(folder_run(folder, "--max_steps=1")) == 0
    return folder


@pytest.fixture
def going_on(begun, tmp_path):
    """The arguments that go on with a copy of that run; the folder is then as it was."""
    shutil.copytree(begun / "data", tmp_path / "as_it_was")
    shutil.copytree(begun / "run", tmp_path / "run")
    yield [*folder_run(begun), f"--run_dir={tmp_path / 'run'}"]
    shutil.rmtree(begun / "data")
    shutil.copytree(tmp_path / "as_it_was", begun / "data")


def test_images_that_come_during_a_run_are_left_out_until_another(begun, going_on, tmp_path, capsys):
    shades(begun / "data", 9)
    assert main(going_on) == 0
    assert "1 images came into" in capsys.readouterr().out
    assert last_checkpoint(tmp_path / "run") == 2


def test_images_that_go_during_a_run_are_replaced_or_too_many_of_them_refused(begun, going_on, tmp_path, capsys):
    (begun / "data/03.png").unlink()
    assert main(going_on) == 2
    assert "--max_bad_fraction=0.05 of the images may be undecodable; 1 of 8 are: 03.png" in capsys.readouterr().err
    assert main([*going_on, "--max_bad_fraction=0.2"]) == 0
    assert "1 of 8 images in" in capsys.readouterr().out
    assert "Undecodable image: " in (tmp_path / "run/train.log").read_text()


def test_an_image_that_goes_while_training_stops_the_run_with_one_line_and_the_run_can_go_on(
    tmp_path, capsys, monkeypatch
):
    shades(tmp_path / "data", 8)

    class Remove(keras.callbacks.Callback):
        def on_train_begin(self, logs=None):
            for file in (tmp_path / "data").iterdir():
                file.unlink()

    arguments = folder_run(tmp_path, "--epochs=60")
    with monkeypatch.context() as patch:
        patch.setattr(callbacks, "StopOnNaN", Remove)
        assert main(arguments) == 1
    output = capsys.readouterr()
    lines = [line for line in (output.out + output.err).splitlines() if "Stopped" in line or ".png" in line]
    assert len(lines) == 1 and "data/" in lines[0] and "goes on from the last checkpoint" in lines[0], output
    shades(tmp_path / "data", 8)
    assert main([*arguments, "--max_steps=3"]) == 0


def flip_bits(data, rng, count=30):
    for _ in range(count):
        place = rng.randrange(len(data))
        data = data[:place] + bytes([rng.randrange(256)]) + data[place + 1 :]
    return data


def png_of(data):
    return tf.io.encode_png(tf.io.decode_jpeg(data)).numpy()


# Twenty ways to spoil an image: (JPEG bytes, random) -> (what the file holds then, the end of its name).
WAYS = {
    "cut": lambda d, r: (d[: r.randrange(1, len(d))], ".jpg"),
    "cut by a byte": lambda d, r: (d[:-1], ".jpg"),
    "cut after the header": lambda d, r: (d[: r.randrange(2, 30)], ".jpg"),
    "empty": lambda d, r: (b"", ".jpg"),
    "zeros": lambda d, r: (bytes(len(d)), ".jpg"),
    "a hole of zeros": lambda d, r: ((p := r.randrange(len(d))) and d[:p] + bytes(99) + d[p + 99 :], ".jpg"),
    "flipped bytes": lambda d, r: (flip_bits(d, r), ".jpg"),
    "one flipped byte": lambda d, r: (flip_bits(d, r, 1), ".jpg"),
    "bytes put in": lambda d, r: ((p := r.randrange(len(d))) and d[:p] + r.randbytes(9) + d[p:], ".jpg"),
    "bytes taken out": lambda d, r: ((p := r.randrange(len(d))) and d[:p] + d[p + 9 :], ".jpg"),
    "no beginning": lambda d, r: (d[r.randrange(1, 100) :], ".jpg"),
    "text": lambda d, r: (b"<html>404 Not Found</html>", ".jpg"),
    "noise": lambda d, r: (r.randbytes(len(d)), ".jpg"),
    "JPEG called PNG": lambda d, r: (d, ".png"),
    "PNG called JPEG": lambda d, r: (png_of(d), ".jpg"),
    "PNG cut": lambda d, r: ((p := png_of(d)) and p[: r.randrange(1, len(p))], ".png"),
    "PNG flipped": lambda d, r: (flip_bits(png_of(d), r, 3), ".png"),
    "bomb": lambda d, r: ((p := png_of(d)) and p[:16] + b"\0\1\0\0\0\1\0\0" + p[24:], ".png"),
    "a folder": lambda d, r: (None, ".jpg"),
    "two in one": lambda d, r: (d + d, ".jpg"),
}


def spoilt_folder(root, good, spoilt):
    """Embedded images as files, some of them spoilt. Returns the paths of the undecodable ones."""
    rng = random.Random(0)
    records = [
        record for split in ("train", "test") for record in sources.embedded(split).in_order().as_numpy_iterator()
    ]
    rng.shuffle(records)
    records = records[: good + spoilt]
    undecodable = set()
    for number, record in enumerate(records):
        folder = root / str(number % 7)
        folder.mkdir(parents=True, exist_ok=True)
        data, suffix = record["image"], ".jpg"
        if number < spoilt:
            data, suffix = WAYS[list(WAYS)[number % len(WAYS)]](data, rng)
        path = folder / f"{number:05d}{suffix}"
        if data is None:
            path.mkdir()
            continue
        path.write_bytes(data)
        if number < spoilt and not decodes(data):
            undecodable.add(f"{path.relative_to(root)}")
    return undecodable


def decodes(data):
    """The plainest decoding there is, and no image larger than memory."""
    if data[16:24] == b"\0\1\0\0\0\1\0\0":
        return False
    try:
        tf.io.decode_image(data, expand_animations=False)
    except tf.errors.OpError:
        return False
    return True


def check_spoilt_run(tmp_path, capsys, good, spoilt, steps, stop):
    undecodable = spoilt_folder(tmp_path / "data", good, spoilt)
    assert 0.3 * spoilt < len(undecodable) < 0.9 * spoilt
    data = [f"--dataset={tmp_path / 'data'}", "--train_split=train", "--max_bad_fraction=0.5"]
    common = [*data, f"--max_steps={steps}"]
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    assert main([*TINY, f"--run_dir={whole}", *common]) == 0
    assert f"{len(undecodable)} of " in capsys.readouterr().out
    named = re.findall(r"Undecodable image: (\S+) \(", (whole / "train.log").read_text())
    assert {name.removeprefix(f"{tmp_path}/data/") for name in named} == undecodable
    assert len(named) == len(undecodable)
    process = start(halves, *common, "--checkpoint_every=3")
    wait_for_step(process, halves, stop)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert main([*TINY, f"--run_dir={halves}", *common, "--checkpoint_every=3"]) == 0
    assert "Going on from step" in capsys.readouterr().out
    assert_same_run(whole, halves)


def test_a_folder_with_spoilt_images_trains_names_exactly_those_and_resumes_bit_for_bit(tmp_path, capsys):
    check_spoilt_run(tmp_path, capsys, good=300, spoilt=100, steps=8, stop=3)


@pytest.mark.slow
def test_two_thousand_spoilt_images_among_ten_thousand(tmp_path, capsys):
    check_spoilt_run(tmp_path, capsys, good=10_000, spoilt=2_000, steps=150, stop=60)
