"""Embeds images with a server: sends a file or a folder in batches, writes one .npz file.

  python -m moco_tf.serving.export client --images=photos --output=photos.npz
  python -m moco_tf.serving.export client --images=photos --protocol=grpc --server=gpu1:8500 \\
      --compare=models/encoder

The first command asks localhost:8501 over REST. The .npz file holds `files` and each of the model's outputs, with one
row per file. REST does not need TensorFlow. With --compare, the exit status is 1 if server and SavedModel
differ.
"""

import dataclasses
import time

import numpy as np

from moco_tf import command, files
from moco_tf.command import ConfigError
from moco_tf.serving import agreement, client

PROGRAM = "moco_tf.serving.export client"
PORTS = {"rest": 8501, "grpc": 8500}


@dataclasses.dataclass(frozen=True)
class Settings:
    images: str = command.flag("", "An image, or a folder of images at any depth.", path=True)
    output: str = command.flag("", "The .npz file to write; '': none.", path=True)
    server: str = command.flag("", "host:port; '': localhost:8501 for REST, localhost:8500 for gRPC.")
    protocol: str = command.flag("rest", "How to ask; grpc needs tensorflow-serving-api.", choices=("rest", "grpc"))
    model: str = command.flag("encoder", "The model's name on the server.")
    version: int = command.flag(0, "The model's version; 0: the highest.")
    label: str = command.flag("", "The label of the model's version, such as stable, instead of --version.")
    batch_size: int = command.flag(32, "Images a request.")
    timeout: float = command.flag(30.0, "Seconds that a request may take.")
    compare: str = command.flag(
        "", "A SavedModel on this machine to compare the answers with; needs TensorFlow.", path=True
    )

    def __post_init__(self):
        command.check_values(self)
        for name in ("batch_size", "timeout"):
            command.require(self, getattr(self, name) > 0, name, "is more than 0")
        command.require(self, self.version >= 0, "version", "is 0 or more")
        if not self.images or not (self.output or self.compare):
            raise ConfigError("give --images=PATH, and --output=FILE.npz or --compare=DIR: see --help")
        if self.output and not self.output.endswith(".npz"):
            raise ConfigError(f"--output names a .npz file; got {self.output}")
        if self.version and self.label:
            raise ConfigError(f"--version={self.version} and --label={self.label} both name a version: give one")


def main(arguments, program=PROGRAM):
    """Runs the command under the name that the user called; returns the process's exit status."""
    doc = __doc__.replace(PROGRAM, program)
    return command.run(program, doc, lambda words: _run(command.parse(Settings, program, words)), arguments)


def _run(settings):
    images = client.image_files(settings.images)
    server = settings.server or f"localhost:{PORTS[settings.protocol]}"
    if settings.protocol == "grpc" or settings.compare:
        from moco_tf.startup import load_tensorflow

        load_tensorflow()
    ask = {"rest": client.rest, "grpc": client.grpc}[settings.protocol]
    predict = ask(server, settings.model, settings.timeout, settings.version, settings.label)
    compared = client.local(settings.compare) if settings.compare else None
    start = time.monotonic()
    outputs = client.embed(images, predict, settings.batch_size)
    seconds = time.monotonic() - start
    shapes = ", ".join(f"{files.printable(name)} {value.shape}" for name, value in sorted(outputs.items()))
    print(f"{len(images)} images in {seconds:.2f} s: {shapes}")
    if not outputs.get("valid", np.True_).all():
        bad = [files.printable(file) for file, valid in zip(images, outputs["valid"], strict=True) if not valid]
        print(f"{len(bad)} of them cannot be decoded, their rows are zeros: {', '.join(bad)}")
    if settings.output:
        files.write_arrays(settings.output, {"files": np.array([str(file) for file in images])} | outputs)
        print(f"Wrote {files.printable(settings.output)}.")
    return _compare(settings, images, outputs, compared) if compared else 0


def _compare(settings, images, outputs, predict):
    expected = client.embed(images, predict, settings.batch_size)
    agree = agreement.deviation(outputs, expected) <= agreement.TOLERANCE
    deviations = agreement.deviations(outputs, expected).items()
    figures = ", ".join(f"{files.printable(name)} {value:.1e}" for name, value in deviations)
    verdict = "agrees with" if agree else f"differs by more than {agreement.TOLERANCE:g} from"
    print(f"The server {verdict} {files.printable(settings.compare)} (deviation over the largest value): {figures}.")
    return 0 if agree else 1
