"""Checkpoints that are either complete or absent, and from which a run resumes bit for bit."""

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

ASIDE = "aside-"  # begins the name of a folder that is being written or deleted
LEFT = re.compile(rf"{ASIDE}(step-)?\d+")
WHOLE = re.compile(r"step-(\d{9}|[1-9]\d{9,})")

log = logging.getLogger("moco_tf")


def steps_in(folder):
    """Steps of the complete checkpoints in a folder, ascending; ignores other names there, files and links."""
    folders = (path for path in Path(folder).glob("step-*") if path.is_dir() and not path.is_symlink())
    matches = (WHOLE.fullmatch(path.name) for path in folders)
    return sorted(int(match[1]) for match in matches if match)


class Checkpoints:
    """The last `keep` states of a model in a folder: weights, statistics, queue, optimizer, running totals.

    Each state is a folder `step-<number>`. It is written aside and then renamed, so that a kill at any moment leaves
    the earlier ones untouched. If several machines train together, only one of them has `writes`.
    """

    def __init__(self, folder, model, keep=3, writes=True):
        self.folder = Path(folder)
        self.model = model
        self.keep = keep
        self.writes = writes
        self._damaged = []  # paths of checkpoints that could not be read
        self._checkpoint = tf.train.Checkpoint(model=model, optimizer=model.optimizer)

    def steps(self):
        """Steps of the complete checkpoints, ascending."""
        return steps_in(self.folder)

    def path(self, step):
        return self.folder / f"step-{step:09d}"

    def save(self):
        """Writes the model's current state, unless its step is saved already; returns the checkpoint's folder."""
        target = self.path(self.model.steps_done)
        is_there = self.model.steps_done in self.steps()
        if not self.writes or (is_there and target not in self._damaged):
            return target
        files.make_folder(self.folder)
        strays = [target] if os.path.lexists(target) and not is_there else []
        for path in (*self._damaged, *strays):  # keeps them, under names that no checkpoint has
            os.rename(path, _free(path.with_name(f"damaged-{path.name}")))
        self._damaged.clear()
        self._remove_left()
        aside = self.folder / f"{ASIDE}{target.name}"
        try:
            self._checkpoint.write(files.for_tensorflow(aside / "state"))
            for file in aside.iterdir():
                if file.is_dir():  # TensorFlow's own parts, which it could not remove
                    files.remove(file)
                else:
                    files.sync(file)
            files.sync(aside)
            os.rename(aside, target)
        except BaseException:
            files.remove(aside)  # frees its space on a full disk
            raise
        files.sync(self.folder)
        self._remove_old()
        return target

    def tidy(self):
        """Removes what a stop in the last `save` has left, as the next one would."""
        if self.writes:
            self._remove_left()
            self._remove_old()

    def _remove_left(self):
        for left in self.folder.glob(f"{ASIDE}*"):
            if LEFT.fullmatch(left.name):  # a killed process left it
                files.remove(left)

    def _remove_old(self):
        for step in self.steps()[: -self.keep]:
            doomed = self.folder / f"{ASIDE}{step}"
            os.rename(self.path(step), doomed)  # every folder with a step's name is complete
            files.sync(self.folder)  # also after a power loss
            shutil.rmtree(doomed)

    def restore_last(self):
        """Restores the newest checkpoint that can be read; returns its step, or None if there is no checkpoint.

        Logs the newest checkpoint that is damaged, if any; `save` puts all damaged ones aside.

        Raises:
          ConfigError: no checkpoint can be read, or the newest one that can is another model's.
        """
        steps, refusal = self.steps(), None
        for step in reversed(steps):
            path = self.path(step)
            try:
                self._checkpoint.read(files.for_tensorflow(path / "state")).assert_consumed()
            except (AssertionError, ValueError) as error:
                raise ConfigError(
                    f"{path} is the checkpoint of another model ({files.first_line(error)}): the flags beside it "
                    "or the package have changed since"
                ) from None
            except Exception as error:  # TensorFlow raises various errors for unreadable files
                refusal = refusal or f"{path} cannot be read ({files.first_line(error)})"
                self._damaged.append(path)
                continue
            if refusal:
                log.warning(f"{refusal}; the checkpoint before it is taken, step {step}.")
            derive_state(self.model)
            return step
        if refusal:
            raise ConfigError(f"{refusal}, nor can one before it: move {self.folder} away to begin anew")
        return None


def _free(path):
    """Returns the path, or the path with a number after it, so that nothing exists there yet."""
    names = itertools.chain([path], (path.with_name(f"{path.name}-{number}") for number in itertools.count(2)))
    return next(name for name in names if not os.path.lexists(name))
