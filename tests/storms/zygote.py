"""What the storms have in common: a process imports training once and forks a child for each run, before a disk that
fails or is remembered (faulty_writes.c).

`begin` comes first in a storm: it starts the script anew with the disk before the C library. Linux and gcc are needed.
"""

import csv
import ctypes
import errno
import gc
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import zipfile
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).parent
REPOSITORY = HERE.parent.parent
LIBRARY = "FAULTY_WRITES"  # the environment's variable that holds the compiled disk's path
IMAGES, BATCH, EPOCHS = 24, 8, 2
STEPS = IMAGES // BATCH * EPOCHS
LAST = f"step-{STEPS:09d}"
TIMES = ("images_per_second", "step_share", "data_wait")


class Ended(NamedTuple):
    """How a child ended: its exit status (negative: a signal's; None: it took too long), and all that it printed."""

    status: int | None
    output: str
    call: str  # the first that was made to fail
    calls: int  # below the folder


def begin():
    """Compiles the disk and starts this script anew before it; then imports training, but computes nothing."""
    if LIBRARY not in os.environ:
        folder = tempfile.mkdtemp(prefix="storm-")
        library = f"{folder}/faulty_writes.so"
        source = HERE / "faulty_writes.c"
        subprocess.run(["gcc", "-O2", "-shared", "-fPIC", "-o", library, source, "-ldl"], check=True)
        path = os.pathsep.join(filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH")]))
        added = {LIBRARY: library, "LD_PRELOAD": library, "PYTHONPATH": path, "TF_CPP_MIN_LOG_LEVEL": "3"}
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | added)
    del os.environ["LD_PRELOAD"]  # what children start is nothing to count
    from moco_tf import train  # noqa: F401
    from moco_tf.startup import load_tensorflow

    load_tensorflow(training=True)
    from tensorboard.plugins import projector  # noqa: F401

    from moco_tf import build, callbacks, checkpoint, run_folder  # noqa: F401
    from moco_tf.config import task_module
    from moco_tf.data import dataset, errors  # noqa: F401
    from moco_tf.evaluate import extract, nearest_neighbors  # noqa: F401

    task_module("tests.storms.tiny")


def disk():
    """The compiled disk's functions."""
    library = ctypes.CDLL(os.environ[LIBRARY])
    library.faults_first.restype = ctypes.c_char_p
    return library


def write_images(folder, count=IMAGES):
    """A folder of few and small images of two classes in two splits; for children: it wakes TensorFlow."""
    from moco_tf.data import sources

    for split in ("train", "test"):
        for number, record in enumerate(sources.embedded("test").in_order(count).as_numpy_iterator()):
            place = Path(folder, split, "ab"[number % 2])
            place.mkdir(parents=True, exist_ok=True)
            (place / f"{number:02}.jpg").write_bytes(record["image"])


def arguments(images, run, *more):
    """The smallest run that writes what runs write: TensorBoard, checkpoints, one too many of them, the encoder."""
    return [
        *(f"--dataset={images}", f"--run_dir={run}", "--pretext=tests.storms.tiny", "--image_size=8"),
        *(f"--batch_size={BATCH}", f"--epochs={EPOCHS}", "--checkpoint_every=2", "--knn_every=0", *more),
    ]


def files_of(run, name):
    """{path below the folder of a run's checkpoint: its bytes}; name: step-000000006."""
    folder = Path(run, "checkpoints", name)
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def rows(run):
    """The lines of a run's metrics.csv, without what a clock says."""
    with open(Path(run, "metrics.csv"), newline="") as file:
        return [{k: v for k, v in row.items() if k not in TIMES} for row in csv.DictReader(file)]


def compare(run, whole, last=LAST):
    """What differs between a run that was finished and the undisturbed one, a list; last: their last checkpoint."""
    faults = []
    if files_of(run, last) != files_of(whole, last):
        faults.append("the last checkpoint differs")
    if rows(run) != rows(whole):
        faults.append(f"metrics.csv differs: {rows(run)}")
    names = [{path.name for path in folder.rglob("*") if "tfevents" not in path.name} for folder in (run, whole)]
    if names[0] != names[1]:
        faults.append(f"other files: {sorted(names[0] ^ names[1])}")
    if (run / "encoder.keras").exists() and zipfile.ZipFile(run / "encoder.keras").testzip():
        faults.append("encoder.keras is harmed")
    return faults


def child(function, folder="", at=0, code=errno.ENOSPC, all=False, stash="", timeout=3600):
    """Calls `function`, which returns an exit status, in a child, its disk as `faults_arm` has it: an `Ended`."""
    with tempfile.TemporaryFile() as output, tempfile.TemporaryFile() as after:
        pid = os.fork()
        if not pid:
            _be_the_child(function, (folder, at, code, all, stash), output, after)
        status, begun = None, time.monotonic()
        while not (ended := os.waitpid(pid, os.WNOHANG))[0]:
            if time.monotonic() - begun > timeout:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
                break
            time.sleep(0.01)
        else:
            status = os.waitstatus_to_exitcode(ended[1])
        output.seek(0)
        after.seek(0)
        calls, _, call = after.read().decode().partition(" ")
        return Ended(status, output.read().decode(errors="replace"), call, int(calls or 0))


def _be_the_child(function, faults, output, after):
    status = 99
    try:
        for stream in (1, 2):
            os.dup2(output.fileno(), stream)
        library = disk()
        folder, at, code, all, stash = faults
        library.faults_arm(os.fsencode(folder), at, code, all, os.fsencode(stash))
        status = function()
        gc.collect()  # what destructors have to say
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        after.write(f"{library.faults_calls()} {library.faults_first().decode(errors='replace')}".encode())
        after.flush()
        os._exit(status)


def train(*words):
    """The command, as a child calls it."""
    from moco_tf.train import main

    return main(list(words))
