"""Run folders in which something was cut off, copied or emptied: what can go on does, what cannot says so."""

import shutil

import numpy as np
import pytest

from moco_tf import build, run_folder
from moco_tf.command import ConfigError
from moco_tf.train import main

TINY = ["--dataset=embedded", "--train_split=test", "--arch=resnet10", "--width=4", "--image_size=32", "--dim=8",
        "--augment=cifar", "--batch_size=400", "--queue_size=32", "--knn_every=0", "--epochs=3"]  # fmt: skip


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    assert main([*TINY, f"--run_dir={folder}"]) == 0
    return folder


@pytest.fixture
def run(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / "run")


def state(run, step):
    return run / f"checkpoints/step-{step:09d}/state.data-00000-of-00001"


def cut(path, left=1000):
    path.write_bytes(path.read_bytes()[:left])


def weights(run):
    return build.trained(run).get_weights()


def test_a_damaged_checkpoint_is_put_aside_and_the_run_goes_on_from_the_one_before(whole, run, capsys):
    cut(state(run, 15))
    assert main([*TINY, f"--run_dir={run}"]) == 0
    said = capsys.readouterr().out
    assert "step-000000015 cannot be read" in said and "the checkpoint before it is taken, step 10" in said
    assert "Going on from step 10 of 15" in said
    assert all(map(np.array_equal, weights(run), weights(whole)))
    kept = run / "checkpoints/damaged-step-000000015/state.data-00000-of-00001"
    assert kept.stat().st_size == 1000
    assert [r["step"] for r in run_folder.rows(run)] == ["5", "10", "15"]


def test_evaluation_takes_the_one_before_and_changes_nothing(run, capsys):
    cut(state(run, 15))
    assert build.trained(run).steps_done == 10
    assert state(run, 15).stat().st_size == 1000


def test_where_none_can_be_read_nothing_is_begun_anew(run, capsys):
    for step in (5, 10, 15):
        cut(state(run, step))
    assert main([*TINY, f"--run_dir={run}"]) == 2
    error = capsys.readouterr().err
    assert "step-000000015 cannot be read" in error and "nor can one before it" in error and error.count("\n") == 1


def test_what_else_lies_beside_checkpoints_stops_nothing_and_stays(whole, run):
    names = ("step-1.bak", "step-000000015 (copy)", "step-", "step-000000015.tar", "step-0000000040")
    for name in names:
        shutil.copytree(run / "checkpoints/step-000000005", run / "checkpoints" / name)
    (run / "checkpoints/step-000000001").write_text("a file")
    (run / "checkpoints/aside-notes").write_text("a file")
    (run / "checkpoints/step-000000099").symlink_to(whole / "checkpoints/step-000000005")
    assert build.trained(run).steps_done == 15
    shutil.rmtree(run / "checkpoints/step-000000015")
    (run / "checkpoints/step-000000015").write_text("in the way")
    (run / "checkpoints/aside-step-000000015").mkdir()  # a killed process left it
    assert main([*TINY, f"--run_dir={run}"]) == 0
    assert all(map(np.array_equal, weights(run), weights(whole)))
    there = {path.name for path in (run / "checkpoints").iterdir()}
    steps = {f"step-{step:09d}" for step in (5, 10, 15, 1, 99)}
    assert there == {*names, *steps, "aside-notes", "damaged-step-000000015"}
    assert len(list((whole / "checkpoints").iterdir())) == 3


def test_the_checkpoint_of_another_model_is_named(run, capsys):
    flags = run / "config.flags"
    flags.write_text(flags.read_text().replace("--width=4", "--width=8"))
    assert main([*TINY, "--width=8", f"--run_dir={run}"]) == 2
    error = capsys.readouterr().err
    assert "is the checkpoint of another model" in error and error.count("\n") == 1


def test_a_row_that_was_cut_off_is_left_out_and_written_again(whole, run, capsys):
    file = run / "metrics.csv"
    cut(file, file.stat().st_size - 20)
    shutil.rmtree(run / "checkpoints/step-000000015")
    assert main([*TINY, f"--run_dir={run}"]) == 0
    assert "ends in the middle of a line" in capsys.readouterr().out
    for mine, its in zip(run_folder.rows(run), run_folder.rows(whole), strict=True):
        assert mine["loss"] == its["loss"] and mine["step"] == its["step"]


@pytest.mark.parametrize("content", ["", "{", "[]", '{"images": ', "[" * 100_000], ids=lambda content: content[:9])
def test_data_that_says_nothing_is_named(run, capsys, content):
    (run / "data.json").write_text(content)
    assert main([*TINY, f"--run_dir={run}"]) == 2
    error = capsys.readouterr().err
    assert "data.json does not say how many images" in error and error.count("\n") == 1


@pytest.mark.parametrize("content", ["", "\n", "# --width=4\n"])
def test_empty_flags_are_not_the_defaults(run, capsys, content):
    (run / "config.flags").write_text(content)
    assert main([*TINY, f"--run_dir={run}"]) == 2
    error = capsys.readouterr().err
    assert "config.flags is empty" in error and error.count("\n") == 1


def test_flags_that_cannot_be_read_are_named(run, capsys):
    (run / "config.flags").unlink()
    (run / "config.flags").mkdir()
    assert main([*TINY, f"--run_dir={run}"]) == 2
    error = capsys.readouterr().err
    assert "config.flags cannot be read: Is a directory" in error and error.count("\n") == 1


def test_a_lock_that_is_a_link_is_not_followed_and_what_it_leads_to_stays(run, tmp_path, capsys):
    (tmp_path / "precious").write_text("kept")
    (run / ".lock").unlink()
    (run / ".lock").symlink_to(tmp_path / "precious")
    assert main([*TINY, f"--run_dir={run}"]) == 2
    assert "Too many levels of symbolic links" in capsys.readouterr().err
    assert (tmp_path / "precious").read_text() == "kept"
    (run / ".lock").unlink()
    (run / ".lock").write_text("kept")
    assert main([*TINY, f"--run_dir={run}"]) == 0 and (run / ".lock").read_text() == "kept"


@pytest.mark.parametrize("line", [b"\0" * 40, b"3,15,\xff\xfe,,,,,,,,", b"3,15", b"3,x" + b"," * 20])
def test_rows_that_are_no_numbers_are_left_out_and_said(whole, tmp_path, caplog, line):
    (tmp_path / "metrics.csv").write_bytes((whole / "metrics.csv").read_bytes() + line + b"\n")
    assert run_folder.rows(tmp_path) == run_folder.rows(whole)
    assert "lines that are not rows of numbers (1)" in caplog.text


@pytest.mark.parametrize("content", ["", "{", "[1]", "\0", "[" * 100_000])
def test_a_damaged_json_file_is_named(run, content):
    (run / "baselines.json").write_text(content)
    with pytest.raises(ConfigError, match=r"baselines.json cannot be used, it"):
        run_folder.baselines(run)


@pytest.mark.parametrize("name", ["checkpoints", "tensorboard"])
def test_a_folder_of_a_run_that_is_a_link_into_another_run_is_refused(whole, run, capsys, name):
    shutil.rmtree(run / name)
    (run / name).symlink_to(whole / name)
    before = sorted((whole / name).rglob("*"))
    assert main([*TINY, "--epochs=4", f"--run_dir={run}"]) == 2
    assert f"{name} is a link: put the folder itself there" in capsys.readouterr().err
    assert sorted((whole / name).rglob("*")) == before


def test_a_log_that_is_a_link_is_not_followed(run, tmp_path, capsys):
    (tmp_path / "precious").write_text("kept")
    (run / "train.log").unlink()
    (run / "train.log").symlink_to(tmp_path / "precious")
    assert main([*TINY, f"--run_dir={run}"]) == 0
    assert "train.log: Too many levels of symbolic links; it lacks lines" in capsys.readouterr().out
    assert (tmp_path / "precious").read_text() == "kept"
