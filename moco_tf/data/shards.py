"""Writes a folder of JPEGs as a TFDS data set in array_record shards, which `tfds.py` reads; for `convert.py`.

Splits and classes are those that `folder.py` finds in the folder.
"""

import re
from pathlib import Path

from moco_tf import files, progress
from moco_tf.command import ConfigError
from moco_tf.data import folder
from moco_tf.files import printable

VERSION = "1.0.0"
SHARD_BYTES = 256 * 2**20
NAME = re.compile("[a-z][a-z0-9_]*")  # of a set, by the rule of TFDS


def refuse(output):
    """Raises `ConfigError` where no set can be written to the folder `output`, whose name is the set's."""
    if not NAME.fullmatch(Path(output).name):
        raise ConfigError(
            "the last part of --output is the name of the set: small letters, digits and _, a letter first; got "
            f"{printable(Path(output).name)!r}: give another"
        )
    if (Path(output) / VERSION).exists():
        raise ConfigError(
            f"{printable(output)} holds shards already, which nothing is added to: remove it, or give another --output"
        )


def write(parts, output):
    """Writes the images of the folder `parts` to `output`/1.0.0, in one step; returns a sentence on what it wrote."""
    import tensorflow_datasets as tfds
    from array_record.python.array_record_module import ArrayRecordWriter

    listings = {_split_name(split): folder.scan(parts, split) for split in folder.split_names(parts)}
    if len(listings) < len(folder.split_names(parts)):
        raise ConfigError(
            f"names of splits differ in letters, digits or _; got {folder.some(folder.split_names(parts))}"
        )
    class_names = next(iter(listings.values())).class_names
    features = {"image": tfds.features.Image(shape=(None, None, 3), encoding_format="jpeg")}
    if class_names:
        features["label"] = tfds.features.ClassLabel(names=list(class_names))
    features = tfds.features.FeaturesDict(features)
    infos = []
    with (
        files.aside(output / VERSION, replaces=False) as writing,
        progress.bar(sum(listing.size for listing in listings.values()), "images", "Writing shards") as bar,
    ):
        writing.mkdir()
        place = Path(files.for_tensorflow(writing))
        template = tfds.core.ShardedFileTemplate(
            data_dir=place, dataset_name=output.name, filetype_suffix="array_record"
        )
        for split, listing in listings.items():
            of_split = template.replace(split=split)
            count = -(-int(listing.sizes.sum()) // SHARD_BYTES)
            ends = [listing.size * (shard + 1) // count for shard in range(count)]
            numbered = iter(zip(listing.files, listing.labels, strict=True))
            for shard, (start, end) in enumerate(zip([0, *ends], ends, strict=False)):
                path = of_split.sharded_filepath(shard_index=shard, num_shards=count)
                writer = ArrayRecordWriter(str(path), "group_size:1")  # as TFDS does: any record can be sought
                for _ in range(start, end):
                    file, label = next(numbered)
                    record = {"image": (listing.path / file).read_bytes()} | ({"label": label} if class_names else {})
                    writer.write(features.serialize_example(features.encode_example(record)))
                    bar.update()
                writer.close()
            lengths = [end - start for start, end in zip([0, *ends], ends, strict=False)]
            infos.append(
                tfds.core.SplitInfo(
                    name=split,
                    shard_lengths=lengths,
                    num_bytes=int(listing.sizes.sum()),
                    filename_template=of_split,
                )
            )
        tfds.folder_dataset.write_metadata(
            data_dir=place,
            features=features,
            split_infos=infos,
            version=VERSION,
            filename_template=template,
            check_data=False,
        )
    splits = ", ".join(f"{name} {listing.size}" for name, listing in listings.items())
    return f"Splits: {splits}; read them with --dataset={printable(output)}"


def _split_name(split):
    """Returns a split's name in the form that files of TFDS can have."""
    return re.sub(r"\W", "_", split, flags=re.ASCII)
