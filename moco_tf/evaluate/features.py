"""`python -m moco_tf.evaluate.features --encoder=DIR --dataset=photos --output=F`: features of any number of images.

Writes F/features-00000.npz, ...: `features` float32 (N, D), `labels` int64 (-1: unknown), `ids` int64 (numbers in
the data set), and `paths` where the images are files. Each file is whole or absent. The same command continues where
it stopped. F/features.json names the encoder and the images. --format=parquet also writes F/features.parquet, with a
map.
"""

import dataclasses
import logging
import os
import re
import sys
import time
import zipfile
from pathlib import Path

import numpy as np

from moco_tf import command, files
from moco_tf.command import ConfigError
from moco_tf.evaluate import settings as common
from moco_tf.files import printable

RECORDED = ("dataset", "data_dir", "exif", "split", "on", "limit", "shard_size", "engine")  # in features.json
BEFORE = {"exif": False, "engine": "tensorflow", "data_dir": ""}  # of earlier versions, which lacked these flags
NAME = re.compile(r"(features(?:-\d+-of-\d+)?)-(\d{5,})\.npz")  # of a file of images

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
            "identity": encoder.identity,
            "step": model.steps_done if model else None,  # the run may have been trained further since
            **{name: getattr(settings, name) for name in RECORDED},
        }
    )
    description = folder / "features.json"
    if description.exists():
        before = {"identity": encoder.identity} | BEFORE | command.read_json(description)
        before |= {name: os.path.expanduser(before[name]) for name in ("encoder", "dataset") if name in before}
        if before != about:
            differing = ", ".join(f"{name} (there {before.get(name)!r}, here {about[name]!r})" for name in about
                                  if before.get(name) != about[name])  # fmt: skip
            raise ConfigError(f"--output={folder} holds features of another {differing}: choose another folder")
    source = subject.source(settings, settings.split, encoder.preprocessing)

    number, of = common.shard(settings.shard)
    name = "features" if of == 1 else f"features-{number}-of-{of}"
    known = _files(folder)
    wanted = np.arange(source.size) % of == number - 1
    for path in known:
        wanted[_ids(path, source)] = False
    first = 1 + max((place for of_name, place in known.values() if of_name == name), default=-1)
    if known:
        log.info(f"Going on: {len(known)} files are there, the last is {list(known)[-1]}.")
    most = min(settings.limit or source.size, int(wanted.sum()))
    views = central(source.in_order(settings.limit or None, wanted), encoder.preprocessing)
    encoder = engines.of(encoder, settings.engine, views, most)  # a refused engine leaves no features.json
    files.write_json(description, about)
    batches = stream(lambda images: encoder.encode(images)[settings.on], views, most)
    paths, written, shards = source.paths, 0, 0
    for features, labels, ids in _regrouped(batches, settings.shard_size):
        subject.check_finite(features, source.unit)
        arrays = {"features": features, "labels": labels, "ids": ids}
        if paths is not None:
            arrays["paths"] = _paths(source, ids)
        files.write_arrays(folder / f"{name}-{first + shards:05d}.npz", arrays)
        shards += 1
        written += len(ids)
    rate = written / (time.monotonic() - started)
    log.info(
        f"{written} images of {source.name} encoded, {rate:.0f} images/s; {folder} holds {len(known) + shards} files."
    )
    if settings.format == "parquet":
        table = folder / "features.parquet"
        parquet.write(table, list(_files(folder)), source.class_names, settings.seed)
        log.info(f"Table: {table}")


def _files(folder):
    """Returns {path: (name, number)} of the files of features in a folder, in their order."""
    found = {path: NAME.fullmatch(path.name) for path in folder.glob("features-*.npz")}
    places = {path: (match[1], int(match[2])) for path, match in found.items() if match}
    return dict(sorted(places.items(), key=lambda item: item[1]))


def _paths(source, ids):
    return np.array([os.fsdecode(path) for path in source.paths.numpy()[ids]])


def _ids(path, source):
    """Returns the numbers of the images that a file of features has.

    Raises:
      ConfigError: the file is damaged, or a number means another image in this source.
    """
    try:
        with np.load(path) as arrays:
            ids, paths = arrays["ids"], arrays.get("paths")
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise ConfigError(f"{printable(path)} cannot be read ({error}): remove it, and it is made anew") from None
    same = ids.max(initial=-1) < source.size and (paths is None) == (source.paths is None)
    if not same or (paths is not None and not np.array_equal(paths, _paths(source, ids))):
        raise ConfigError(
            f"--output={printable(path.parent)} numbers other images: {source.name} has gained or lost some since "
            f"{path.name} was written; choose another folder"
        )
    return ids


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
