"""Checkpoints that are whole or absent, and from which a run goes on bit for bit."""

import os
import shutil
from pathlib import Path

import tensorflow as tf

from moco_tf import files
from moco_tf.command import ConfigError
from moco_tf.methods.ema import derive_state

ASIDE = "aside-"  # what is being written or deleted


class Checkpoints:
    """The last `keep` states of a model in a folder: weights, statistics, queue, optimizer, running totals.

    Each is a folder `step-<number>`, written aside and renamed, so that a kill at any moment leaves the ones
    before it untouched. Of several machines that train together, one has `writes`.
    """

    def __init__(self, folder, model, keep=3, writes=True):
        self.folder = Path(folder)
        self.model = model
        self.keep = keep
        self.writes = writes
        self._checkpoint = tf.train.Checkpoint(model=model, optimizer=model.optimizer)

    def steps(self):
        """Steps of the whole checkpoints, ascending."""
        return sorted(int(path.name.removeprefix("step-")) for path in self.folder.glob("step-*"))

    def path(self, step):
        return self.folder / f"step-{step:09d}"

    def save(self):
        """Writes the model's present state, unless that step is saved already; returns its folder."""
        target = self.path(self.model.steps_done)
        if target.exists() or not self.writes:
            return target
        self.folder.mkdir(parents=True, exist_ok=True)
        for left in self.folder.glob(f"{ASIDE}*"):  # by a killed process
            shutil.rmtree(left)
        aside = self.folder / f"{ASIDE}{target.name}"
        self._checkpoint.write(files.for_tensorflow(aside / "state"))
        for file in aside.iterdir():
            files.sync(file)
        files.sync(aside)
        os.rename(aside, target)
        files.sync(self.folder)
        for step in self.steps()[: -self.keep]:
            doomed = self.folder / f"{ASIDE}{step}"
            os.rename(self.path(step), doomed)  # what bears a step's name is whole
            shutil.rmtree(doomed)
        return target

    def restore_last(self):
        """Brings the model to the newest checkpoint; returns its step, or None if there is none.

        Raises:
          ConfigError: its files are damaged.
        """
        steps = self.steps()
        if not steps:
            return None
        newest = self.path(steps[-1])
        try:
            status = self._checkpoint.read(files.for_tensorflow(newest / "state"))
        except Exception as error:  # whatever TensorFlow says of files that it cannot read
            raise ConfigError(
                f"{newest} cannot be read ({str(error).splitlines()[0]}): move it away, and the checkpoint before it "
                "is taken"
            ) from None
        status.assert_consumed()
        derive_state(self.model)
        return steps[-1]
