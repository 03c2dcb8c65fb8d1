"""Several processes that train together over loopback, as machines would: `--strategy=multiworker` by TF_CONFIG."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tensorflow as tf
from test_train import TINY, assert_same_run, last_checkpoint, rows

from moco_tf.data.errors import reason

REPOSITORY = Path(__file__).parent.parent


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


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("two_workers")
    chief, other = finish(start(run_dir, "--epochs=1"))
    assert "on 2 replicas" in chief and "Epoch 1/1, step 20" in chief
    assert "This machine trains along." in other and "Epoch" not in other
    return run_dir


@pytest.mark.parametrize("victim", [1, pytest.param(0, marks=pytest.mark.slow)])
def test_after_a_killed_worker_the_others_stop_and_all_go_on_bit_for_bit(undisturbed, tmp_path, victim):
    processes = start(tmp_path, "--epochs=1", "--checkpoint_every=3")
    while last_checkpoint(tmp_path) < 6:  # of 20 steps
        assert processes[0].poll() is None, processes[0].stdout.read()
        time.sleep(0.02)
    processes[victim].send_signal(signal.SIGKILL)
    killed = time.monotonic()
    output = processes[1 - victim].communicate()[0]
    assert processes[1 - victim].returncode == 1
    assert "another machine no longer answers" in output.splitlines()[-1]
    assert "start all again, they go on from the last checkpoint" in output.splitlines()[-1]
    assert time.monotonic() - killed < 60  # docs/scaling.md states it
    processes[victim].communicate()

    chief, _ = finish(start(tmp_path, "--epochs=1", "--checkpoint_every=3"))
    assert "Going on from step" in chief
    assert_same_run(undisturbed, tmp_path)


def test_the_reason_for_a_stop_is_what_the_collectives_say_and_not_their_advice():
    message = (
        "Collective ops is aborted by: Connection reset by peer\n"
        "The error could be from a previous operation. Restart your program to reset."
    )
    error = tf.errors.UnavailableError(None, None, message)
    assert reason(error) == "Collective ops is aborted by: Connection reset by peer"


def test_machines_that_do_not_share_the_run_folder_are_refused(undisturbed, tmp_path):
    for process in start(tmp_path, "--epochs=2", other_run_dir=undisturbed):
        output = process.communicate()[0]
        assert process.returncode == 2
        assert "step 0 with 2000, step 20 with 2000: put --run_dir and --dataset on storage that" in output


def on_virtual_replicas(run_dir, replicas, max_steps):
    environment = {name: value for name, value in os.environ.items() if name != "TF_CONFIG"}
    command = [sys.executable, "-m", "moco_tf.train", *TINY, f"--run_dir={run_dir}", "--epochs=1"]
    changing = [f"--virtual_replicas={replicas}", f"--max_steps={max_steps}"]
    subprocess.run([*command, *changing], cwd=REPOSITORY, env=environment, check=True, stdout=subprocess.PIPE)


def test_an_interrupted_run_on_replicas_ends_like_an_undisturbed_one_on_as_many_machines(undisturbed, tmp_path):
    for last in (7, 20):
        on_virtual_replicas(tmp_path, 2, last)
    assert_same_run(undisturbed, tmp_path)


@pytest.mark.slow
def test_a_run_goes_on_with_another_number_of_workers(undisturbed, tmp_path):
    finish(start(tmp_path, "--epochs=1", "--max_steps=7"))
    on_virtual_replicas(tmp_path, 0, 14)
    on_virtual_replicas(tmp_path, 4, 20)
    (expected,), (row,) = rows(undisturbed), rows(tmp_path)
    assert float(row["loss"]) == pytest.approx(float(expected["loss"]), abs=1e-3)


def test_multiworker_without_its_environment_is_refused_in_one_line(tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "TF_CONFIG"}
    for config, message in (({}, "which is not set"), ({"TF_CONFIG": "{"}, "TF_CONFIG does not describe")):
        done = subprocess.run(
            [sys.executable, "-m", "moco_tf.train", "--strategy=multiworker", f"--run_dir={tmp_path}"],
            cwd=REPOSITORY,
            env=environment | config,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 2
        assert message in done.stderr and done.stderr.count("\n") == 1
