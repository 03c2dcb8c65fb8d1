"""`python -m moco_tf.evaluate.features --encoder=DIR --dataset=photos --output=F`: of any number of images.

Writes F/features-00000.npz, ...: `features` float32 (N, D), `labels` int64 (-1: unknown), `ids` int64 (numbers in
the data set), and `paths` where the images are files. Each file is whole or absent; the same command goes on after the
last one. F/features.json says what they are of.
"""

import dataclasses
import json
import logging
import os
import sys
import time
from pathlib import Path

import numpy as np

from moco_tf import command, files
from moco_tf.command import ConfigError
from moco_tf.evaluate import settings as common

log = logging.getLogger("moco_tf")


@dataclasses.dataclass(frozen=True)
class Settings(common.Settings):
    split: str = command.flag("train", "Split whose images are encoded; labels are not needed.")
    on: str = command.flag(
        "features",
        "features: the backbone's; embedding: the projection, of unit length.",
        choices=("features", "embedding"),
    )
    shard_size: int = command.flag(10_000, "Images a file: what is lost at most when the command is interrupted.")

    NAME = "features"

    def __post_init__(self):
        super().__post_init__()
        command.require(self, self.shard_size > 0, "shard_size", "is more than 0")

    def resolved(self):
        for name in ("train_split", "eval_split"):
            if getattr(self, name):
                raise ConfigError(f"--split names the split here; got --{name}={getattr(self, name)}")
        return super().resolved()


def main(arguments):
    """Runs the command; returns the process's exit status."""
    return common.run("moco_tf.evaluate.features", __doc__, Settings, write, arguments)


def write(settings):
    """Writes what is missing of the shards that the settings describe."""
    from moco_tf.data.views import central
    from moco_tf.evaluate import subject
    from moco_tf.evaluate.extract import stream

    started = time.monotonic()
    folder = Path(settings.output)
    encoder, model = subject.encoder(settings)
    about = files.as_text(
        {
            "encoder": settings.encoder,
            "step": model.steps_done if model else None,  # a run may have gone on since
            **{name: getattr(settings, name) for name in ("dataset", "split", "on", "limit", "shard_size")},
        }
    )
    description = folder / "features.json"
    if description.exists():
        before = json.loads(description.read_text())
        before |= {name: os.path.expanduser(before[name]) for name in ("encoder", "dataset") if name in before}
        if before != about:
            differing = ", ".join(f"{name} (there {before.get(name)!r}, here {about[name]!r})" for name in about
                                  if before.get(name) != about[name])  # fmt: skip
            raise ConfigError(f"--output={folder} holds features of another {differing}: choose another folder")
    source = subject.source(settings, settings.split, encoder.preprocessing)
    files.write_json(description, about)

    shards = sorted(folder.glob("features-*.npz"))
    last = int(np.load(shards[-1])["ids"][-1]) if shards else -1
    if shards:
        log.info(f"Going on after image {last}, the last of {shards[-1]}.")
    most = min(settings.limit or source.size, source.size)
    views = central(source.in_order(settings.limit or None, after=last), encoder.preprocessing)
    batches = stream(lambda images: encoder.encode(images)[settings.on], views, most)
    paths, number, written = source.paths, len(shards), 0
    for features, labels, ids in _regrouped(batches, settings.shard_size):
        arrays = {"features": features, "labels": labels, "ids": ids}
        if paths is not None:
            arrays["paths"] = np.array([os.fsdecode(path) for path in paths.numpy()[ids]])
        files.write_arrays(folder / f"features-{number:05d}.npz", arrays)
        number, written = number + 1, written + len(ids)
    rate = written / (time.monotonic() - started)
    log.info(f"{written} images of {source.name} encoded, {rate:.0f} images/s; {folder} holds {number} files.")


def _regrouped(batches, size):
    """Batches of arrays of equal length -> the same rows, `size` at a time; the last part may be smaller."""
    kept, count = [], 0
    for batch in batches:
        kept.append(batch)
        count += len(batch[0])
        while count >= size:
            whole = [np.concatenate(part) for part in zip(*kept, strict=True)]
            yield [part[:size] for part in whole]
            kept, count = [[part[size:] for part in whole]], count - size
    if count:
        yield [np.concatenate(part) for part in zip(*kept, strict=True)]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
