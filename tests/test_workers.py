"""Several processes that train together over loopback, as machines would: `--strategy=multiworker` by TF_CONFIG."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tensorflow as tf
from test_train import STEPS, TINY, assert_same_run, images, last_checkpoint, rows  # noqa: F401 - images is a fixture

from moco_tf import build, train
from moco_tf.data.errors import reason

REPOSITORY = Path(__file__).parent.parent
TINY = [*TINY, "--views_on=device"]  # the shares of pipelines that go record by record: tests/test_views.py


def start(run_dir, *arguments, workers=2, other_run_dir=None):
    """Starts the workers; the first is the chief, the others have another run folder if so asked."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(workers)]
    addresses = [f"127.0.0.1:{s.getsockname()[1]}" for s in sockets]
    for s in sockets:
        s.close()
    return [
        subprocess.Popen(
            [
                *(sys.executable, "-m", "moco_tf.train", *TINY),
                f"--run_dir={other_run_dir if i and other_run_dir else run_dir}",
                *arguments,
            ],
            cwd=REPOSITORY,
            env=os.environ
            | {"TF_CONFIG": json.dumps({"cluster": {"worker": addresses}, "task": {"type": "worker", "index": i}})},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for i in range(workers)
    ]


def finish(processes):
    """Waits for all; returns what they printed."""
    outputs = [process.communicate()[0] for process in processes]
    assert [process.returncode for process in processes] == [0] * len(processes), outputs
    return outputs


def on_replicas(run_dir, replicas, *arguments):
    """Trains in this process, whose CPU is divided in four already."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "load_tensorflow", lambda *_, **__: None)
        assert (
            train.main([*TINY, f"--run_dir={run_dir}", "--epochs=1", f"--virtual_replicas={replicas}", *arguments])
            == 0
        )


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """A run on two replicas of one machine, which two machines are compared with: their start costs the most."""
    run_dir = tmp_path_factory.mktemp("two_replicas")
    on_replicas(run_dir, 2, "--checkpoint_every=3")
    return run_dir


def killed(run_dir, victim):
    """A run on two machines, one of which is killed after its second step; how the other ends."""
    processes = start(run_dir, "--epochs=1", "--checkpoint_every=1")
    while last_checkpoint(run_dir) < 2:  # of 10 steps
        assert processes[0].poll() is None, processes[0].stdout.read()
        time.sleep(0.02)
    processes[victim].send_signal(signal.SIGKILL)
    at = time.monotonic()
    output = processes[1 - victim].communicate()[0]
    assert processes[1 - victim].returncode == 1
    assert "another machine no longer answers" in output.splitlines()[-1]
    assert "start all again, they go on from the last checkpoint" in output.splitlines()[-1]
    assert time.monotonic() - at < 60  # docs/scaling.md states it
    processes[victim].communicate()


@pytest.mark.slow
def test_after_a_killed_worker_the_others_stop_and_as_many_replicas_go_on_bit_for_bit(undisturbed, tmp_path):
    killed(tmp_path, victim=1)
    assert "on 2 replicas" in (tmp_path / "train.log").read_text()
    on_replicas(tmp_path, 2, "--checkpoint_every=3")
    assert "Going on from step" in (tmp_path / "train.log").read_text()
    assert_same_run(undisturbed, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_after_a_killed_worker_all_go_on_bit_for_bit(undisturbed, tmp_path, victim):
    killed(tmp_path, victim)
    chief, other = finish(start(tmp_path, "--epochs=1", "--checkpoint_every=3"))
    assert "Going on from step" in chief and f"Epoch 1/1, step {STEPS}" in chief
    assert "This machine trains along." in other and "Epoch" not in other
    assert_same_run(undisturbed, tmp_path)


def test_the_reason_for_a_stop_is_what_the_collectives_say_and_not_their_advice():
    message = (
        "Collective ops is aborted by: Connection reset by peer\n"
        "The error could be from a previous operation. Restart your program to reset."
    )
    error = tf.errors.UnavailableError(None, None, message)
    assert reason(error) == "Collective ops is aborted by: Connection reset by peer"


def test_a_machine_that_is_gone_before_the_first_step_is_a_line_too(tmp_path, monkeypatch, capsys):
    message = "Collective ops is aborted by: Error reported from task 1\nThe error could be from a previous operation."
    error = tf.errors.UnavailableError(None, None, message)

    def broadcast(config):
        raise error

    monkeypatch.setattr(build, "strategy", broadcast)
    assert train.main(["--dataset=embedded", f"--run_dir={tmp_path / 'run'}"]) == 1
    printed = capsys.readouterr()
    assert (printed.out + printed.err).splitlines()[-1] == (
        "Stopped before the first step: Collective ops is aborted by: Error reported from task 1; another machine no "
        "longer answers: start all again, they go on from the last checkpoint."
    )


def test_machines_that_do_not_share_the_run_folder_are_refused(undisturbed, tmp_path):
    for process in start(tmp_path, "--epochs=2", other_run_dir=undisturbed):
        output = process.communicate()[0]
        assert process.returncode == 2
        assert f"step 0 with 200, step {STEPS} with 200: put --run_dir and --dataset on storage that" in output


def test_an_interrupted_run_on_replicas_ends_like_an_undisturbed_one(undisturbed, tmp_path):
    shutil.copytree(undisturbed, tmp_path / "run")
    shutil.rmtree(tmp_path / f"run/checkpoints/step-{STEPS:09d}")  # as if killed before it was there
    on_replicas(tmp_path / "run", 2)
    assert f"Going on from step 9 of {STEPS}" in (tmp_path / "run/train.log").read_text()
    assert_same_run(undisturbed, tmp_path / "run")


@pytest.mark.slow
def test_an_undisturbed_run_on_machines_ends_like_one_on_as_many_replicas(undisturbed, tmp_path):
    finish(start(tmp_path, "--epochs=1"))
    assert_same_run(undisturbed, tmp_path)


@pytest.mark.slow
def test_a_run_goes_on_with_another_number_of_workers(undisturbed, tmp_path):
    finish(start(tmp_path, "--epochs=1", "--max_steps=3"))
    on_replicas(tmp_path, 0, "--max_steps=6")
    on_replicas(tmp_path, 4)
    (expected,), (row,) = rows(undisturbed), rows(tmp_path)
    assert float(row["loss"]) == pytest.approx(float(expected["loss"]), abs=1e-3)


@pytest.mark.parametrize("environment, message", [(None, "which is not set"), ("{", "TF_CONFIG does not describe")])
def test_multiworker_without_its_environment_is_refused_in_one_line(
    environment, message, tmp_path, monkeypatch, capsys
):
    monkeypatch.delenv("TF_CONFIG", raising=False)
    if environment:
        monkeypatch.setenv("TF_CONFIG", environment)
    assert train.main(["--strategy=multiworker", f"--run_dir={tmp_path}"]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
