"""`python -m moco_tf.evaluate.features --encoder=DIR --dataset=photos --output=F`: features of any number of images.

Writes F/features-00000.npz, ...: `features` float32 (N, D), `labels` int64 (-1: unknown), `ids` int64 (numbers in
the data set), and `paths` where the images are files. Each file is whole or absent. The same command continues where
it stopped. F/features.json names the encoder and the images. --format=parquet also writes F/features.parquet, with a
map.
"""

import dataclasses
import logging
import os
import sys
import time
from pathlib import Path

import numpy as np

from moco_tf import command, files
from moco_tf.command import ConfigError
from moco_tf.evaluate import settings as common

RECORDED = ("dataset", "exif", "split", "on", "limit", "shard_size", "engine")  # in features.json
BEFORE = {"exif": False, "engine": "tensorflow"}  # the values of earlier versions, which lacked these flags

log = logging.getLogger("moco_tf")


@dataclasses.dataclass(frozen=True)
class Settings(common.Encoding):
    split: str = command.flag("train", "Split whose images are encoded; labels are not needed.")
    on: str = command.flag(
        "features",
        "features: the backbone's; embedding: the projection, of unit length.",
        choices=("features", "embedding"),
    )
    shard_size: int = command.flag(10_000, "Images a file: what is lost at most when the command is interrupted.")
    shard: str = command.flag(
        "", "Part of the images to encode here, as in 3/16, 1/16 to 16/16. '': all that no file in --output has."
    )
    format: str = command.flag(
        "npz",
        "npz: the files of --shard_size images; parquet: these, and one table of all, with a map in two dimensions.",
        choices=("npz", "parquet"),
    )

    NAME = "features"

    def __post_init__(self):
        super().__post_init__()
        command.require(self, self.shard_size > 0, "shard_size", "is more than 0")
        _, of = common.shard(self.shard)
        if of > 1 and self.format == "parquet":
            raise ConfigError(
                f"--format=parquet is a table of all images; got --shard={self.shard}: put the files of all shards "
                "into one folder, and give that as --output without --shard"
            )

    def resolved(self):
        for name in ("train_split", "eval_split"):
            if getattr(self, name):
                raise ConfigError(f"--split names the split here; got --{name}={getattr(self, name)}")
        return super().resolved()


def main(arguments):
    """Runs the command; returns the process's exit status."""
    return common.run("moco_tf.evaluate.features", __doc__, Settings, write, arguments)


def write(settings):
    """Writes the shards that the settings describe and that are missing."""
    from moco_tf.data.views import central
    from moco_tf.evaluate import engines, parquet, subject
    from moco_tf.evaluate.extract import stream

    if settings.format == "parquet":
        parquet.require()
    started = time.monotonic()
    folder = Path(settings.output)
    encoder, model = subject.encoder(settings)
    about = files.as_text(
        {
            "encoder": settings.encoder,
            "step": model.steps_done if model else None,  # the run may have been trained further since
            **{name: getattr(settings, name) for name in RECORDED},
        }
    )
    description = folder / "features.json"
    if description.exists():
        before = BEFORE | command.read_json(description)
        before |= {name: os.path.expanduser(before[name]) for name in ("encoder", "dataset") if name in before}
        if before != about:
            differing = ", ".join(f"{name} (there {before.get(name)!r}, here {about[name]!r})" for name in about
                                  if before.get(name) != about[name])  # fmt: skip
            raise ConfigError(f"--output={folder} holds features of another {differing}: choose another folder")
    source = subject.source(settings, settings.split, encoder.preprocessing)

    number, of = common.shard(settings.shard)
    name = "features" if of == 1 else f"features-{number}-of-{of}"
    shards = sorted(folder.glob(f"{name}-[0-9][0-9][0-9][0-9][0-9].npz"))
    wanted = np.arange(source.size) % of == number - 1
    known = sorted(folder.glob("features-*.npz")) if of == 1 else shards
    for shard in known:
        wanted[np.load(shard)["ids"]] = False
    if known:
        log.info(f"Going on: {len(known)} files are there, the last is {known[-1]}.")
    most = min(settings.limit or source.size, int(wanted.sum()))
    views = central(source.in_order(settings.limit or None, wanted), encoder.preprocessing)
    encoder = engines.of(encoder, settings.engine, views, most)  # a refused engine leaves no features.json
    files.write_json(description, about)
    batches = stream(lambda images: encoder.encode(images)[settings.on], views, most)
    paths, written = source.paths, 0
    for features, labels, ids in _regrouped(batches, settings.shard_size):
        arrays = {"features": features, "labels": labels, "ids": ids}
        if paths is not None:
            arrays["paths"] = np.array([os.fsdecode(path) for path in paths.numpy()[ids]])
        files.write_arrays(folder / f"{name}-{len(shards):05d}.npz", arrays)
        shards.append(folder / f"{name}-{len(shards):05d}.npz")
        written += len(ids)
    rate = written / (time.monotonic() - started)
    log.info(f"{written} images of {source.name} encoded, {rate:.0f} images/s; {folder} holds {len(shards)} files.")
    if settings.format == "parquet":
        table = folder / "features.parquet"
        parquet.write(table, sorted(folder.glob("features-*.npz")), source.class_names, settings.seed)
        log.info(f"Table: {table}")


def _regrouped(batches, size):
    """Yields the rows of batches of arrays of equal length, `size` at a time; the last part may be smaller."""
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
