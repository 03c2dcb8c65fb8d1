"""Settings that the commands of evaluation share: which encoder, which images, where the results go.

The module imports nothing heavy, so a wrong flag is rejected at once.
"""

import dataclasses
import importlib.util
import logging
import os
import re
from pathlib import Path

from moco_tf import command, files, run_folder
from moco_tf.command import ConfigError, flag
from moco_tf.files import expanded, printable
from moco_tf.startup import load_tensorflow

# Each --engine: the packages that it needs, and the extra that installs them.
ENGINES = {
    "tensorflow": ((), ""),
    "onnx": (("onnx", "onnxruntime", "tf2onnx"), "onnx"),
    "openvino": (("onnx", "onnxruntime", "openvino", "tf2onnx"), "engines"),
    "auto": ((), ""),
}

log = logging.getLogger("moco_tf")


def engine_flag():
    """Makes the flag --engine of a command that encodes images with a frozen encoder; `require_engine` checks it."""
    return flag(
        "tensorflow",
        "What computes the encoder: tensorflow, whose results repeat bit for bit; onnx or openvino, which agree "
        "within 1e-4 of the largest value, or are refused; auto: the fastest of those that are installed, which it "
        "times where the images take TensorFlow five minutes or more.",
        choices=tuple(ENGINES),
    )


def require_engine(engine):
    """Refuses an --engine if one of its packages is missing."""
    packages, extra = ENGINES[engine]
    missing = [package for package in packages if importlib.util.find_spec(package) is None]
    if missing:
        raise ConfigError(f"--engine={engine} needs the package {missing[0]}: pip install 'moco_tf[{extra}]'")


@dataclasses.dataclass(frozen=True)
class Settings:
    encoder: str = flag(
        "", "What to judge: a run folder, or an exported SavedModel (DIR or DIR/<version>).", path=True
    )
    dataset: str = flag(
        "",
        "Images to judge it on: 'embedded', a folder, a .zip or .tar, a list, or a prepared data set of TFDS. '': "
        "those of the run; with a SavedModel, embedded. Another data set than the run's is a test of transfer.",
        path=True,
    )
    data_dir: str = flag(
        "",
        "Folder that a relative --dataset folder starts from, or that holds TFDS' prepared sets. '': the run's.",
        path=True,
    )
    train_split: str = flag("", "Labelled split to learn from. '': the run's, or train.")
    eval_split: str = flag("", "Labelled split to be judged on. '': the run's, or test (val, validation).")
    exif: bool = flag(False, "Turn and mirror JPEGs as their EXIF data says; on the run's images as the run does.")
    max_bad_fraction: float = flag(0.05, "Share of undecodable images, 0 to 1, that is accepted.")
    limit: int = flag(0, "Images taken of each split, evenly spread; 0: all.")
    seed: int = flag(0, "Seed of all that is drawn: the same seed repeats the result.")
    output: str = flag(
        "", "Folder for the results. '': a folder named after the command, in the run or beside DIR.", path=True
    )

    NAME = ""  # of the output folder without --output
    RUNS_ONLY = False  # whether the command needs more of a run than a SavedModel holds

    def __post_init__(self):
        command.check_values(self)
        if not self.encoder:
            raise ConfigError("--encoder=DIR names what to judge: a run folder, or an exported SavedModel")
        command.require(self, 0 <= self.max_bad_fraction <= 1, "max_bad_fraction", "lies between 0 and 1")
        command.require(self, self.limit >= 0, "limit", "is 0 or more")
        command.require(self, 0 <= self.seed < 2**31, "seed", "is 0 or more and less than 2^31")

    @property
    def images(self):
        """Where the images are, from any working directory: the absolute path of what --dataset names, or its name."""
        path = expanded(self.data_dir, self.dataset)
        return os.path.abspath(path) if os.path.exists(path) else " ".join(filter(None, (self.data_dir, self.dataset)))

    def resolved(self):
        """Returns these settings with data set, splits and output filled in.

        Raises:
          ConfigError: --encoder is neither a run folder nor a folder that may hold a SavedModel.
        """
        path = Path(self.encoder)
        run = run_folder.recorded(path) if self.RUNS_ONLY else recorded_run(path)
        if run is None and self.RUNS_ONLY:
            raise ConfigError(f"--encoder={path} is to be a run folder, as moco_tf.train writes it, with config.flags")
        inherited = run if run and not self.dataset else None
        if inherited and inherited.dataset != "embedded":  # the run may come from somebody else
            where = f" in {printable(inherited.data_dir)}" if inherited.data_dir else ""
            log.info(f"Images: {printable(inherited.dataset)}{where}, as {printable(path / 'config.flags')} says.")
        name = self.NAME + (f"-{Path(self.dataset).name}" if self.dataset else "")
        return dataclasses.replace(
            self,
            dataset=self.dataset or (run.dataset if run else "embedded"),
            data_dir=self.data_dir or (run.data_dir if run else ""),
            train_split=self.train_split or (inherited.train_split if inherited else "train"),
            eval_split=self.eval_split or (inherited.eval_split if inherited else "test"),
            exif=self.exif or bool(inherited and inherited.exif),
            output=self.output or str(results_of(path, name, bool(run))),
        )


def results_of(encoder, name, is_run):
    """Returns the folder for results of this name: in the run, or beside a SavedModel, whose folder a server polls."""
    if is_run:
        return encoder / name
    encoder = Path(os.path.abspath(encoder))  # "." has no name
    base = encoder.parent if (encoder / "saved_model.pb").exists() else encoder
    return base.with_name(f"{base.name}-{name}")


def _require_same_images(folder, images):
    """Refuses a folder with the results of other images of the same last name; images: see `Settings.images`."""
    summary = Path(folder) / "summary.json"
    before = command.read_json(summary).get("images_of") if summary.exists() else None  # older results do not say
    if before not in (None, printable(images)):
        raise ConfigError(
            f"{folder} holds the results of {before}; got {printable(images)}: name another folder with --output"
        )


@dataclasses.dataclass(frozen=True)
class Encoding(Settings):
    """Settings of the commands that do not change their encoder."""

    engine: str = engine_flag()

    def __post_init__(self):
        super().__post_init__()
        require_engine(self.engine)


def recorded_run(path):
    """Returns the config of the run that --encoder names, or None for a SavedModel.

    Raises:
      ConfigError: the path is neither a run folder nor a folder that may hold a SavedModel.
    """
    path = Path(path)
    run = run_folder.recorded(path)
    if run is None and not ((path / "saved_model.pb").exists() or list(path.glob("*/saved_model.pb"))):
        raise ConfigError(
            f"--encoder={path} is neither a run folder (config.flags) nor a SavedModel (saved_model.pb, or "
            "<version>/saved_model.pb)"
        )
    return run


def shard(text):
    """Parses --shard=3/16, the third of 16 parts, into (3, 16); '' means the whole, (1, 1).

    Raises:
      ConfigError: the text has another form, or there is no such part.
    """
    match = re.fullmatch(r"([0-9]+)/([0-9]+)", text or "1/1")
    if not match or not 1 <= int(match[1]) <= int(match[2]):
        raise ConfigError(f"--shard=3/16 is the third of 16 parts, 1/16 to 16/16; got {text!r}")
    return int(match[1]), int(match[2])


def run(program, doc, kind, function, arguments, training=False):
    """Runs a command of evaluation, `function(settings)`, with resolved settings; returns the exit status.

    training: whether the command trains an encoder (see `load_tensorflow`).
    """
    command.log_to_screen()

    def work(words):
        given = command.parse(kind, program, words)
        settings = given.resolved()
        output = Path(settings.output)
        if not given.output and getattr(given, "dataset", ""):
            _require_same_images(output, settings.images)
        try:
            files.make_folder(output)
        except OSError as error:
            raise ConfigError(f"--output names a folder to make or to write to; {output}: {error.strerror}") from None
        with command.log_to_file(output / "log.txt"):
            load_tensorflow(training=training)  # takes seconds; the flags are already checked
            from moco_tf.data import errors

            with errors.in_a_line():
                function(settings)
        return 0

    return command.run(program, doc, work, arguments)
