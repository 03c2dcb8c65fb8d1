"""Finds nearest vectors by inner product in a faiss index: chooses its kind, builds, writes, reads and searches it.

Vectors have unit length, so inner products are cosines. Axes: N vectors, D numbers of each, Q queries.
"""

import math

import faiss
import numpy as np

from moco_tf.command import ConfigError

FLAT_UP_TO = 200_000  # vectors: here an exact search takes about 20 ms on a core, at 512 numbers each
MEMORY = 8 * 2**30  # bytes that an HNSW index may take
LINKS = 32  # M of HNSW: neighbours of a vector in the graph, twice as many in its lowest layer
BUILD_BREADTH, SEARCH_BREADTH = 80, 128  # efConstruction, efSearch of HNSW
PROBES = 32  # lists of IVF that a query searches
PER_LIST = 64  # vectors per list in the sample that trains IVF's lists
CODES = 256  # for each part of a vector, so a code is a byte
REFINED = 10  # IVF-PQ's codes are coarse: the search takes this times k candidates, and exact cosines choose k


def choose(count, width):
    """Returns the kind of index for (N, D): "flat", exact, up to 200,000 vectors; "hnsw" up to 8 GiB; else "ivfpq".

    HNSW takes 2 bytes per number, and 4 bytes per link.
    """
    if count <= FLAT_UP_TO:
        return "flat"
    return "hnsw" if count * (2 * width + 4 * 2 * LINKS) <= MEMORY else "ivfpq"


def build(kind, vectors):
    """Builds a faiss index of vectors; reads the vectors in blocks.

    Args:
      kind: "flat", "hnsw" or "ivfpq"; vectors: float16 (N, D), of unit length, N > 0.

    Raises:
      ConfigError: there are too few vectors to learn IVF-PQ's codes.
    """
    count, width = vectors.shape
    if kind == "ivfpq" and count < CODES:
        raise ConfigError(f"--index_type=ivfpq learns {CODES} codes of as many images; got {count}: flat suits them")
    lists = _lists(count)
    name = {
        "flat": "SQfp16",
        "hnsw": f"HNSW{LINKS}_SQfp16",
        "ivfpq": f"IVF{lists},PQ{_code_bytes(width)}x8",
    }
    index = faiss.index_factory(width, name[kind], faiss.METRIC_INNER_PRODUCT)
    if kind == "hnsw":
        index.hnsw.efConstruction = BUILD_BREADTH
        index.hnsw.efSearch = SEARCH_BREADTH
    if kind == "ivfpq":
        index.nprobe = min(PROBES, lists)
        index.do_polysemous_training = False  # takes many seconds, for a filter that is not used here
        index.cp.min_points_per_centroid = index.pq.cp.min_points_per_centroid = 1  # no warning for few vectors
        sample = np.random.default_rng(0).choice(count, min(count, max(PER_LIST * lists, 2**16)), replace=False)
        index.train(vectors[np.sort(sample)].astype(np.float32))
    else:
        index.train(vectors[:1].astype(np.float32))  # 16 bits need no training, but faiss requires the call
    for block in blocks(vectors):
        index.add(block)
    return index


def blocks(vectors, size=8192):
    """Yields vectors (N, D) in blocks of float32 (n, D)."""
    for first in range(0, len(vectors), size):
        yield np.asarray(vectors[first : first + size], np.float32)


def search(index, kind, vectors, queries, k):
    """Finds the k nearest vectors of each query, the nearest first.

    Args:
      index, kind, vectors: as `build` makes and takes them; queries: (Q, D), of unit length.

    Returns:
      cosines float32 (Q, k), rows int64 (Q, k), -1 where an approximate index finds no more.
    """
    k = min(k, len(vectors))
    queries = np.ascontiguousarray(queries, np.float32)
    if kind != "ivfpq":
        return index.search(queries, k)
    _, rows = index.search(queries, min(REFINED * k, len(vectors)))
    cosines = np.full(rows.shape, -np.inf, np.float32)
    for query in range(len(queries)):
        found = rows[query] >= 0
        cosines[query, found] = vectors[rows[query, found]].astype(np.float32) @ queries[query]
    best = np.argsort(-cosines, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(cosines, best, 1), np.take_along_axis(rows, best, 1)


def write(index, path):
    """Writes an index to a file with Python.

    Python takes all file names and reports a full disk. faiss itself may lose the last bytes without an error.
    """
    with open(path, "wb") as file:
        faiss.write_index(index, faiss.PyCallbackIOWriter(file.write))


def read(path, shape):
    """Reads the index in a file, for vectors of this shape (N, D).

    Raises:
      ValueError: there is no file, or faiss cannot read it, or its vectors have another shape.
    """
    try:
        with open(path, "rb") as file:
            index = faiss.read_index(faiss.PyCallbackIOReader(file.read))
    except OSError as error:
        raise ValueError(error.strerror) from None
    except (RuntimeError, MemoryError):  # their messages name lines of faiss' source
        raise ValueError("faiss cannot read it") from None
    if (index.ntotal, index.d) != tuple(shape):
        raise ValueError(f"it holds {index.ntotal} vectors of {index.d} numbers, not {shape[0]} of {shape[1]}")
    return index


def _lists(count):
    """Returns the number of IVF's lists for N vectors: the power of 2 nearest 4 sqrt(N), as in faiss' guidelines."""
    return 2 ** round(math.log2(max(1, min(4 * math.sqrt(count), count / 4))))


def _code_bytes(width):
    """Returns the bytes of a vector's code: the largest divisor of D that is at most D / 4."""
    return max(m for m in range(1, max(1, width // 4) + 1) if width % m == 0)
