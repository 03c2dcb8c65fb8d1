"""Data sets that TensorFlow Datasets (TFDS) has prepared, as streams of encoded images; nothing is ever fetched.

Only files on disk are read, by the description beside them. Neither the code that made a set nor the network is
used. A record's id is its place in the split: the start of its shard plus its offset there.
"""

import dataclasses
import functools
import itertools
import logging
import os
import pathlib
import re
from collections.abc import Callable

import numpy as np
import tensorflow as tf

from moco_tf import files
from moco_tf.data import check, encoded
from moco_tf.data.pipeline import fixed, parallel_map
from moco_tf.data.sources import WHOLE, Permutation, Source, evenly_spread
from moco_tf.data.splits import meant_by

NAME = re.compile(r"(?P<set>[a-z][a-z0-9_]*)(/(?P<config>[\w.+-]+))?(:(?P<version>\d+\.\d+\.\d+))?")
SHARDS_AT_ONCE = 16  # TFRecord shards that are read at the same time
SHUFFLE_BYTES = 64 * 2**20  # of records that are held while their order is mixed
CHUNK = 64  # array_record records fetched in one call

log = logging.getLogger("moco_tf")


@dataclasses.dataclass(frozen=True, eq=False)
class Prepared:
    """A split of a prepared data set: a stream that holds a few records in memory, or a block of a TFRecord file.

    In array_record files any record can be sought, so the order of an epoch is a permutation of all records. TFRecord
    files can only be read through. There the order of the shards is permuted, and that of the records block by block.
    Entering an epoch in the middle reads the records before, without decoding them.

    A record whose image cannot be decoded is replaced on the way (`check.replace_bad`). That has the same cost in
    every run: all data of each image is read once more. If more than `max_bad_fraction` of the split is bad, the
    stream ends.
    """

    unit = "images"

    name: str
    instructions: tuple  # TFDS' FileInstructions: filename, skip, take, examples_in_shard
    parse: Callable  # a serialized record -> {"image": encoded, "label": -1 where unknown}
    class_names: tuple
    seekable: bool
    max_bad_fraction: float = 0.05
    bad: dict = dataclasses.field(default_factory=dict)  # ids of undecodable records met so far
    channels: int = 3  # as `Source` has it

    @functools.cached_property
    def _starts(self):
        return np.cumsum([0, *(shard.take for shard in self.instructions)])

    @property
    def size(self):
        return int(self._starts[-1])

    @functools.cached_property
    def labelled(self):
        """Whether the first record has a label."""
        return bool(next(iter(self.unchecked(1)))["label"] >= 0)

    @functools.cached_property
    def bytes(self):
        """Bytes of the split, as its share of the records of each file that holds some."""
        return sum(
            os.path.getsize(shard.filename) * shard.take // max(shard.examples_in_shard, 1)
            for shard in self.instructions
        )

    paths = None  # the images are not files

    def only(self, numbers):
        """A source of the records with these ids, held in memory; they are numbered anew."""
        wanted = np.zeros(self.size, bool)
        wanted[numbers] = True
        contents, labels = [], []
        for record in self.unchecked().filter(lambda record: tf.constant(wanted)[record["id"]]).as_numpy_iterator():
            contents.append(record["image"])
            labels.append(record["label"])
        with tf.device("CPU:0"):
            labels = tf.constant(labels, tf.int64)
            return Source(self.name, tf.constant(contents), labels, self.class_names, channels=self.channels)

    def shared_with(self, other):
        """Counts the records of another split of the set that this one has, too."""
        return sum(
            max(0, min(ours.skip + ours.take, theirs.skip + theirs.take) - max(ours.skip, theirs.skip))
            for ours, theirs in itertools.product(self.instructions, other.instructions)
            if ours.filename == theirs.filename
        )

    def in_order(self, limit=None, wanted=None):
        """Returns all good records once, by id, or about `limit` over all shards; keeps the `wanted`, bool (size,)."""
        return self._as_read(check.good_only(self.unchecked(limit, wanted)))

    def unchecked(self, limit=None, wanted=None):
        """Like `in_order`, but with the undecodable records."""
        numbers = evenly_spread(self.size, limit)
        if wanted is None:
            return self._parsed(self._numbered(numbers))
        if self.seekable:
            return self._parsed(self._numbered(numbers[wanted[numbers]]))
        return self._parsed(self._numbered(numbers).filter(lambda number, _: tf.constant(wanted)[number]))

    def shuffled(self, seed, start=0, per_epoch=None, share=WHOLE):
        """Endless (epoch, record) pairs from position `start` on; (seed, epoch) determine the order of an epoch.

        share: as in `Source.shuffled`; the records of all shares are read, since any may stand in for another.
        """
        order = Permutation(self.size, seed, per_epoch, self.name)
        first = start // check.WINDOW * check.WINDOW  # so that the same records stand in as without an interruption
        stream = self._sought(order, first) if self.seekable else self._read_through(order, first)
        epochs = tf.data.Dataset.counter(first).map(lambda position: position // order.per_epoch)
        mended = check.replace_bad(tf.data.Dataset.zip(epochs, self._parsed(stream)), self._note_bad)
        mended = self._as_read(mended.skip(start - first))
        first, count, of = share
        if count == of:
            return mended
        return (
            mended.enumerate()
            .filter(lambda i, _: (i % of >= first) & (i % of < first + count))
            .map(lambda _, record: record)
        )

    def cost_of_entering(self, place):
        """Says in a sentence what beginning at a place of an epoch costs; None if nothing is worth saying."""
        if self.seekable or not place:
            return None
        gigabytes = self.bytes * place / self.size / 1e9
        return (
            f"Going on inside an epoch reads {place} records ({gigabytes:.2f} GB) again, without decoding them: "
            "TFRecord files cannot be sought; a preparation with file_format='array_record' can."
        )

    def _note_bad(self, ids):
        for number in ids:
            if number not in self.bad:
                self.bad[number] = True
                shown = logging.WARNING if len(self.bad) <= 10 else logging.DEBUG
                log.log(shown, f"Undecodable image: {self.name}, record {number}; the next good one stands in.")
        if len(self.bad) > self.max_bad_fraction * self.size:
            raise ValueError(
                f"at most --max_bad_fraction={self.max_bad_fraction:g} of the images may be undecodable; of the "
                f"{self.size} in {self.name} {len(self.bad)} are, records {', '.join(map(str, list(self.bad)[:10]))}"
                f"{', ...' if len(self.bad) > 10 else ''}. Prepare the set anew, or allow more"
            )

    def read_as(self, channels):
        """This source with images of so many channels."""
        return self if channels == self.channels else dataclasses.replace(self, channels=channels)

    def _as_read(self, records):
        """Records, or (epoch, record) pairs, with pixels in place of encoded images where `channels` is not 3."""

        @tf.autograph.experimental.do_not_convert
        def decode(*element):
            *epoch, record = element
            record = record | {"image": encoded.decode(record["image"], self.channels)}
            return (*epoch, record) if epoch else record

        return records if self.channels == 3 else parallel_map(records, decode)

    def _parsed(self, numbered):
        """(id, serialized record) pairs -> records."""

        def parse(number, serialized):
            record = self.parse(serialized)
            return record | {"id": number, "label": tf.cast(record["label"], tf.int64)}

        return fixed(parallel_map(numbered, parse))

    def _numbered(self, numbers):
        """Returns (id, serialized record) pairs of ascending ids; TFRecord: as many of each shard, the first ones."""
        if self.seekable:
            return self._fetched(tf.data.Dataset.from_tensor_slices(numbers))
        takes = np.bincount(np.searchsorted(self._starts, numbers, "right") - 1, minlength=len(self.instructions))
        return tf.data.Dataset.from_tensor_slices(self._shards(takes)).flat_map(_read_shard)

    def _sought(self, order, start):
        return self._fetched(tf.data.Dataset.counter(start).map(lambda position: order(position)[1]))

    def _fetched(self, numbers):
        """Ids -> (id, serialized record) pairs out of array_record files."""
        from array_record.python.array_record_data_source import ArrayRecordDataSource

        records = ArrayRecordDataSource(list(self.instructions))

        def fetch(chunk):
            return np.array(records.__getitems__(chunk.tolist()), object)

        def fetched(chunk):
            serialized = tf.numpy_function(fetch, [chunk], tf.string, stateful=False)
            return chunk, tf.ensure_shape(serialized, (None,))

        return numbers.batch(CHUNK).map(fetched).prefetch(2).unbatch()

    def _read_through(self, order, start):
        """(id, serialized record) pairs in the order of training out of TFRecord files."""
        shards = self._shards([shard.take for shard in self.instructions])
        count = len(self.instructions)
        block = max(1, min(self.size, int(SHUFFLE_BYTES * self.size / self.bytes)))

        def mixed(epoch, place, *block):
            last = tf.size(block[0], tf.int64) - 1
            # A key other than the shards'. `index_shuffle` reads 32 bits of each of the key's two numbers.
            key = tf.random.experimental.stateless_fold_in(tf.stack([tf.constant(order.seed, tf.int64), epoch]), place)
            places = tf.random.experimental.index_shuffle(tf.range(last + 1), key, last)
            return tuple(tf.gather(values, places) for values in block)

        def one_epoch(epoch):
            key = tf.stack([tf.constant(order.seed, tf.int64), epoch])
            places = tf.random.experimental.index_shuffle(tf.range(count, dtype=tf.int64), key, count - 1)
            in_turns = tf.data.Dataset.from_tensor_slices(tuple(tf.gather(values, places) for values in shards))
            records = in_turns.interleave(_read_shard, cycle_length=SHARDS_AT_ONCE)
            blocks = records.batch(block).enumerate().map(lambda place, block: mixed(epoch, place, *block))
            return blocks.unbatch().take(order.per_epoch)

        return tf.data.Dataset.counter(start // order.per_epoch).flat_map(one_epoch).skip(start % order.per_epoch)

    def _shards(self, takes):
        """Tensors (shards,): path, records to skip, to take, id of the first."""
        return (
            tf.constant([str(shard.filename) for shard in self.instructions]),
            tf.constant([shard.skip for shard in self.instructions], tf.int64),
            tf.constant(takes, tf.int64),
            tf.constant(self._starts[:-1], tf.int64),
        )


def find(name, data_dir="", split="train", max_bad_fraction=0.05, annotations=None):
    """The `Prepared` split of a data set on disk.

    name: "set", "set/config" or "set:version". data_dir: the folder of TFDS' sets; '': TFDS' own default.
    split: in TFDS' language, such as "train[:90%]"; val, validation and test stand for one another if only one
    is there.
    annotations: a function that says what else of a record is wanted: (TFDS, features, name) -> (features to read, in
    the form of `PartialDecoding`; the classes' names; a function from an example to fields). None: the label.

    Raises:
      ValueError: the set is not prepared here (the message says how), or has no such split, image or annotations.
    """
    import tensorflow_datasets as tfds

    home = pathlib.Path(data_dir or tfds.core.constants.DATA_DIR).expanduser()
    folders = _prepared_folders(home, name)
    if not folders:
        raise ValueError(_how_to_prepare(tfds, home, name))
    if len({folder.parent for folder in folders}) > 1:
        configs = ", ".join(sorted({f"{folder.parent.relative_to(home)}" for folder in folders}))
        raise ValueError(f"{name} is prepared in several ways. Name one of them: {configs}.")
    info = tfds.builder_from_directory(files.for_tensorflow(folders[-1])).info
    formats = {"tfrecord": False, "array_record": True}
    if info.file_format is None or info.file_format.value not in formats:
        raise ValueError(
            f"{folders[-1]} holds {info.file_format and info.file_format.value} files. Prepare the set with "
            "file_format='array_record' (or 'tfrecord')."
        )
    instructions = _split(info.splits, name, split)
    image, label = _image_and_label(tfds, info.features, name)
    class_names = tuple(info.features[label].names) if label else ()
    wanted = fields = None
    if annotations:
        wanted, class_names, fields = annotations(tfds, info.features, name)
    return Prepared(
        f"{name} {split}",
        instructions,
        _parser(tfds, info.features, image, label, wanted, fields),
        class_names,
        formats[info.file_format.value],
        max_bad_fraction,
    )


def is_prepared(folder):
    """Whether a folder holds a data set of TFDS, as opposed to images."""
    return bool(_versions(pathlib.Path(folder)))


def _prepared_folders(home, name):
    """Folders of the prepared versions that `name` allows, the newest of a configuration last."""
    match = NAME.fullmatch(name)
    if not match:
        return []
    root = home / match["set"] / (match["config"] or "")
    return [folder for folder in _versions(root) if match["version"] in (None, folder.name)]


def _versions(root):
    folders = [file.parent for pattern in ("*/", "*/*/") for file in root.glob(f"{pattern}dataset_info.json")]
    versions = [folder for folder in folders if re.fullmatch(r"\d+\.\d+\.\d+", folder.name)]
    return sorted(versions, key=lambda folder: (folder.parent, [int(part) for part in folder.name.split(".")]))


def _how_to_prepare(tfds, home, name):
    match = NAME.fullmatch(name)
    if not match or match["set"] not in tfds.list_builders(with_community_datasets=False):
        return (
            "it is 'embedded', a folder of images, or the name of a data set of TFDS (see "
            f"https://www.tensorflow.org/datasets/catalog); there is no such folder or data set {name!r}"
        )
    # TFDS' own command line asks for Apache Beam, which is large and not needed here.
    command = (
        'python -c "import tensorflow_datasets as tfds; '
        f"tfds.builder('{name}', data_dir='{home}', file_format='array_record').download_and_prepare()\""
    )
    by_hand = tfds.builder_cls(match["set"]).MANUAL_DOWNLOAD_INSTRUCTIONS
    if not by_hand:
        return f"it is not prepared in {home}. Fetch and prepare it with: {command}"
    return (
        f"it is not prepared in {home}. Its files are to be fetched by hand into {home / 'downloads' / 'manual'} "
        f'("{" ".join(by_hand.split())}"), then prepared with: {command}'
    )


def _split(splits, name, split):
    """TFDS' FileInstructions of a split."""
    if len(meant := meant_by(split, list(splits))) == 1:
        (split,) = meant
    try:
        instructions = tuple(shard for shard in splits[split].file_instructions if shard.take)
    except (KeyError, ValueError, AssertionError) as error:
        cause = files.first_line(error.args[0] if error.args else error)
        raise ValueError(
            f"{name} has the splits {', '.join(splits)}, and TFDS' language such as train[:90%]; "
            f"got {split!r}: {cause}"
        ) from None
    if not instructions:
        raise ValueError(f"The split {split!r} of {name} holds no images. Take a larger part.")
    return instructions


def _image_and_label(tfds, features, name):
    """Returns the names of the features that hold the image and the label; None if there is no label."""
    images = [key for key, feature in features.items() if isinstance(feature, tfds.features.Image)]
    labels = [key for key, feature in features.items() if isinstance(feature, tfds.features.ClassLabel)]
    image = "image" if "image" in images else images[0] if len(images) == 1 else None
    if image is None or features[image].np_dtype != np.uint8:
        raise ValueError(f'{name} has no 8-bit images under "image": its features are {", ".join(features)}.')
    label = "label" if "label" in labels else labels[0] if len(labels) == 1 else None
    return image, label


def _parser(tfds, features, image, label, more=None, fields=None):
    """Returns a function: serialized record -> {"image": encoded, "label"} and what `fields` makes of `more` features.

    Other features are not looked at.
    """
    wanted = {name: True for name in (image, label) if name} | (more or {})
    partial = tfds.decode.PartialDecoding(wanted).extract_features(features)
    encoded = [
        name for name, feature in features.items() if isinstance(feature, tfds.features.Image) and name in wanted
    ]
    decoders = {name: tfds.decode.SkipDecoding() for name in encoded}

    def parse(serialized):
        example = partial.deserialize_example(serialized, decoders=decoders)
        record = {"image": example[image], "label": example[label] if label else tf.constant(-1, tf.int64)}
        return record | (fields(example | {"image": example[image]}) if fields else {})

    return parse


def _read_shard(path, skip, take, first):
    """(id, serialized record) pairs of a TFRecord file."""
    records = tf.data.TFRecordDataset(path, buffer_size=2**18).skip(skip).take(take)
    return records.enumerate(first)
