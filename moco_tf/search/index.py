"""The folder of an index: its description, its images and vectors, and the faiss index of the vectors.

index.json records the encoder, its output and the folder of images, and names the folder, built-1 and so on, that
holds the rest: a `parts.Part` and vectors.faiss. A build writes a new folder beside the old one. The new folder is
valid once index.json names it. encoded/ holds parts that a build has encoded but has not yet added to the index.
"""

import contextlib
import dataclasses
import json
import logging
import os
import re
import shutil
import urllib.parse
from pathlib import Path

from moco_tf import files
from moco_tf.command import ConfigError
from moco_tf.files import printable
from moco_tf.search import parts, vector_index

DESCRIPTION = "index.json"
VERSION = 1
VECTORS = "vectors.faiss"
BUILT = re.compile(r"built-\d+")
PENDING = "encoded"
SHARD = "shard-{}-of-{}"  # the folder of a part of the images; it is an index itself until it is merged

log = logging.getLogger("moco_tf")


@dataclasses.dataclass(frozen=True)
class About:
    """The description of an index.

    Attributes:
      encoder: the path of the encoder; identity: its `Encoder.identity`; on: which of the encoder's outputs.
      images: the folder that the images' paths start from.
      index_type: "flat", "hnsw" or "ivfpq"; built: the name of the folder that holds it; None: nothing is built yet.
    """

    encoder: Path
    identity: str
    on: str
    images: Path
    index_type: str | None = None
    built: str | None = None


@dataclasses.dataclass(frozen=True, eq=False)
class Index:
    """An open index: its description, its `Part`, and the faiss index of its vectors."""

    about: About
    part: parts.Part
    vectors: object

    def search(self, queries, k):
        """Returns cosines float32 (Q, k) and numbers int64 (Q, k) of the images nearest to each query (Q, D)."""
        return vector_index.search(self.vectors, self.about.index_type, self.part.vectors, queries, k)

    def path(self, number):
        """Returns the path of the image with this number."""
        return self.about.images / self.part.images[number].path


def about(folder):
    """Returns the `About` of the index in a folder, or None if there is no index.

    Raises:
      ConfigError: index.json is damaged.
    """
    path = Path(folder) / DESCRIPTION
    if not path.exists():
        return None
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if values.pop("version") != VERSION:
            raise ConfigError(f"{printable(path)} is of another version of moco_tf: build the index anew")
        if values["built"] is not None and not BUILT.fullmatch(values["built"]):
            raise ValueError
        return About(**values | {name: _path(values[name]) for name in ("encoder", "images")})
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise ConfigError(f"{printable(path)} is damaged: move the folder away and build the index anew") from None


def describe(folder, about):
    """Writes index.json."""
    values = {"version": VERSION} | dataclasses.asdict(about)
    files.write_json(Path(folder) / DESCRIPTION, values | {n: _uri(values[n]) for n in ("encoder", "images")})


def read(folder):
    """Returns the `Index` in a folder.

    Raises:
      ConfigError: there is no index, or it is not finished or damaged.
    """
    folder = Path(folder)
    known = about(folder)
    if known is None or known.built is None:
        state = "holds no index" if known is None else "holds an index that is not finished"
        raise ConfigError(f"--index={printable(folder)} {state}: moco_tf.search.build makes it")
    part = parts.read(folder / known.built)
    return Index(known, part, _vectors(folder, known, part))


def _vectors(folder, about, part):
    file = Path(folder) / about.built / VECTORS
    try:
        return vector_index.read(file, part.vectors.shape)
    except ValueError as error:
        raise ConfigError(
            f"{printable(file)} is damaged ({error}): moco_tf.search.build makes it anew, and encodes nothing again"
        ) from None


def begin(folder, settings, identity, images):
    """Returns the `About` of an index that a build makes in a folder or continues.

    Args:
      settings: has `encoder` and `on`; identity: of the encoder; images: the folder of images, which may have moved.

    Raises:
      ConfigError: the folder holds an index of another encoder, or of another output of the encoder.
    """
    before = about(folder) or About(Path(settings.encoder), identity, settings.on, images)
    if before.identity != identity:
        raise ConfigError(
            f"{printable(folder)} holds an index of another encoder than --encoder={printable(settings.encoder)}, "
            "or of an earlier state of it: choose another --output"
        )
    if before.on != settings.on:
        raise ConfigError(
            f"{printable(folder)} holds an index of --on={before.on}; got --on={settings.on}: choose another --output"
        )
    return dataclasses.replace(before, encoder=Path(settings.encoder), images=images)


def pieces(folder, about):
    """Returns the parts in a folder: the part of the built index, and the parts encoded since."""
    built = [folder / about.built] if about.built else []
    places = (*built, *sorted((Path(folder) / PENDING).glob("[0-9]*")))
    return [dataclasses.replace(parts.read(place), vectors=parts.Closed(place)) for place in places]


def save(folder, images, broken, vectors):
    """Saves an encoded part, whole or not at all, for the next `write`; returns the part."""
    place = Path(folder) / PENDING
    files.make_folder(place)
    path = place / f"{len(list(place.glob('[0-9]*'))):06d}"
    with files.aside(path) as writing:
        writing.mkdir()
        parts.write(writing, images, broken, [vectors], vectors.shape[1])
    return parts.Part(images, broken, parts.Closed(path))


def is_whole(folder, about, part):
    """Says whether the index of this part is built and can be read."""
    try:
        return about.built is not None and bool(_vectors(folder, about, part))
    except ConfigError as error:
        log.warning(f"{error}. It is made anew.")
        return False


def write(folder, about, kind, pieces, wanted=None):
    """Builds the index of parts, which replaces the previous index once it is whole; returns its `About`.

    Args:
      kind: "flat", "hnsw" or "ivfpq"; None: the kind that suits the number of images.
      pieces, wanted: as `parts.merged` takes them.

    Raises:
      ConfigError: no image is left, or the disk is full.
    """
    folder = Path(folder)
    images, broken, blocks = parts.merged(pieces, wanted)
    if not images:
        raise ConfigError(f"none of the {len(broken)} images in {printable(about.images)} can be decoded")
    width = pieces[-1].vectors.shape[1]
    kind = kind or vector_index.choose(len(images), width)
    number = max((int(path.name.split("-")[1]) for path in folder.glob("built-*")), default=0) + 1
    about = dataclasses.replace(about, index_type=kind, built=f"built-{number}")
    with files.aside(folder / about.built) as writing:
        writing.mkdir()
        parts.write(writing, images, broken, blocks, width)
        vector_index.write(vector_index.build(kind, parts.read(writing).vectors), writing / VECTORS)
    describe(folder, about)
    for path in folder.glob("built-*"):
        if path.name != about.built:
            shutil.rmtree(path, ignore_errors=True)
    files.remove_folder(folder / PENDING)  # a part without some of its files would be called damaged
    return about


@contextlib.contextmanager
def held(folder):
    """Makes a folder and locks it, so that one process at a time writes to it.

    Raises:
      ConfigError: another process writes to the folder, or the folder cannot be made.
    """
    folder = Path(folder)
    try:
        files.make_folder(folder)
        lock = files.hold(folder / ".lock")
    except files.Held as mark:
        raise ConfigError(f"another process writes to {printable(folder)}: wait for it{mark}") from None
    except OSError as error:
        raise ConfigError(f"{printable(folder)} cannot be made or written to: {error.strerror}") from None
    with lock:
        for path in (*folder.glob(".writing-*"), *folder.glob(f"{PENDING}/.writing-*")):  # left by killed processes
            shutil.rmtree(path, ignore_errors=True)
        yield


def _uri(path):
    return Path(os.path.abspath(path)).as_uri()  # keeps the bytes of names that are not valid text


def _path(uri):
    return Path(os.fsdecode(urllib.parse.unquote_to_bytes(uri.removeprefix("file://"))))
