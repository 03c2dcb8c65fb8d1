"""Sentences as records, {"text": string, "id", "label"}: a file with one per line, or a folder with a file per split.

A line is a sentence, or `label<TAB>sentence` in a file whose first line has a tab.
"""

import logging
from pathlib import Path

import numpy as np
import tensorflow as tf

from moco_tf.data.folder import ARRAYS, SUFFIXES
from moco_tf.data.sources import Source

log = logging.getLogger("moco_tf")
ENDING = ".txt"


class Texts(Source):
    """Sentences by number."""

    unit = "sentences"

    @tf.autograph.experimental.do_not_convert
    def record(self, index):
        """The record of this number, as graph operations."""
        index = tf.cast(index, tf.int64)
        return {"text": self.contents[index], "id": index, "label": self.labels[index]}


def are_at(path):
    """Whether a path has sentences: a file that ends in .txt, or a folder of such files without folders or images.

    Hidden entries do not count. `path_list.is_at`, which is asked first, tells lists of
    images from sentences.
    """
    path = Path(path)
    if not path.is_dir():
        return path.suffix == ENDING and path.is_file()
    entries = [entry for entry in path.iterdir() if not entry.name.startswith(".")]
    others = any(entry.suffix.lower() in (*SUFFIXES, *ARRAYS, ".tif", ".tiff") or entry.is_dir() for entry in entries)
    return not others and any(entry.suffix == ENDING for entry in entries)


def read(path, split):
    """Returns the `Texts` of a split of a folder, or of a file; all splits of a file are the same.

    Raises:
      ValueError: there is no such split, the file holds no sentence, or its content is not as it should be.
    """
    path = Path(path)
    file = path / f"{split}{ENDING}" if path.is_dir() else path
    if not file.exists():
        has = ", ".join(sorted(entry.stem for entry in path.glob(f"*{ENDING}")))
        raise ValueError(f"no split {split!r}: {path} has {has}, a text file each")
    try:
        lines = file.read_bytes().decode("utf-8-sig").removesuffix("\n").split("\n")
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise ValueError(f"line {line} of {file} is not UTF-8: save the file as UTF-8 text") from None
    numbered = [(number, line.strip(" \r")) for number, line in enumerate(lines, 1)]
    full = [(number, line) for number, line in numbered if any(letter.isalnum() for letter in line)]
    labelled = bool(full) and "\t" in full[0][1]
    sentences, names = [], []
    for number, line in full:
        label, *others = line.split("\t")
        if len(others) != labelled or (labelled and not label.strip()):
            rule = (
                "label<TAB>sentence, as the first one is" if labelled else "a sentence without a tab, as the first is"
            )
            raise ValueError(f"line {number} of {file} is not {rule}; got {line[:60]!r}")
        sentence = others[0] if labelled else line
        if any(letter.isalnum() for letter in sentence):  # else it would have no word, and its features no direction
            sentences.append(sentence)
            names.append(label)
    if not sentences:
        raise ValueError(f"{file} holds no sentence: a line is one, or label<TAB>sentence")
    if left_out := len(lines) - len(sentences):
        log.warning(f"  {left_out} of {len(lines)} lines of {file} have no word and are left out")
    classes = {name: place for place, name in enumerate(sorted(set(names)))} if labelled else {}
    labels = [classes[name] for name in names] if labelled else np.full(len(sentences), -1)
    with tf.device("CPU:0"):
        return Texts(str(file), tf.constant(sentences), tf.constant(labels, tf.int64), tuple(classes))
