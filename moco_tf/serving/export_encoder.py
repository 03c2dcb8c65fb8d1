"""Writes a run's encoder as a SavedModel for TF Serving, or as an ONNX file.

  python -m moco_tf.serving.export encoder --run_dir=runs/v2 --output=models/encoder
  python -m moco_tf.serving.export encoder --run_dir=runs/v2 --output=encoder.onnx --format=onnx
  python -m moco_tf.serving.export encoder --run_dir=runs/v2 --output=int8.onnx --format=onnx --quantize=int8

The first command writes models/encoder/<next version>/. docs/serving.md describes the output and how to call it.
"""

import dataclasses
import shlex
from pathlib import Path

from moco_tf import command, run_folder
from moco_tf.command import ConfigError
from moco_tf.files import printable
from moco_tf.serving import settings as common
from moco_tf.startup import load_tensorflow

PROGRAM = "moco_tf.serving.export encoder"


@dataclasses.dataclass(frozen=True)
class Settings:
    run_dir: str = command.flag("", "Folder of the run whose last checkpoint is exported.", path=True)
    output: str = command.flag("", "Folder of the model's versions; with --format=onnx the file to write.", path=True)
    version: int = command.flag(0, "Version to write, 1 or more; 0: the one after the highest in --output.")
    format: str = command.flag("saved_model", "What to write.", choices=("saved_model", "onnx"))
    on_bad_image: str = command.flag(
        "error",
        "What `encoded_images` does about bytes that are not an image. error: refuse the batch, naming their indices; "
        "zeros: give rows of zeros, and `valid`, false there.",
        choices=("error", "zeros"),
    )
    request_megapixels: float = common.request_flag()
    feature_maps: bool = command.flag(
        False,
        "Write a signature `feature_maps`, too: a ResNet's maps P2 to P5, strides 4 to 32, of images of any size.",
    )
    quantize: str = command.flag(
        "none",
        "int8: with --format=onnx, an encoder that computes in 8 bits, faster and a quarter of the size. Images "
        "calibrate it, and others judge it.",
        choices=("none", "int8"),
    )
    calibrate: str = command.flag(
        "", "Images that calibrate --quantize=int8, as --dataset of training names them. '': the run's own.", path=True
    )
    calibration_images: int = command.flag(
        256, "Images that calibrate; as many others judge. Both are evenly spread over the training split."
    )
    least_cosine: float = command.flag(
        0.99,
        "Mean cosine of 8-bit features with float32's, both from the mean feature, on images that did not calibrate; "
        "below it nothing is written.",
    )

    def __post_init__(self):
        command.check_values(self)
        command.require(self, self.version >= 0, "version", "is 0 or more")
        common.require_request(self)
        if not self.run_dir or not self.output:
            raise ConfigError("give --run_dir=RUN and --output=DIR: see --help")
        if run_folder.recorded(self.run_dir) is None:
            raise ConfigError(f"--run_dir={self.run_dir} is not a run folder: it has no config.flags")
        if self.format == "onnx":
            if not self.output.endswith(".onnx"):
                raise ConfigError(f"--format=onnx writes a file, --output=NAME.onnx; got {self.output}")
            for name, default in (
                ("version", 0),
                ("on_bad_image", "error"),
                ("request_megapixels", common.REQUEST_MEGAPIXELS),
                ("feature_maps", False),
            ):
                rule = "belongs to a SavedModel; an ONNX file takes pixels and has no versions"
                command.require(self, getattr(self, name) == default, name, rule)
        if self.quantize != "none":
            command.require(self, self.format == "onnx", "quantize", "goes with --format=onnx")
            command.require(self, self.calibration_images >= 16, "calibration_images", "is 16 or more")
            command.require(self, -1 <= self.least_cosine <= 1, "least_cosine", "is a cosine, -1 to 1")
        else:
            for name, default in (("calibrate", ""), ("calibration_images", 256), ("least_cosine", 0.99)):
                rule = "belongs to --quantize=int8"
                command.require(self, getattr(self, name) == default, name, rule)
        if self.format != "onnx" and self.version and (Path(self.output) / str(self.version)).exists():
            raise ConfigError(f"--version={self.version} exists in {self.output}: leave the flag out for the next")


def main(arguments, program=PROGRAM):
    """Runs the command under the name that the user called; returns the process's exit status."""
    doc = __doc__.replace(PROGRAM, program)
    command.log_to_screen()
    return command.run(program, doc, lambda words: _run(command.parse(Settings, program, words)), arguments)


def _run(settings):
    load_tensorflow()  # takes seconds; the flags are already checked
    if settings.quantize == "int8":
        from moco_tf.serving import int8_file

        of_images = settings.calibrate, settings.calibration_images, settings.least_cosine
        agreement = int8_file.export_run(settings.run_dir, settings.output, *of_images)
        size = Path(settings.output).stat().st_size / 2**20
        print(f"Wrote {printable(settings.output)}, {size:.1f} MiB, in 8 bits: {agreement}.")
        return 0
    if settings.format == "onnx":
        from moco_tf.serving import onnx_file

        deviation = onnx_file.export_run(settings.run_dir, settings.output)
        print(f"Wrote {printable(settings.output)}. ONNX Runtime deviates by {deviation:.1e} of the largest value.")
        return 0
    from moco_tf.serving import saved_model

    path = saved_model.version_to_write(settings.output, settings.version)
    saved_model.export_run(
        settings.run_dir,
        path,
        on_bad_image=settings.on_bad_image,
        request_megapixels=settings.request_megapixels,
        feature_maps=settings.feature_maps,
    )
    print(printable(f"Wrote {path}. Serve it: {shlex.join([_start_script(), str(path.parent.parent)])}"))
    return 0


def _start_script():
    script = command.shipped("serving/server", "export/serving") / "serve.sh"
    return str(script.relative_to(Path.cwd()) if script.is_relative_to(Path.cwd()) else script)
