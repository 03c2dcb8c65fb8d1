"""Checkpoints that are whole or absent, and from which a run goes on bit for bit."""

import itertools
import logging
import os
import re
import shutil
from pathlib import Path

import tensorflow as tf

from moco_tf import files
from moco_tf.command import ConfigError
from moco_tf.methods.ema import derive_state

ASIDE = "aside-"  # what is being written or deleted
WHOLE = re.compile(r"step-(\d{9,})")

log = logging.getLogger("moco_tf")


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
        self._damaged = []  # paths of checkpoints that could not be read
        self._checkpoint = tf.train.Checkpoint(model=model, optimizer=model.optimizer)

    def steps(self):
        """Steps of the whole checkpoints, ascending; what else lies there, such as a copy `step-1.bak`, is none."""
        matches = (WHOLE.fullmatch(path.name) for path in self.folder.glob("step-*"))
        return sorted(int(match[1]) for match in matches if match)

    def path(self, step):
        return self.folder / f"step-{step:09d}"

    def save(self):
        """Writes the model's present state, unless that step is saved already; returns its folder."""
        target = self.path(self.model.steps_done)
        if not self.writes or (target.exists() and target not in self._damaged):
            return target
        files.make_folder(self.folder)
        for path in self._damaged:  # they are kept, under a name that no checkpoint has
            os.rename(path, _free(path.with_name(f"damaged-{path.name}")))
        self._damaged.clear()
        for left in self.folder.glob(f"{ASIDE}*"):  # by a killed process
            shutil.rmtree(left)
        aside = self.folder / f"{ASIDE}{target.name}"
        try:
            self._checkpoint.write(files.for_tensorflow(aside / "state"))
            for file in aside.iterdir():
                files.sync(file)
            files.sync(aside)
            os.rename(aside, target)
        except BaseException:
            files.remove(aside)  # a full disk has its room back
            raise
        files.sync(self.folder)
        for step in self.steps()[: -self.keep]:
            doomed = self.folder / f"{ASIDE}{step}"
            os.rename(self.path(step), doomed)  # what bears a step's name is whole
            files.sync(self.folder)  # after a loss of power, too
            shutil.rmtree(doomed)
        return target

    def restore_last(self):
        """Brings the model to the newest checkpoint that can be read; returns its step, or None if there is none.

        Says which newer ones are damaged; `save` then puts them aside.

        Raises:
          ConfigError: none of them can be read, or the newest is another model's.
        """
        steps, refusal = self.steps(), None
        for step in reversed(steps):
            path = self.path(step)
            try:
                self._checkpoint.read(files.for_tensorflow(path / "state")).assert_consumed()
            except (AssertionError, ValueError) as error:
                raise ConfigError(
                    f"{path} is the checkpoint of another model ({_line(error)}): the flags beside it or the package "
                    "have changed since"
                ) from None
            except Exception as error:  # whatever TensorFlow says of files that it cannot read
                refusal = refusal or f"{path} cannot be read ({_line(error)})"
                self._damaged.append(path)
                continue
            if refusal:
                log.warning(f"{refusal}; the checkpoint before it is taken, step {step}.")
            derive_state(self.model)
            return step
        if refusal:
            raise ConfigError(f"{refusal}, nor can one before it: move {self.folder} away to begin anew")
        return None


def _line(error):
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _free(path):
    """The path, or with a number after it, where there is nothing yet."""
    names = itertools.chain([path], (path.with_name(f"{path.name}-{number}") for number in itertools.count(2)))
    return next(name for name in names if not os.path.lexists(name))
