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
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import keras
import numpy as np
import pytest
import tensorflow as tf
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from moco_tf import build, callbacks
from moco_tf.command import ConfigError
from moco_tf.data import sources
from moco_tf.train import calls_of_fit, main

REPOSITORY = Path(__file__).parent.parent
STEPS = 10  # an epoch of 200 images in batches of 20
DATA = Path(tempfile.gettempdir(), f"moco_tf-images-of-{os.getpid()}")  # known before any fixture is
TIMES = ("images_per_second", "step_share", "data_wait")
TINY = [
    "--arch=resnet10",
    "--width=4",
    "--stem=imagenet",
    "--image_size=32",
    "--augment=cifar",
    f"--dataset={DATA}",
    "--batch_size=20",
    "--queue_size=28",
    "--bn_groups=4",
    "--lr_per=step",
    "--epochs=2",
    "--head=linear",
    "--dim=16",
    "--momentum=0.9",
    "--knn_every=0",
]


@pytest.fixture(scope="module", autouse=True)
def images():
    """A folder of the first embedded images: few, for they are most of what a step of so small a network costs."""
    DATA.mkdir()
    for number, record in enumerate(sources.embedded("test").in_order(20 * STEPS).as_numpy_iterator()):
        (DATA / f"{number:03d}.jpg").write_bytes(record["image"])
    yield
    shutil.rmtree(DATA)


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
        [
            {k: v for k, v in row.items() if k not in ("images_per_second", "step_share", "data_wait")}
            for row in rows(run)
        ]
        for run in (a, b)
    ]
    assert timeless[0] == timeless[1]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("undisturbed")
    assert main([*TINY, f"--run_dir={run_dir}", "--checkpoint_every=7"]) == 0
    return run_dir


def run_and_kill(run_dir, kills, *flags):
    """A run that is killed so many times, and then ended in this process."""
    seed = os.environ.get("KILL_SEED", str(time.time_ns()))
    print(f"KILL_SEED={seed}")  # shown on failure: repeats the moments
    moments = random.Random(seed)
    for step in sorted(moments.sample(range(3, STEPS), kills)):  # long before the end, which comes soon
        process = start(run_dir, "--checkpoint_every=3", *flags)
        wait_for_step(process, run_dir, step - step % 3)
        time.sleep(moments.uniform(0, 0.1))
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert main([*TINY, f"--run_dir={run_dir}", "--checkpoint_every=3", *flags]) == 0
    assert "Going on from step" in (Path(run_dir) / "train.log").read_text()


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
    assert main([*TINY, f"--run_dir={tmp_path / 'whole'}", "--checkpoint_every=7", *flags]) == 0
    run_and_kill(tmp_path / "killed", 1, *flags)
    assert_same_run(tmp_path / "whole", tmp_path / "killed")


class SignalAt(keras.callbacks.Callback):
    """Sends this process a signal after one step."""

    def __init__(self, number, step):
        super().__init__()
        self.number = number
        self.step = step

    def on_train_batch_end(self, batch, logs=None):
        if int(self.model.step) == self.step:
            os.kill(os.getpid(), self.number)


@pytest.fixture(scope="module")
def signalled(tmp_path_factory):
    """A run that a signal stops amid an epoch and another in its last step; its folder, and its copies after each.

    It goes on after the first by the command that it has printed.
    """
    run_dir = tmp_path_factory.mktemp("signalled") / "run"
    copies, arguments = [], [*TINY, f"--run_dir={run_dir}"]
    for number, step in ((signal.SIGTERM, 3), (signal.SIGINT, STEPS)):
        with pytest.MonkeyPatch.context() as patch:
            stop = SignalAt(number, step)
            patch.setattr(callbacks, "StopOnNaN", lambda stop=stop: stop)  # the first callback of each fit
            assert main(arguments) == 128 + number
        copies.append(run_dir.with_name(f"after_{step}"))
        shutil.copytree(run_dir, copies[-1])
        last_line = (run_dir / "train.log").read_text().splitlines()[-1]
        arguments = last_line.partition("Go on with: python -m moco_tf.train ")[2].split()
    assert main(arguments) == 0
    return run_dir, *copies


def test_a_signal_saves_and_says_how_to_go_on(undisturbed, signalled):
    run_dir, stopped, _ = signalled
    assert last_checkpoint(stopped) == 3
    assert f"--flagfile={run_dir}/config.flags --run_dir={run_dir}" in (stopped / "train.log").read_text()
    assert "Going on from step 3" in (run_dir / "train.log").read_text()
    assert_same_run(undisturbed, run_dir)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_from_another_process_does_so_too(undisturbed, tmp_path, number):
    process = start(tmp_path, "--checkpoint_every=2")
    wait_for_step(process, tmp_path, 2)
    process.send_signal(number)
    output = process.communicate()[0]
    assert process.returncode == 128 + number
    arguments = output.splitlines()[-1].partition("Go on with: python -m moco_tf.train ")[2].split()
    assert main(arguments) == 0
    assert_same_run(undisturbed, tmp_path)


def test_a_signal_in_an_epochs_last_step_loses_no_row(undisturbed, signalled):
    run_dir, _, stopped = signalled
    assert last_checkpoint(stopped) == STEPS
    assert [r["step"] for r in rows(stopped)] == [str(STEPS)]
    assert_same_run(undisturbed, run_dir)


def test_a_run_folder_holds_what_the_contract_says(undisturbed):
    assert [r["epoch"] for r in rows(undisturbed)] == ["1", "2"]
    assert list(rows(undisturbed)[0]) == [
        *("epoch", "step", "loss"),
        *("contrast_top1", "positive_similarity", "negative_similarity", "feature_std", "learning_rate", "momentum"),
        *("images_per_second", "step_share", "data_wait", "knn_top1"),
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


def test_a_finished_run_says_so_and_removes_what_a_stop_in_its_last_save_has_left(undisturbed, capsys):
    left = undisturbed / "checkpoints/aside-2"
    left.mkdir()
    assert main([*TINY, f"--run_dir={undisturbed}"]) == 0
    assert f"{undisturbed} is finished, at step {2 * STEPS} of {2 * STEPS}" in capsys.readouterr().out
    assert not left.exists()


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--lr=0.5", "--seed=4"], "other --lr (there 0.03, here 0.5), --seed (there 0, here 4)"),
        (["--noresume"], "--noresume starts a new run, but"),
        (["--max_bad_fraction=1.5"], "--max_bad_fraction lies between 0 and 1; got 1.5"),
        (["--dataset=/no/such/folder"], "/no/such/folder"),
        (["--dataset=embedded", "--train_split=other"], "'other'"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line_with_status_2(undisturbed, capsys, arguments, message):
    before = {p: p.stat().st_mtime_ns for p in undisturbed.rglob("*") if p.name != ".lock"}
    assert main([*TINY, f"--run_dir={undisturbed}", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert before == {p: p.stat().st_mtime_ns for p in undisturbed.rglob("*") if p.name != ".lock"}


def test_fewer_images_than_a_batch_are_refused(tmp_path, capsys):
    assert main([*TINY, f"--run_dir={tmp_path}", "--batch_size=20000"]) == 2
    error = capsys.readouterr().err
    assert "200 images are fewer than --batch_size=20000" in error and error.count("\n") == 1


def test_a_folder_in_use_is_refused(tmp_path, capsys):
    holds = (  # as training does from its beginning to its end
        "import sys; from moco_tf import config, run_folder\n"
        "with run_folder.RunFolder(config.parse(sys.argv[1:])): print('held', flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", holds, *TINY, f"--run_dir={tmp_path}"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, cwd=REPOSITORY, **pipes) as process:
        assert process.stdout.readline() == "held\n"
        assert main([*TINY, f"--run_dir={tmp_path}"]) == 2
        process.stdin.close()
    assert "another process is training in" in capsys.readouterr().err


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
    assert [row["step"] for row in rows(tmp_path / "one")] == [str(STEPS), str(2 * STEPS)]
    x, y = tensors(undisturbed), tensors(tmp_path / "other")
    assert not [name for name in x if not np.array_equal(x[name], y[name])]
    logs = {name: (tmp_path / name / "train.log").read_text() for name in ("one", "other")}
    assert {name: text.count(f"Done: step {2 * STEPS} of {2 * STEPS}") for name, text in logs.items()} == {
        "one": 1,
        "other": 1,
    }
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


def test_a_row_whose_checkpoint_was_not_written_is_written_once(undisturbed, without_its_last_checkpoint):
    written = [("1", str(STEPS)), ("2", str(2 * STEPS))]
    assert [(r["epoch"], r["step"]) for r in rows(without_its_last_checkpoint)] == written
    assert main([*TINY, f"--run_dir={without_its_last_checkpoint}"]) == 0
    assert [(r["epoch"], r["step"]) for r in rows(without_its_last_checkpoint)] == written
    assert_same_run(undisturbed, without_its_last_checkpoint)


def halved(folder, arguments, at=2, steps=4):
    """A run of so many steps and a copy of it that will go on from the one `at`; their folders."""
    whole, halves = folder / "whole", folder / "halves"
    assert main([*arguments, f"--run_dir={whole}", f"--max_steps={steps}", f"--checkpoint_every={at}"]) == 0
    shutil.copytree(whole, halves)
    for step in range(at + 1, steps + 1):  # as if killed before it was there
        shutil.rmtree(halves / f"checkpoints/step-{step:09d}", ignore_errors=True)
    assert last_checkpoint(halves) == at
    return whole, halves


def assert_a_run_goes_on(folder, arguments, at=2, steps=4):
    """A run that is stopped after a step and started again ends as an undisturbed one does; returns its folder."""
    whole, halves = halved(folder, arguments, at, steps)
    assert main([*arguments, f"--run_dir={halves}", f"--max_steps={steps}"]) == 0
    assert_same_run(whole, halves)
    return whole


@pytest.fixture(scope="module")
def banks(tmp_path_factory):
    """Such runs of a memory bank; the second goes on where there are more images in the meantime."""
    folder = tmp_path_factory.mktemp("banks")
    shades(folder / "data", 32)
    arguments = folder_run(folder, "--method=memory_bank", "--loss=nce", "--queue_size=4")
    whole, halves = halved(folder, arguments)
    shades(folder / "data", 40)
    assert main([*arguments, f"--run_dir={halves}", "--max_steps=4"]) == 0
    return whole, halves, arguments


def assert_went_on(whole, halves):
    assert "Going on from step 2 of 4." in (halves / "train.log").read_text()
    x, y = tensors(whole), tensors(halves)
    assert x.keys() == y.keys() and len(x) > 40
    assert not [name for name in x if not np.array_equal(x[name], y[name])]
    assert [row["loss"] for row in rows(whole)] == [row["loss"] for row in rows(halves)]
    assert "momentum" not in rows(whole)[0]  # which they have not
    assert build.trained(halves).steps_done == 4  # a bank of as many records as the run had


def test_other_methods_go_on_bit_for_bit_too(banks):
    assert_went_on(*banks[:2])


@pytest.mark.slow
def test_other_methods_go_on_bit_for_bit_too_end_to_end(tmp_path):
    arguments = [*TINY, "--method=end_to_end", "--shared=none"]
    whole, halves = halved(tmp_path, arguments)
    assert main([*arguments, f"--run_dir={halves}", "--max_steps=4"]) == 0
    assert_went_on(whole, halves)


def test_a_bank_is_refused_where_it_does_not_fit(tmp_path, capsys, monkeypatch):
    arguments = [*TINY, "--method=memory_bank", f"--run_dir={tmp_path}", "--dataset=embedded", "--train_split=test"]
    assert main([*arguments, "--queue_size=1981"]) == 2
    assert "at most 1980 of 2000 with --batch_size=20; got 1981" in capsys.readouterr().err
    monkeypatch.setattr(os, "sysconf", lambda name: 200 if name == "SC_PHYS_PAGES" else 4096)
    assert main([*arguments, "--dim=128"]) == 2
    error = capsys.readouterr().err
    assert (
        "128 numbers for each of 2000 images, in all 0.00102 GB, more than a third of this machine's 0.000819 GB"
        in error
    )
    assert error.count("\n") == 1 and not (tmp_path / "config.flags").exists()


def test_a_bank_goes_on_with_the_images_that_it_began_with(banks, tmp_path, capsys):
    _, halves, arguments = banks
    assert "8 images came into" in (halves / "train.log").read_text()  # and were left out
    shutil.copytree(halves, tmp_path / "run")
    (tmp_path / "run/data.json").write_text('{"images": 33}')
    assert main([*arguments, f"--run_dir={tmp_path / 'run'}", "--max_steps=5"]) == 2
    assert "had 33, --dataset has 32" in capsys.readouterr().err


def shades(folder, count):
    """Writes small images of different shades."""
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        image = np.full((36, 48, 3), 6 * i, "uint8")
        (folder / f"{i:02d}.png").write_bytes(tf.io.encode_png(image).numpy())


def folder_run(tmp_path, *arguments):
    data = [f"--dataset={tmp_path / 'data'}", "--train_split=train"]
    return [*TINY, "--batch_size=8", f"--run_dir={tmp_path / 'run'}", *data, *arguments]


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    """A run that stands at its first step, of two an epoch, on a folder of 16 images."""
    folder = tmp_path_factory.mktemp("begun")
    shades(folder / "data", 16)
    assert main(folder_run(folder, "--max_steps=1")) == 0
    return folder


@contextlib.contextmanager
def going_on(begun, run_dir):
    """The arguments that go on with a copy of that run by two steps; the folder is then as it was."""
    shutil.copytree(begun / "run", run_dir)
    yield [*folder_run(begun), f"--run_dir={run_dir}", "--max_steps=3"]
    shutil.rmtree(begun / "data")
    shades(begun / "data", 16)


@pytest.fixture(scope="module")
def with_more_images(begun, tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("with_more_images") / "run"
    with going_on(begun, run_dir) as arguments:
        shades(begun / "data", 17)
        assert main(arguments) == 0
    return run_dir


def test_max_steps_ends_with_a_checkpoint_and_a_row_and_the_run_can_go_on(begun, with_more_images):
    assert last_checkpoint(begun / "run") == 1
    assert [(r["epoch"], r["step"]) for r in rows(begun / "run")] == [("1", "1")]
    assert last_checkpoint(with_more_images) == 3
    assert [(r["epoch"], r["step"]) for r in rows(with_more_images)] == [("1", "2"), ("2", "3")]


def test_images_that_come_during_a_run_are_left_out_until_another(with_more_images):
    assert "1 images came into" in (with_more_images / "train.log").read_text()
    assert last_checkpoint(with_more_images) == 3


def test_images_that_go_during_a_run_are_replaced_or_too_many_of_them_refused(begun, tmp_path, capsys):
    with going_on(begun, tmp_path / "run") as arguments:
        (begun / "data/03.png").unlink()
        assert main(arguments) == 2
        assert main([*arguments, "--max_bad_fraction=0.2"]) == 0
    output = capsys.readouterr()
    assert "--max_bad_fraction=0.05 of the images may be undecodable; 1 of 16 are: 03.png" in output.err
    assert "1 of 16 images in" in output.out
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


def check_spoilt_run(tmp_path, capsys, good, spoilt, steps):
    """Trains on such a folder, in one go; returns that run and its flags."""
    undecodable = spoilt_folder(tmp_path / "data", good, spoilt)
    assert 0.3 * spoilt < len(undecodable) < 0.9 * spoilt
    data = [f"--dataset={tmp_path / 'data'}", "--train_split=train", "--max_bad_fraction=0.5"]
    flags = [*data, f"--max_steps={steps}", "--checkpoint_every=3"]
    whole = tmp_path / "whole"
    assert main([*TINY, f"--run_dir={whole}", *flags]) == 0
    assert f"{len(undecodable)} of " in capsys.readouterr().out
    named = re.findall(r"Undecodable image: (\S+) \(", (whole / "train.log").read_text())
    assert {name.removeprefix(f"{tmp_path}/data/") for name in named} == undecodable
    assert len(named) == len(undecodable)
    return whole, flags


def test_a_folder_with_spoilt_images_trains_names_exactly_those_and_resumes_bit_for_bit(tmp_path, capsys):
    whole, flags = check_spoilt_run(tmp_path, capsys, good=300, spoilt=100, steps=8)
    halves = tmp_path / "halves"
    shutil.copytree(whole, halves)
    shutil.rmtree(halves / "checkpoints/step-000000008")  # as if killed before it was there
    assert main([*TINY, f"--run_dir={halves}", *flags]) == 0
    assert "Going on from step 6 of 8" in capsys.readouterr().out
    assert_same_run(whole, halves)


@pytest.mark.slow
def test_two_thousand_spoilt_images_among_ten_thousand(tmp_path, capsys):
    whole, flags = check_spoilt_run(tmp_path, capsys, good=10_000, spoilt=2_000, steps=150)
    halves = tmp_path / "halves"
    process = start(halves, *flags)
    wait_for_step(process, halves, 60)
    process.kill()
    process.wait()
    assert main([*TINY, f"--run_dir={halves}", *flags]) == 0
    assert "Going on from step" in capsys.readouterr().out
    assert_same_run(whole, halves)


@pytest.mark.parametrize("step", range(0, 23))
def test_calls_of_fit_cover_each_step_once_and_none_crosses_a_change_of_size_or_a_part_of_an_epoch(step):
    config = SimpleNamespace(size_at=lambda epoch: 16 if epoch < 2 else 32)
    covered = []
    for first, epochs, steps in calls_of_fit(config, step, 23, steps_per_epoch=5):
        assert first == step + len(covered)
        touched = {(first + number) // 5 for number in range(epochs * steps)}
        assert len(touched) == epochs and len({config.size_at(epoch) for epoch in touched}) == 1
        covered += range(first, first + epochs * steps)
    assert covered == list(range(step, 23))
