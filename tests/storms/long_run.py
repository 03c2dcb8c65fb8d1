"""python tests/storms/long_run.py: many steps in one process, with kNN, checkpoints and TensorBoard: nothing grows.

Memory: the mean of the last tenth of the run against that of the second tenth (the first one still warms up). Files:
how many there are, and bytes a step of those that may grow, metrics.csv, train.log and TensorBoard's. Prints both;
status 1 if memory grew by more than 1 %, or there are more files at the end than after the second tenth.
"""

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent.parent)]

from moco_tf.startup import load_tensorflow  # noqa: E402

load_tensorflow(training=True)

import keras  # noqa: E402
import zygote  # noqa: E402

GROWING = ("metrics.csv", "train.log", "tensorboard")


class Watch(keras.callbacks.Callback):
    """Notes the process's memory and the run folder's files at each epoch's end."""

    def __init__(self, run):
        super().__init__()
        self.run = Path(run)
        self.memory, self.files = [], []

    def on_epoch_end(self, epoch, logs=None):
        with open("/proc/self/statm") as file:
            self.memory.append(int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE"))
        self.files.append(len([path for path in self.run.rglob("*") if path.is_file()]))


def callbacks(config):
    """What `--callbacks` names."""
    watch.append(Watch(config.run_dir))
    return watch


watch = []


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=100_000)
    parser.add_argument("--steps_per_epoch", type=int, default=25, help="at most 250: there are 2,000 images")
    settings = parser.parse_args()
    begun = time.monotonic()
    from tests.storms import long_run  # the module that --callbacks imports, and not this script

    with tempfile.TemporaryDirectory(prefix="storm-long-") as top:
        run = Path(top, "run")
        zygote.write_images(f"{top}/images", settings.steps_per_epoch * zygote.BATCH)
        epochs = settings.steps // settings.steps_per_epoch
        status = zygote.train(
            *zygote.arguments(f"{top}/images", run, f"--epochs={epochs}", "--checkpoint_every=100", "--knn_every=10"),
            "--callbacks=tests.storms.long_run:callbacks",
        )
        assert status == 0
        (seen,) = long_run.watch
        sizes = {name: sum(map(size, [run / name, *(run / name).rglob("*")])) for name in GROWING}
    tenth = max(1, epochs // 10)
    early, late = (sum(part) / len(part) for part in (seen.memory[tenth : 2 * tenth], seen.memory[-tenth:]))
    growth = 100 * (late / early - 1)
    more = seen.files[-1] - max(seen.files[tenth : 2 * tenth])
    of_files = ", ".join(f"{name} {bytes / settings.steps:.1f}" for name, bytes in sizes.items())
    print(
        f"{settings.steps} steps, {epochs} epochs: memory {early / 2**20:.1f} MiB in the second tenth, "
        f"{late / 2**20:.1f} MiB in the last, {growth:+.2f} %; {seen.files[-1]} files, {more:+d} since then; "
        f"bytes a step: {of_files}. {time.monotonic() - begun:.0f} s."
    )
    return int(growth > 1 or more > 0)


def size(path):
    return path.stat().st_size if path.is_file() else 0


if __name__ == "__main__":
    sys.exit(main())
