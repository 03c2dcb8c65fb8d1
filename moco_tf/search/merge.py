"""`python -m moco_tf.search.merge --index=INDEX`: makes one index of the shards that several machines have built.

Takes the folders INDEX/shard-1-of-16 to shard-16-of-16, as moco_tf.search.build --shard=... writes them, and leaves
them where they are. Encodes nothing.
"""

import dataclasses
import logging
import re
import sys
from pathlib import Path

from moco_tf import command
from moco_tf.command import ConfigError
from moco_tf.files import printable
from moco_tf.search import settings as common

log = logging.getLogger("moco_tf")


@dataclasses.dataclass(frozen=True)
class Settings:
    index: str = command.flag("", "Folder that holds the shards' folders; the index is made in it.", path=True)
    index_type: str = command.flag("auto", "As of moco_tf.search.build.", choices=("auto", "flat", "hnsw", "ivfpq"))

    def __post_init__(self):
        command.check_values(self)
        common.require_index(self.index)


def main(arguments):
    """Runs the command; returns the process's exit status."""
    return common.run("moco_tf.search.merge", __doc__, Settings, merge, arguments)


def merge(settings):
    """Makes the index that the settings describe."""
    from moco_tf.search import index

    folder = Path(settings.index)
    opened = {path: index.read(path) for path in shards(folder)}
    first = next(iter(opened.values()))
    for path, shard in opened.items():
        for name in ("identity", "on"):
            if getattr(shard.about, name) != getattr(first.about, name):
                what = "another encoder" if name == "identity" else f"--on={shard.about.on}"
                raise ConfigError(f"{printable(path)} is of {what} than the first shard: build it as the others")
    with index.held(folder):
        about = index.begin(folder, first.about, first.about.identity, first.about.images)
        kind = None if settings.index_type == "auto" else settings.index_type
        about = index.write(folder, about, kind, [shard.part for shard in opened.values()])
    count = sum(len(shard.part.images) for shard in opened.values())
    log.info(f"{printable(folder)}: {about.index_type} index of {count} images, of {len(opened)} shards")


def shards(folder):
    """Returns the folders of all shards of an index.

    Raises:
      ConfigError: there are no shards, some are missing, or they belong to several divisions.
    """
    numbers = {}
    for path in Path(folder).glob("shard-*-of-*"):
        if match := re.fullmatch(r"shard-([0-9]+)-of-([0-9]+)", path.name):
            numbers.setdefault(int(match[2]), {})[int(match[1])] = path
    if len(numbers) != 1:
        has = ", ".join(f"{len(paths)} shards of {of}" for of, paths in sorted(numbers.items())) or "none"
        raise ConfigError(
            f"--index={printable(folder)} is to hold the folders of all shards of one division, shard-1-of-N to "
            f"shard-N-of-N; it has {has}"
        )
    ((of, paths),) = numbers.items()
    if missing := sorted(set(range(1, of + 1)) - set(paths)):
        named = ", ".join(f"shard-{number}-of-{of}" for number in missing)
        raise ConfigError(f"--index={printable(folder)} lacks {named}: build it with --shard={missing[0]}/{of}")
    return [paths[number] for number in sorted(paths)]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
