"""`python -m moco_tf.search.build --encoder=DIR --images=photos --output=INDEX`: indexes a folder of images.

Encodes all images at any depth of --images and writes the index that the other commands of moco_tf.search read.
Started again, the command continues where it stopped, encodes new and changed images, and drops images that are gone.
It never changes an image.
"""

import dataclasses
import logging
import os
import sys
import time
import zlib
from pathlib import Path

from moco_tf import command
from moco_tf.command import ConfigError
from moco_tf.data import archive
from moco_tf.evaluate import settings as evaluation
from moco_tf.files import printable
from moco_tf.search import settings as common

SHOWN = 10  # broken files that the screen names; broken.csv has all

log = logging.getLogger("moco_tf")


@dataclasses.dataclass(frozen=True)
class Settings:
    encoder: str = command.flag("", "What encodes: a run folder, or an exported SavedModel.", path=True)
    images: str = command.flag("", "Folder or archive (.zip, .tar) with the images, at any depth.", path=True)
    output: str = command.flag("", "Folder of the index, to make or to bring up to date.", path=True)
    on: str = command.flag(
        "features",
        "features: the backbone's; embedding: the projection. Both are scaled to unit length.",
        choices=("features", "embedding"),
    )
    index_type: str = command.flag(
        "auto",
        "flat: exact; hnsw: a graph; ivfpq: lists of short codes. auto: flat up to 200,000 images, then hnsw while it "
        "fits into 8 GiB, else ivfpq.",
        choices=("auto", "flat", "hnsw", "ivfpq"),
    )
    shard: str = command.flag(
        "", "Part of the images to encode here, as in 3/16, 1/16 to 16/16; moco_tf.search.merge joins them. '': all."
    )
    shard_size: int = command.flag(5000, "Images that are encoded between two savings: what an interruption loses.")
    engine: str = evaluation.engine_flag()

    def __post_init__(self):
        command.check_values(self)
        if not self.encoder or not self.images:
            raise ConfigError("give --encoder=DIR, --images=DIR and --output=DIR: see --help")
        common.require_folder(self.output, "output")
        command.require(self, self.shard_size > 0, "shard_size", "is more than 0")
        evaluation.shard(self.shard)
        evaluation.require_engine(self.engine)
        there = archive.exists(self.images)
        command.require(self, there, "images", "names a folder or an archive that is there")
        evaluation.recorded_run(self.encoder)


def main(arguments):
    """Runs the command; returns the process's exit status."""
    return common.run("moco_tf.search.build", __doc__, Settings, build, arguments)


def build(settings):
    """Updates the index that the settings describe."""
    from moco_tf.search import encode, index

    number, of = evaluation.shard(settings.shard)
    folder = Path(settings.output)
    if of > 1:
        folder /= index.SHARD.format(number, of)
    with index.held(folder), command.log_to_file(folder / "log.txt"):
        encoder = encode.open_encoder(settings)
        _update(settings, folder, encoder, _listing(settings, number, of, encoder.preprocessing.channels))


def _listing(settings, number, of, channels):
    """Returns the `folder.Listing` of all images, or of a shard; the bytes of a path alone decide its shard."""
    from moco_tf.data import folder

    try:
        listing = folder.scan(settings.images, ".", channels=channels)  # without splits
    except ValueError as error:
        raise ConfigError(f"--images={printable(settings.images)}: {printable(error)}") from None
    log.info(f"{printable(listing.path)}: {listing.size} images")
    if others := folder.not_read(listing.besides):
        log.info(f"  Not read: {others}")
    for name in listing.besides.unread:
        log.warning(
            f"  Not read: {printable(listing.path / name)}, a folder that cannot be opened; what is known stays."
        )
    of_shard = [i for i, file in enumerate(listing.files) if zlib.crc32(os.fsencode(file)) % of == number - 1]
    if not of_shard:
        raise ConfigError(f"--shard={settings.shard} gets none of the {listing.size} images: divide into fewer shards")
    return next(folder.divided(listing, of_shard, len(of_shard)))


def _update(settings, folder, encoder, listing):
    """Encodes the missing images; builds the index if images are new or gone, or if another index type is wanted."""
    from moco_tf.data.folder import divided
    from moco_tf.search import encode, index

    about = index.begin(folder, settings, encoder.identity, listing.path)
    pieces = index.pieces(folder, about)
    wanted, missing, gone = compare(listing, pieces)
    encoder = encode.by_engine(encoder, settings.engine, listing, missing)
    index.describe(folder, about)
    pieces += _encoded(settings, folder, encoder, divided(listing, missing, settings.shard_size), len(missing))
    kind = None if settings.index_type == "auto" else settings.index_type
    is_new = missing or gone or len(pieces) > 1 or kind not in (None, about.index_type)
    if is_new or not index.is_whole(folder, about, pieces[0]):
        about = index.write(folder, about, kind, pieces, wanted)
    built = index.read(folder)
    for file in built.part.broken[:SHOWN]:
        log.warning(f"  Cannot be decoded: {printable(listing.path / file.path)} ({printable(file.problem)})")
    if len(built.part.broken) > SHOWN:
        log.warning(f"  {len(built.part.broken) - SHOWN} more: {printable(folder / about.built / 'broken.csv')}")
    count, width = built.part.vectors.shape
    log.info(
        f"{printable(folder)}: {about.index_type} index of {count} images, {width} numbers each; "
        f"{len(built.part.broken)} files cannot be decoded"
    )


def compare(listing, pieces):
    """Compares a folder with the parts of an index.

    Returns:
      {path: (size, mtime_ns)} of the files that the index should hold, the numbers in the listing of the files to
      encode, and how many files are gone.

    Raises:
      ConfigError: none of the known files exists.
    """
    known = {path: stat for piece in pieces for path, stat in piece.known().items()}
    wanted = dict(zip(listing.files, zip(listing.sizes.tolist(), listing.times.tolist(), strict=True), strict=True))
    if known and known.keys().isdisjoint(wanted):
        raise ConfigError(
            f"--images={printable(listing.path)} has none of the {len(known)} images that the index is of: give their "
            "folder, or choose another --output"
        )
    missing = [number for number, file in enumerate(listing.files) if known.get(file) != wanted[file]]
    changed = sum(listing.files[number] in known for number in missing)
    closed = tuple(f"{name}/" for name in listing.besides.unread)
    wanted |= {file: stat for file, stat in known.items() if file.startswith(closed)}
    gone = sum(file not in wanted for file in known)
    if known:
        log.info(f"  Encoded before: {len(known)}; new: {len(missing) - changed}, changed: {changed}, gone: {gone}")
    return wanted, missing, gone


def _encoded(settings, folder, encoder, listings, total):
    """Yields the parts of listings, one after the other; saves each before it starts the next."""
    from moco_tf.search import encode, index

    started, done, function = time.monotonic(), 0, encode.function(encoder, settings.on)
    for listing in listings:
        part = encode.encode_listing(function, encoder.preprocessing, listing)
        yield index.save(folder, *part)
        done += listing.size
        log.info(f"  {done} of {total} images encoded, {done / (time.monotonic() - started):.0f} images/s")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
