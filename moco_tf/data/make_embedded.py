"""Makes the packaged data set out of CIFAR-10 as image files.

    python -m moco_tf.data.make_embedded --source=DIR

DIR has train/<class>/*.jpg and test/<class>/*.jpg. The first 1,000 training and 200 test files of each class, by name,
are kept byte for byte. The same files give the same output, byte for byte.
"""

import pathlib

import tensorflow as tf
from absl import app, flags

from moco_tf.data.sources import CIFAR10_CLASSES, EMBEDDED

PER_CLASS = {"train": 1000, "test": 200}


def define_flags():
    flags.DEFINE_string("source", None, "Folder with train/<class>/*.jpg and test/<class>/*.jpg.", required=True)
    flags.DEFINE_string("output", str(EMBEDDED), "Folder for train.tfrecord.gz and test.tfrecord.gz.")
    for name in ("source", "output"):
        flags.declare_key_flag(name)


def first_files(source, split):
    """(path, label) of the files to keep, the classes in turn, so that any first part is balanced."""
    by_class = [sorted((source / split / name).glob("*.jpg"))[: PER_CLASS[split]] for name in CIFAR10_CLASSES]
    for name, files in zip(CIFAR10_CLASSES, by_class, strict=True):
        if len(files) < PER_CLASS[split]:
            raise ValueError(f"{source / split / name} must hold {PER_CLASS[split]} images, it has {len(files)}.")
    return [(file, label) for row in zip(*by_class, strict=True) for label, file in enumerate(row)]


def write(files, output):
    options = tf.io.TFRecordOptions(compression_type="GZIP", compression_level=9)
    with tf.io.TFRecordWriter(str(output), options) as writer:
        for file, label in files:
            example = tf.train.Example()
            example.features.feature["image"].bytes_list.value.append(file.read_bytes())
            example.features.feature["label"].int64_list.value.append(label)
            writer.write(example.SerializeToString(deterministic=True))


def main(argv):
    if len(argv) > 1:
        raise app.UsageError(f"Everything is given as a flag, not as {argv[1:]}.")
    output = pathlib.Path(flags.FLAGS.output)
    output.mkdir(parents=True, exist_ok=True)
    for split in PER_CLASS:
        write(first_files(pathlib.Path(flags.FLAGS.source), split), output / f"{split}.tfrecord.gz")


if __name__ == "__main__":
    define_flags()
    app.run(main)
