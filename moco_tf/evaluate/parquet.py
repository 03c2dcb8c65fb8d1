"""Writes features and a map as one Parquet file, for databases and embedding browsers. Axes: N images, D numbers."""

import functools

import numpy as np

from moco_tf import files
from moco_tf.command import ConfigError
from moco_tf.evaluate import planar_map


def require():
    """Raises if a package is missing, before images are encoded."""
    try:
        import pyarrow.parquet  # noqa: F401
        import sklearn  # noqa: F401
    except ImportError as error:
        raise ConfigError(f"--format=parquet needs {error.name}: pip install 'moco_tf[search]'") from None


def write(path, shards, class_names, seed):
    """Writes a row for each image, shard by shard, in one step; one shard's vectors are in memory at a time.

    Columns: `path` text, null where images are no files, with invalid characters escaped; `id`, `label` int64;
    `class` text, null where there is no label; `vector` float32 (D,); `x`, `y` float32 from `planar_map.places`.

    Args:
      shards: files with `features` (n, D), `labels`, `ids` and, where the images are files, `paths`.
      seed: of the map.
    """
    import pyarrow as pa
    from pyarrow import parquet

    features = [functools.partial(_array, shard, "features") for shard in shards]
    places = planar_map.places(features, seed)
    width = features[0]().shape[1]
    texts = {"path": pa.string(), "id": pa.int64(), "label": pa.int64(), "class": pa.string()}
    schema = pa.schema(texts | {"vector": pa.list_(pa.float32(), width), "x": pa.float32(), "y": pa.float32()})
    with files.aside(path) as writing, open(writing, "wb") as file, parquet.ParquetWriter(file, schema) as writer:
        for shard in shards:
            ids, labels, vectors = (_array(shard, name) for name in ("ids", "labels", "features"))
            paths = _array(shard, "paths")
            here, places = places[: len(ids)], places[len(ids) :]
            columns = [
                [None] * len(ids) if paths is None else [files.printable(name) for name in paths],
                ids,
                labels,
                [class_names[label] if label >= 0 else None for label in labels],
                pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel()), width),
                here[:, 0],
                here[:, 1],
            ]
            writer.write_table(pa.table(columns, schema=schema))


def _array(shard, name):
    with np.load(shard) as arrays:
        return arrays.get(name)
