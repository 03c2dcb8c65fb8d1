"""A file that lists images: text with a path a line, or a table, CSV or Parquet, with a column of paths.

`read` makes the `Listing` that a folder would give. docs/data.md states the policies.
"""

import collections
import csv
import os
from pathlib import Path

import numpy as np

from moco_tf import files
from moco_tf.data.folder import Besides, Listing, counted, size_and_time, some, suffixes
from moco_tf.data.splits import folded, meant_by
from moco_tf.files import printable

TEXT, TABLES = ".txt", (".csv", ".parquet")
PATH, LABEL, SPLIT = ("path", "file", "filename", "image"), ("label", "class"), ("split",)  # the first that is there
LOOKED_AT = 2**16  # bytes within which a text's first line ends, if it is a path


def is_at(path, channels=3):
    """Whether a file lists images: it is .csv or .parquet, or .txt with a first line that ends like an image's name.

    Any other .txt has sentences (`texts.are_at`), and so has one whose first line has a tab.
    """
    path = Path(path)
    if not path.is_file():
        return False
    if path.suffix.lower() in TABLES:
        return True
    if path.suffix.lower() != TEXT:
        return False
    with open(path, "rb") as file:
        lines = file.read(LOOKED_AT).removeprefix(b"\xef\xbb\xbf").splitlines()
    first = next((line for line in lines if line.strip()), b"")
    return b"\t" not in first and os.fsdecode(first).rstrip().lower().endswith(suffixes(channels))


def read(path, split, begun=False, channels=3):
    """The `Listing` of a split of the images that a file lists, sorted by path.

    A relative path starts from the folder of the file. A table with a column `split` has the splits that the column
    names, by the rules of `splits.meant_by`. Any other file is the same for every split.

    begun: whether a run is under way; `check_files` will find its images, whatever the split means by now.

    Raises:
      ValueError: the file cannot be read, has no column of paths, lists no image, or lists one under two labels.
    """
    path = Path(path)
    try:
        paths, labels, splits = _of_text(path) if path.suffix.lower() == TEXT else _of_table(path)
    except OSError as error:
        raise ValueError(f"{printable(path)} cannot be read: {error.strerror}. Allow reading it.") from None
    names = sorted({label for label in labels if label}, key=_by_number)
    notes = []
    if splits:
        counts = collections.Counter(name for name in splits if name)
        there = sorted(counts)
        meant = there if begun and not meant_by(split, there) else meant_by(split, there)
        spelt = set(map(folded, meant))
        if len(spelt) != 1 and not begun:
            what = f"can mean each of {some(meant)}" if meant else "is none of them"
            raise ValueError(f"{printable(path)} has the splits {some(there)}; {split!r} {what}. Name one of them.")
        numbers = [number for number, name in enumerate(splits) if folded(name) in spelt]
        paths, labels = [paths[number] for number in numbers], [labels[number] for number in numbers]
        notes.append(f"Splits of {printable(path)}: {counted(sorted(counts.items()))}")
    label_of = {}
    for file, label in zip(paths, labels, strict=True):
        if file and label_of.setdefault(file, label) != label:
            raise ValueError(
                f"{printable(path)} lists {printable(file)} as {printable(label_of[file] or 'nothing')} and as "
                f"{printable(label or 'nothing')}: an image has one label. Leave one of the lines."
            )
    if not label_of:
        raise ValueError(f"{printable(path)} lists no image: it has a path a line.")
    if repeated := sum(map(bool, paths)) - len(label_of):
        notes.append(f"Listed more than once, and taken once: {repeated}")
    root, files = path.parent, sorted(label_of)
    sizes, times = np.array([size_and_time(os.path.join(root, file)) for file in files], np.int64).T
    return Listing(
        root, tuple(names), files, sizes, times, Besides(), root, tuple(notes), (), label_of, path, channels
    )


def _of_text(path):
    """Returns (paths, labels, no splits); the labels are empty."""
    lines = path.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n")
    paths = [os.fsdecode(line.removesuffix(b"\r")).removeprefix("./") for line in lines if line.strip()]
    return paths, [""] * len(paths), None


def _of_table(path):
    """Returns (paths, labels, splits or None) of the rows; a value that a row does not have is empty."""
    columns = _parquet(path) if path.suffix.lower() == ".parquet" else _csv(path)
    named = {name.strip().lower(): values for name, values in columns.items()}
    column = lambda wanted: next((named[name] for name in wanted if name in named), None)  # noqa: E731
    paths, labels, splits = column(PATH), column(LABEL), column(SPLIT)
    if paths is None:
        raise ValueError(
            f"{printable(path)} has a column of paths, called {', '.join(PATH[:-1])} or {PATH[-1]}; its columns are "
            f"{some(list(columns)) or 'none'}. Name it so in the first line."
        )
    paths = [file.removeprefix("./") for file in paths]
    return paths, labels or [""] * len(paths), splits


def _csv(path):
    """{column: its values as text}; bytes that are not UTF-8 stay as they are."""
    with open(path, newline="", encoding="utf-8-sig", errors="surrogateescape") as file:
        rows = csv.reader(file)
        try:
            names = next(rows, [])
            columns = [[] for _ in names]
            for row in rows:
                if row and len(row) != len(names):
                    raise ValueError(
                        f"line {rows.line_num} of {printable(path)} has {len(row)} columns, the first {len(names)}: "
                        "put what has a comma in quotes"
                    )
                for values, value in zip(columns, row, strict=False):
                    values.append(value)
        except csv.Error as error:
            raise ValueError(f"line {rows.line_num} of {printable(path)} is no CSV: {error}") from None
    return dict(zip(names, columns, strict=True))


def _parquet(path):
    """{column: its values as text}, of columns of text, numbers and yes or no; others are not read."""
    try:
        import pyarrow as pa
        from pyarrow import parquet
    except ImportError:
        raise ValueError("Parquet needs the package pyarrow: pip install pyarrow; or give a CSV") from None
    try:
        file = parquet.ParquetFile(path)
        of = pa.types
        kinds = (of.is_string, of.is_large_string, of.is_integer, of.is_floating, of.is_boolean, of.is_dictionary)
        wanted = [field.name for field in file.schema_arrow if any(is_kind(field.type) for is_kind in kinds)]
        table = file.read([name for name in wanted if name.strip().lower() in (*PATH, *LABEL, *SPLIT)])
        texts = {name: _texts(table[name], pa) for name in table.column_names}
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{printable(path)} is no Parquet that can be read: {files.first_line(error)}") from None
    return {name: ["" if value is None else value for value in values] for name, values in texts.items()}


def _texts(column, pa):
    """A column's values as text. pandas keeps whole numbers of which some are missing as 3.0 and NaN."""
    if pa.types.is_floating(column.type):
        values = column.to_pylist()
        return [None if x is None or x != x else f"{x:.0f}" if x.is_integer() else str(x) for x in values]
    return column.cast(pa.string()).to_pylist()


def _by_number(name):
    """A key that sorts whole numbers by value, before all other names."""
    return (0, int(name), name) if name.isascii() and name.isdigit() else (1, 0, name)
