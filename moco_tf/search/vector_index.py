"""Nearest vectors by inner product, in a faiss index: of which kind, how it is built, written, read and asked.

Vectors are of unit length, so that inner products are cosines. Axes: N vectors, D numbers of each, Q queries.
"""

import math

import faiss
import numpy as np

from moco_tf.command import ConfigError

FLAT_UP_TO = 200_000  # vectors: exact search of one takes some 20 ms there on a core, at 512 numbers each
MEMORY = 8 * 2**30  # bytes that an HNSW index may take
LINKS = 32  # M of HNSW: neighbours of a vector in the graph, twice as many in its lowest layer
BUILD_BREADTH, SEARCH_BREADTH = 80, 128  # efConstruction, efSearch of HNSW
PROBES = 32  # lists of IVF that a query looks into
PER_LIST = 64  # vectors of the sample that IVF's lists are trained on, for each list
CODES = 256  # of a part of a vector, a byte
REFINED = 10  # IVF-PQ's codes are coarse: of so many times k candidates the vectors themselves choose k


def choose(count, width):
    """The kind of index for (N, D): "flat", exact, up to 200,000 vectors; "hnsw" up to 8 GiB; else "ivfpq".

    HNSW takes 2 bytes a number, and 4 a link.
    """
    if count <= FLAT_UP_TO:
        return "flat"
    return "hnsw" if count * (2 * width + 4 * 2 * LINKS) <= MEMORY else "ivfpq"


def build(kind, vectors):
    """A faiss index of vectors, which are read in blocks.

    Args:
      kind: "flat", "hnsw" or "ivfpq"; vectors: float16 (N, D), of unit length, N > 0.

    Raises:
      ConfigError: too few vectors to learn IVF-PQ's codes of.
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
        index.do_polysemous_training = False  # orders codes for a filter that is not used here, in many seconds
        index.cp.min_points_per_centroid = index.pq.cp.min_points_per_centroid = 1  # says nothing of few vectors
        sample = np.random.default_rng(0).choice(count, min(count, max(PER_LIST * lists, 2**16)), replace=False)
        index.train(vectors[np.sort(sample)].astype(np.float32))
    else:
        index.train(vectors[:1].astype(np.float32))  # nothing is learnt for 16 bits, but faiss asks for it
    for block in blocks(vectors):
        index.add(block)
    return index


def blocks(vectors, size=8192):
    """Vectors (N, D) as blocks of float32 (n, D)."""
    for first in range(0, len(vectors), size):
        yield np.asarray(vectors[first : first + size], np.float32)


def search(index, kind, vectors, queries, k):
    """The k nearest vectors of each query, the nearest first.

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
    """Writes an index to a file; by Python, which takes all names and tells of a full disk: faiss' own last bytes may
    be lost without an error."""
    with open(path, "wb") as file:
        faiss.write_index(index, faiss.PyCallbackIOWriter(file.write))


def read(path, shape):
    """The index in a file, of vectors of this shape (N, D).

    Raises:
      ValueError: there is none, or not one that faiss reads, or one of other vectors.
    """
    try:
        with open(path, "rb") as file:
            index = faiss.read_index(faiss.PyCallbackIOReader(file.read))
    except OSError as error:
        raise ValueError(error.strerror) from None
    except (RuntimeError, MemoryError):  # whose messages name faiss' own lines
        raise ValueError("faiss cannot read it") from None
    if (index.ntotal, index.d) != tuple(shape):
        raise ValueError(f"it holds {index.ntotal} vectors of {index.d} numbers, not {shape[0]} of {shape[1]}")
    return index


def _lists(count):
    """How many lists IVF divides N vectors into: the power of 2 next to 4 sqrt(N), as faiss' guidelines have it."""
    return 2 ** round(math.log2(max(1, min(4 * math.sqrt(count), count / 4))))


def _code_bytes(width):
    """Bytes that stand for a vector: the largest divisor of D that is at most D / 4."""
    return max(m for m in range(1, max(1, width // 4) + 1) if width % m == 0)
