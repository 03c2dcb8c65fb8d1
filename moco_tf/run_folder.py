"""The files of a training run: one folder holds all that a run leaves behind, and one process writes to it.

config.flags  data.json  train_images.csv  eval_images.csv  metrics.csv  baselines.json  train.log  views.png
checkpoints/  tensorboard/  encoder.keras
"""

import csv
import io
import json
import logging
from pathlib import Path
from typing import NamedTuple

from moco_tf import command, files
from moco_tf import config as config_lib
from moco_tf.command import ConfigError

# The columns of metrics.csv before and after those that the model names: its metrics and the rates of its schedules.
BEFORE, AFTER = ("epoch", "step", "loss"), ("images_per_second", "step_share", "data_wait", "knn_top1")

log = logging.getLogger("moco_tf")


def recorded(path, read=config_lib.read):
    """The config of the run in a folder, or None if there is no run yet.

    read: a function from a flag file's path to settings, for a command other than `moco_tf.train`.
    """
    flags = Path(path) / "config.flags"
    if not flags.exists():
        return None
    try:
        lines = command.lines_of(flags)
    except ConfigError as error:
        raise ConfigError(f"{flags} {error}") from None
    if not lines:  # it would otherwise count as a run with every flag's default
        raise ConfigError(f"{flags} is empty: bring back the flags that the run was started with, a line each")
    return read(flags)


def rows(path):
    """The rows of a run folder's metrics.csv, a list of dicts of strings: numbers, or "" for what was not computed.

    Leaves out damaged rows, such as a last line that was cut off, and says so.
    """
    file = Path(path) / "metrics.csv"
    try:
        text = file.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return []
    whole, newline, cut = text.rpartition("\n")
    if cut:
        log.warning(f"{file} ends in the middle of a line, which is left out.")
    rows = list(csv.DictReader(io.StringIO((whole + newline).replace("\0", "\ufffd"))))
    good = [row for row in rows if all(isinstance(value, str) and _is_number(value) for value in row.values())]
    if len(good) < len(rows):
        log.warning(f"{file} has lines that are not rows of numbers ({len(rows) - len(good)}); they are left out.")
    return good


def _is_number(text):
    try:
        float(text or 0)
    except ValueError:
        return False
    return True


class Data(NamedTuple):
    """What a run folder records about the training data."""

    size: int  # records
    order: str = ""  # a hash of which record has which number, if the run depends on that


def data(path):
    """The `Data` of the run in a folder, or None if the run has not begun."""
    file = Path(path) / "data.json"
    try:
        if not file.exists():
            return None
        found = json.loads(file.read_text())
        return Data(found["images"], found.get("order", ""))
    except (ValueError, KeyError, TypeError, RecursionError):
        raise ConfigError(
            f'{file} does not say how many images the run has, as in {{"images": 10000}}: write that into it, or '
            "choose another folder"
        ) from None


def baselines(path):
    """The baseline accuracies of the run in a folder: a dict of percents, empty if none were kept."""
    kept = Path(path) / "baselines.json"
    return command.read_json(kept) if kept.exists() else {}


class RunFolder:
    """Opens (or makes) the folder of a run and holds it until `close`, or until the process ends.

    Args:
      config: a `Config`, or other settings that are `config.Recorded` and have `resume`.
      read: as `recorded` takes it.

    Raises:
      ConfigError: another process trains in the folder; its run has other mathematics; or it holds a run and
        `config.resume` is off.
    """

    def __init__(self, config, read=config_lib.read):
        self.path = Path(getattr(config, config.FOLDER))
        self._flag, self._read = f"--{config.FOLDER}", read
        self._recorded = self.path / "config.flags"
        try:
            files.make_folder(self.path)
            self._lock = files.hold(self.path / ".lock")
        except files.Held as mark:
            raise ConfigError(
                f"one run at a time writes to a folder; another process is training in {self.path}: "
                f"wait for it{mark}, or choose another {self._flag}"
            ) from None
        except OSError as error:
            text = f"{self._flag} names a folder to make or to go on in; {self.path}: {error.strerror}"
            raise ConfigError(text) from None
        try:
            for own in (self.checkpoints, self.tensorboard):
                if own.is_symlink():  # it could lead into another run, whose checkpoints would be replaced
                    raise ConfigError(
                        f"a run writes into folders of its own; {own} is a link: put the folder itself there, or make "
                        f"the whole {self._flag} a link"
                    )
            for left in self.path.glob(".writing-*"):  # a killed process left it: no other process is here
                files.remove(left)
            self._check(config)
        except BaseException:
            self.close()
            raise
        self.begun = self._recorded.exists()  # by an earlier start

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def close(self):
        """Lets other runs, including this process's own, use the folder; it may be called again."""
        self._lock.close()

    def check_images(self, count, order=""):
        """Refuses a number of images, or an order, other than those that the run began with."""
        before = data(self.path) or Data(count, order)
        if before.size != count:
            raise ConfigError(
                f"a run goes on with the images that it began with; {self.path} had {before.size}, --dataset has "
                f"{count}: bring them back, or choose another {self._flag}"
            )
        if before.order and before.order != order:
            raise ConfigError(
                f"a run goes on with the images that it began with; --dataset has as many as {self.path} had, but "
                f"others, or in another order: bring them back, or choose another {self._flag}"
            )

    def begin(self, config, count, columns, before=BEFORE, after=AFTER, order=""):
        """Records the flags, the number of records and their order (see `Data`); call it after all checks.

        columns: the columns of metrics.csv that the model names, its metrics and rates; they stand between `before`
          and `after`.
        """
        self.columns = (*before, *columns, *after)
        about = {"images": count} | ({"order": order} if order else {})
        files.write_text(self.path / "data.json", json.dumps(about) + "\n")
        files.write_text(self._recorded, config.flag_lines(), errors="surrogateescape")

    def log(self):
        """Returns a context in which log messages also go to train.log, with more detail than on the screen."""
        return command.log_to_file(self.path / "train.log")

    def _check(self, config):
        earlier = recorded(self.path, self._read)
        if earlier:
            if not config.resume:
                raise ConfigError(
                    f"--noresume starts a new run, but {self.path} holds one: choose another {self._flag}, "
                    "or delete that folder yourself"
                )
            differing = [
                f"--{name} (there {getattr(earlier, name)!r}, here {getattr(config, name)!r})"
                for name in config.differences(earlier)
            ]
            if differing:
                raise ConfigError(
                    f"{self.path} holds a run with other {', '.join(differing)}: "
                    f"choose another {self._flag}, or go on with its own flags"
                )

    @property
    def checkpoints(self):
        return self.path / "checkpoints"

    @property
    def tensorboard(self):
        return self.path / "tensorboard"

    def rows(self):
        return rows(self.path)

    def rewind(self, step, steps_per_epoch):
        """Drops the rows that a run resumed at `step` will write again: later rows, and that of a partial epoch.

        steps_per_epoch: steps between rows.
        """
        rows = [r for r in self.rows() if int(r["step"]) <= step and int(r["step"]) % steps_per_epoch == 0]
        self._write_rows(rows)

    def add_row(self, row):
        """Adds a row to metrics.csv; `row` maps column names to numbers; numbers not computed are None or absent."""
        text = {name: "" if row.get(name) is None else repr(row[name]) for name in self.columns}
        self._write_rows([*self.rows(), text])

    def _write_rows(self, rows):
        # A run that an older version began lacks the newer columns.
        lines = [",".join(self.columns), *(",".join(row.get(name, "") for name in self.columns) for row in rows)]
        files.write_text(self.path / "metrics.csv", "\n".join(lines) + "\n")

    def baselines(self):
        return baselines(self.path)

    def keep_baselines(self, accuracies):
        files.write_text(self.path / "baselines.json", json.dumps(accuracies) + "\n")
