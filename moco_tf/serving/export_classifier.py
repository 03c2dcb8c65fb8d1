"""Writes a run's encoder with the classifier of a linear probe, as a SavedModel for TF Serving.

  python -m moco_tf.serving.export classifier --run_dir=runs/v2 --probe=runs/v2_probe --output=models/classifier

It answers like an exported encoder, and also returns `probabilities` and `label`: docs/serving.md.
"""

import dataclasses
from pathlib import Path

from moco_tf import command, run_folder
from moco_tf.command import ConfigError
from moco_tf.files import printable
from moco_tf.serving import settings as common
from moco_tf.startup import load_tensorflow

PROGRAM = "moco_tf.serving.export classifier"


@dataclasses.dataclass(frozen=True)
class Settings:
    run_dir: str = command.flag("", "Folder of the run whose last checkpoint is exported.", path=True)
    probe: str = command.flag("", "Folder that moco_tf.evaluate.linear_probe wrote for that run.", path=True)
    output: str = command.flag("", "Folder of the model's versions.", path=True)
    version: int = command.flag(0, "Version to write, 1 or more; 0: the one after the highest in --output.")
    on_bad_image: str = command.flag(
        "error",
        "What `encoded_images` does about bytes that are not an image. error: refuse the batch, naming their indices; "
        "zeros: give rows of zeros, the label -1, and `valid`, false there.",
        choices=("error", "zeros"),
    )
    request_megapixels: float = common.request_flag()

    def __post_init__(self):
        command.check_values(self)
        command.require(self, self.version >= 0, "version", "is 0 or more")
        common.require_request(self)
        if not self.run_dir or not self.probe or not self.output:
            raise ConfigError("give --run_dir=RUN, --probe=PROBE and --output=DIR: see --help")
        if run_folder.recorded(self.run_dir) is None:
            raise ConfigError(f"--run_dir={self.run_dir} is not a run folder: it has no config.flags")
        if not (Path(self.probe) / "probe.npz").exists():
            raise ConfigError(f"--probe={self.probe} is not a linear probe: it has no probe.npz")
        if self.version and (Path(self.output) / str(self.version)).exists():
            raise ConfigError(f"--version={self.version} exists in {self.output}: leave the flag out for the next")


def main(arguments, program=PROGRAM):
    """Runs the command under the name that the user called; returns the process's exit status."""
    doc = __doc__.replace(PROGRAM, program)
    command.log_to_screen()
    return command.run(program, doc, lambda words: _run(command.parse(Settings, program, words)), arguments)


def _run(settings):
    load_tensorflow()  # takes seconds; the flags are already checked
    from moco_tf.serving import saved_model

    path = saved_model.version_to_write(settings.output, settings.version)
    saved_model.export_probe(
        settings.run_dir,
        settings.probe,
        path,
        on_bad_image=settings.on_bad_image,
        request_megapixels=settings.request_megapixels,
    )
    print(f"Wrote {printable(path)}.")
    return 0
