"""What an approximate index is worth: recall@10 against exact search, milliseconds a query, seconds to build.

    python -m benchmarks.search_index --images=photos --encoder=runs/photos --vectors=1000000

The vectors are an encoder's, of random crops of a folder's images, with as many crops per image as needed. The queries
are other crops. All images have the same size. Writes docs/results/bench/search_index.json.
"""

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np

from benchmarks import results

BATCH, K = 500, 10
OUTPUT = results.file("search_index")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", required=True, help="folder of real images of one size")
    parser.add_argument("--encoder", required=True, help="run folder or SavedModel")
    parser.add_argument("--on", default="features", choices=("features", "embedding"))
    parser.add_argument("--vectors", type=int, default=1_000_000)
    parser.add_argument("--queries", type=int, default=1000)
    parser.add_argument("--kinds", default="flat,hnsw,ivfpq", help="flat first: it is exact")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    arguments = parser.parse_args()

    from moco_tf.startup import load_tensorflow

    load_tensorflow()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "vectors.npy"
        started = time.perf_counter()
        queries = encode(arguments, file)
        rows = {"encode": {"seconds": round(time.perf_counter() - started, 1)}}
        print(f"{arguments.vectors} vectors encoded in {rows['encode']['seconds']} s", flush=True)
        exact = None
        for kind in arguments.kinds.split(","):
            rows[kind], numbers = measure(kind, np.load(file, mmap_mode="r"), queries, Path(folder) / "index")
            exact = numbers if exact is None else exact
            hits = [len(set(a) & set(b)) / K for a, b in zip(exact.tolist(), numbers.tolist(), strict=True)]
            rows[kind]["recall_at_10"] = round(float(np.mean(hits)), 4)
            print(kind, rows[kind], flush=True)
    settings = {name: str(value) for name, value in vars(arguments).items() if name != "output"}
    results.write(arguments.output, {"settings": settings, "rows": rows})


def encode(arguments, file):
    """Writes unit vectors of crops, float16 (N, D), as .npy; returns the queries' vectors, float32 (Q, D)."""
    import tensorflow as tf

    from moco_tf.data import folder
    from moco_tf.data.manifest import check_files
    from moco_tf.search import encode

    encoder = encode.open_encoder(arguments)
    images = check_files(folder.scan(arguments.images, ".")).source().decoded
    side = images.shape[1]
    of_views = encode.function(encoder, arguments.on)

    @tf.function(input_signature=[tf.TensorSpec((BATCH,), tf.int64), tf.TensorSpec((), tf.int32)])
    def crops(numbers, seed):
        size = tf.random.stateless_uniform((BATCH, 1), (seed, 0), 0.5, 1.0)
        corner = tf.random.stateless_uniform((BATCH, 2), (seed, 1)) * (1 - size)
        boxes = tf.concat([corner, corner + size], axis=1)
        pixels = tf.cast(tf.gather(images, numbers), tf.float32)
        return encoder.preprocessing(tf.image.crop_and_resize(pixels, boxes, tf.range(BATCH), (side, side)))

    def vectors(first, seed):
        numbers = (first + np.arange(BATCH)) % len(images)
        return of_views(crops(numbers, seed)).numpy()[:, :-2]  # without brightness and contrast

    width = vectors(0, 0).shape[1]
    kept = np.lib.format.open_memmap(file, "w+", np.float16, (arguments.vectors, width))
    for first in range(0, arguments.vectors, BATCH):
        kept[first : first + BATCH] = vectors(first, first + 1)[: arguments.vectors - first]
    kept.flush()
    return np.concatenate([vectors(q * 7919, -1 - q) for q in range(0, arguments.queries, BATCH)])[: arguments.queries]


def measure(kind, vectors, queries, path):
    """A row of figures of an index of `vectors`, and the numbers (Q, K) that the index finds."""
    from moco_tf.search import vector_index

    started = time.perf_counter()
    vector_index.write(vector_index.build(kind, vectors), path)
    built = time.perf_counter() - started
    index = vector_index.read(path, vectors.shape)
    vector_index.search(index, kind, vectors, queries[:10], K)
    started = time.perf_counter()
    _, numbers = vector_index.search(index, kind, vectors, queries, K)
    together = time.perf_counter() - started
    started = time.perf_counter()
    for query in queries[:100]:
        vector_index.search(index, kind, vectors, query[None], K)
    alone = time.perf_counter() - started
    return {
        "build_seconds": round(built, 1),
        "megabytes": round(path.stat().st_size / 1e6),
        "ms_a_query_alone": round(1e3 * alone / min(100, len(queries)), 3),
        "ms_a_query_together": round(1e3 * together / len(queries), 3),
    }, numbers


if __name__ == "__main__":
    main()
