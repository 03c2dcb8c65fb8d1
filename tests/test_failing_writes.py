"""A disk that is full, read-only or broken: one line, nothing whole is harmed, and the same command goes on.

The storms (tests/storms) fail each call of a run in turn; here is a failing write of each kind, and what it rests on.
"""

import contextlib
import csv
import errno
import logging
import os
import shutil
import sys
from pathlib import Path

import keras
import pytest
import tensorflow as tf

from moco_tf import command, files
from moco_tf.checkpoint import Checkpoints
from moco_tf.data import errors, sources
from moco_tf.serving import saved_model
from moco_tf.train import main

TIMES = ("images_per_second", "step_share", "data_wait")


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    for number, record in enumerate(sources.embedded("test").in_order(16).as_numpy_iterator()):
        (folder / f"{number:02}.jpg").write_bytes(record["image"])
    return folder


def start(images, run):
    """Two epochs of two steps of the storms' tiny model."""
    words = ["--pretext=tests.storms.tiny", "--image_size=8", "--batch_size=8", "--epochs=2", "--knn_every=0"]
    return main([*words, f"--dataset={images}", f"--run_dir={run}"])


@pytest.fixture(scope="module")
def whole(images, tmp_path_factory):
    run = tmp_path_factory.mktemp("whole") / "run"
    assert start(images, run) == 0
    return run


def full_for(name):
    """`os.replace` and `os.rename` of a disk that is full when a file or folder is to get this name."""

    def function(call):
        def fail(source, target):
            if Path(target).name == name:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return call(source, target)

        return fail

    return function(os.replace), function(os.rename)


def rows(run):
    with open(run / "metrics.csv", newline="") as file:
        return [{k: v for k, v in row.items() if k not in TIMES} for row in csv.DictReader(file)]


def last_checkpoint(run):
    reader = tf.train.load_checkpoint(run / "checkpoints/step-000000004/state")
    names = set(reader.get_variable_to_shape_map()) - {"_CHECKPOINTABLE_OBJECT_GRAPH"}  # layers' names, not numbers
    return {name: reader.get_tensor(name).tobytes() for name in names}


def test_wherever_a_full_disk_stops_a_run_there_is_a_line_and_the_same_command_goes_on(
    images, whole, tmp_path, monkeypatch, capsys
):
    run = tmp_path / "run"
    for name, saved in (
        ("train_images.csv", []),
        ("metrics.csv", []),
        ("step-000000004", ["step-000000002"]),
        ("encoder.keras", ["step-000000002", "step-000000004"]),
    ):
        with monkeypatch.context() as patch:
            replace, rename = full_for(name)
            patch.setattr(os, "replace", replace)
            patch.setattr(os, "rename", rename)
            assert start(images, run) == 1, name
        said = "".join(capsys.readouterr())
        (line,) = [line for line in said.splitlines() if "No space left on device" in line]
        assert ("Stopped at step" in line or "run the command again" in line) and "Traceback" not in said
        assert name in line or name.startswith("step-")
        assert sorted(path.name for path in run.glob("checkpoints/*")) == saved
        assert not list(run.glob(".writing-*"))
    assert start(images, run) == 0
    said = capsys.readouterr().out
    assert "is finished, at step 4 of 4" in said and f"Encoder: {run}/encoder.keras" in said and "Epoch" not in said
    assert last_checkpoint(run) == last_checkpoint(whole) and rows(run) == rows(whole)
    weights = [keras.models.load_model(folder / "encoder.keras").get_weights() for folder in (run, whole)]
    assert all((a == b).all() for a, b in zip(*weights, strict=True))


def test_a_finished_runs_encoder_is_written_anew_where_it_is_missing_or_older_than_its_checkpoint_alone(
    images, whole, capsys
):
    kept = whole / "encoder.keras"
    before = kept.stat().st_mtime_ns
    assert start(images, whole) == 0
    assert kept.stat().st_mtime_ns == before and "Encoder:" not in capsys.readouterr().out
    os.utime(kept, (0, 0))  # of an end of the run with fewer --epochs, say
    assert start(images, whole) == 0
    assert kept.stat().st_mtime_ns >= before and "Encoder:" in capsys.readouterr().out


def test_tensorboard_that_cannot_be_written_is_a_line(images, tmp_path, capsys):
    (tmp_path / "tensorboard").write_text("in its place")
    assert start(images, tmp_path) == 1
    said = "".join(capsys.readouterr())
    assert f"Stopped at step 0: {tmp_path}/tensorboard: File exists" in said.splitlines()[-1]
    assert "Traceback" not in said


def test_a_log_that_cannot_be_written_says_so_once_and_ends_nothing(tmp_path, capsys):
    for path in ("/dev/full", tmp_path / "no such folder/train.log"):
        log = command.log_to_screen()
        with command.log_to_file(path):
            log.info("first")
            log.info("second")
        said, noise = capsys.readouterr()
        assert noise == "" and sorted(said.splitlines())[1:] == ["first", "second"]
        assert f"{path}: " in said and said.count("and all goes on") == 1


def test_a_screen_that_cannot_be_written_ends_nothing(monkeypatch, capsys):
    log = command.log_to_screen()
    with contextlib.suppress(OSError), open("/dev/full", "w") as screen, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", screen)
        log.info("nobody sees this")
        log.info("nor this")
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    "error, line",
    [
        (OSError(errno.EMFILE, os.strerror(errno.EMFILE), "a\n.jpg"), r"a\n.jpg: Too many open files"),
        (OSError(errno.EROFS, os.strerror(errno.EROFS), b"a"), "a: Read-only file system"),
        (OSError(errno.EDQUOT, os.strerror(errno.EDQUOT)), "Disk quota exceeded"),
        (OSError("no number\nsecond line"), "no number"),
        (MemoryError(), "memory has run out"),
        (RuntimeError("can't start new thread"), "the machine, or a limit of this process, allows no more threads"),
    ],
)
def test_what_the_machine_refuses_is_a_line_of_every_command(capsys, error, line):
    def work(_):
        raise error

    assert command.run("moco_tf.command", "", work, []) == 1
    mended = "mend this and run the command again; files that were already written are complete"
    assert capsys.readouterr().err == f"moco_tf.command: {line}: {mended}\n"


def test_errors_of_the_program_keep_their_traceback():
    def work(_):
        raise RuntimeError("a fault")

    with pytest.raises(RuntimeError, match="a fault"):
        command.run("moco_tf.command", "", work, [])


@pytest.mark.parametrize(
    "message",
    [
        "{{node Save}} RUN/state.index; No space left on device [Op:SaveV2] name: ",
        "RUN/state.index; No space left on device\n\tFailed to flush 1 events\n\tFlushing first event. [Op:A] name: ",
    ],
)
def test_the_reason_of_a_write_that_failed_in_tensorflow_names_the_file_and_the_systems_word(message):
    said = errors.reason(tf.errors.ResourceExhaustedError(None, None, message))
    assert said == "RUN/state.index: No space left on device"


def test_a_failing_file_of_an_export_is_an_error_of_the_system_that_names_it(tmp_path):
    for error in (
        tf.errors.UnknownError(None, None, "a; Input/output error"),
        OSError(errno.EIO, "Input/output error"),
    ):
        with (
            pytest.raises(OSError, match=r"a: Input/output error|Input/output error: .*encoder/1"),
            saved_model.aside(tmp_path / "encoder/1") as folder,
        ):
            folder.mkdir()
            raise error
        assert list((tmp_path / "encoder").iterdir()) == []


@pytest.fixture
def disk(monkeypatch):
    """What is done to the disk, in its order: ("sync" or "rename", name)."""
    done = []
    sync, rename = os.fsync, os.rename

    def fsync(descriptor):
        done.append(("sync", os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}"))))
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "rename", lambda a, b: done.append(("rename", os.path.basename(b))) or rename(a, b))
    return done


def checkpoints(folder):
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(2)])
    model.optimizer, model.steps_done = keras.optimizers.SGD(), 1
    return Checkpoints(folder, model)


def test_a_checkpoint_is_on_disk_before_it_has_its_name_and_its_folder_before_it_is_reported(tmp_path, disk):
    saved = checkpoints(tmp_path / "run/checkpoints").save()
    names = sorted(("sync", path.name) for path in saved.iterdir())
    assert disk[:2] == [("sync", "run"), ("sync", tmp_path.name)]  # the folders that are new are there, too
    assert sorted(disk[2:4]) == names and len(names) == 2
    assert disk[4:] == [("sync", f"aside-{saved.name}"), ("rename", saved.name), ("sync", "checkpoints")]


def test_an_old_checkpoint_has_lost_its_name_on_disk_before_its_files_go(tmp_path, disk, monkeypatch):
    kept = checkpoints(tmp_path)
    kept.keep, rmtree = 1, shutil.rmtree
    kept.save()
    kept.model.steps_done = 2
    monkeypatch.setattr(shutil, "rmtree", lambda path: disk.append(("remove", path.name)) or rmtree(path))
    kept.save()
    assert disk[-3:] == [("rename", "aside-1"), ("sync", tmp_path.name), ("remove", "aside-1")]


def test_parts_that_tensorflow_could_not_remove_are_not_in_the_checkpoint(tmp_path, monkeypatch):
    kept, write = checkpoints(tmp_path), tf.train.Checkpoint.write

    def write_and_leave(checkpoint, path):
        written = write(checkpoint, path)
        (Path(os.fsdecode(path)).parent / "state_temp").mkdir()
        return written

    monkeypatch.setattr(tf.train.Checkpoint, "write", write_and_leave)
    assert sorted(path.name for path in kept.save().iterdir()) == ["state.data-00000-of-00001", "state.index"]


@pytest.mark.parametrize("fails", ["rename", "remove"])
def test_what_a_stop_in_the_last_save_has_left_is_removed_when_the_finished_run_is_started_again(
    tmp_path, monkeypatch, fails
):
    kept = checkpoints(tmp_path)
    kept.keep = 1
    kept.save()
    kept.model.steps_done = 2

    def fail(path, *_):
        raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))

    rename = os.rename
    with monkeypatch.context() as failing:
        if fails == "rename":
            failing.setattr(os, "rename", lambda a, b: fail(a) if Path(b).name == "aside-1" else rename(a, b))
        else:
            failing.setattr(shutil, "rmtree", fail)
        with pytest.raises(OSError, match="Input/output error"):
            kept.save()
    assert len(list(tmp_path.iterdir())) == 2
    kept.tidy()
    assert [path.name for path in tmp_path.iterdir()] == ["step-000000002"]


def test_a_checkpoint_that_cannot_be_written_leaves_nothing_and_the_one_before_whole(tmp_path, monkeypatch):
    kept = checkpoints(tmp_path)
    before = {path.name: path.read_bytes() for path in kept.save().iterdir()}
    kept.model.steps_done = 2

    def fail(_):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="Input/output error"):
        kept.save()
    assert [path.name for path in tmp_path.iterdir()] == ["step-000000001"]
    assert {path.name: path.read_bytes() for path in kept.path(1).iterdir()} == before


def test_a_write_that_fails_names_the_file_and_not_what_it_is_written_to(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError) as error:
        files.write_text(tmp_path / "a.csv", "text")
    assert files.fault(error.value) == f"{tmp_path}/a.csv: No space left on device"
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(FileNotFoundError) as error, files.aside(tmp_path / "a.csv"):
        (tmp_path / "of another file").read_text()
    assert files.fault(error.value) == f"{tmp_path}/of another file: No such file or directory"


@pytest.fixture(autouse=True)
def _screen_of_its_own():
    yield
    logging.getLogger("moco_tf").handlers.clear()
