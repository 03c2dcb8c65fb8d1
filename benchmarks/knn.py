"""What kNN costs in a large bank: time, and the process's peak memory.

    python -m benchmarks.knn --bank=1000000 --width=2048 --queries=10000

Features are random numbers, drawn piece by piece; the bank itself is bank x width x 4 bytes.
"""

import argparse
import resource
import time

PIECE = 10_000  # rows drawn at a time


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bank", type=int, default=1_000_000)
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--queries", type=int, default=10_000)
    parser.add_argument("--classes", type=int, default=1000)
    parser.add_argument("--k", type=int, default=200)
    arguments = parser.parse_args()

    from moco_tf.startup import load_tensorflow

    load_tensorflow()
    import numpy as np

    from moco_tf.evaluate import nearest_neighbors

    rng = np.random.default_rng(0)
    bank = np.empty((arguments.bank, arguments.width), np.float32)
    for start in range(0, len(bank), PIECE):
        rng.standard_normal(out=bank[start : start + PIECE], dtype=np.float32)
    labels = rng.integers(0, arguments.classes, arguments.bank)
    queries = rng.standard_normal((arguments.queries, arguments.width), np.float32)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    began, worked = time.perf_counter(), time.process_time()
    nearest_neighbors.predict(bank, labels, queries, arguments.classes, arguments.k)
    ended, worked = time.perf_counter() - began, time.process_time() - worked
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(
        f"{arguments.queries} queries, bank {arguments.bank} x {arguments.width} ({bank.nbytes / 1e9:.2f} GB): "
        f"{ended:.0f} s of wall clock, {worked:.0f} s of processor time "
        f"({2e-9 * bank.size * len(queries) / worked:.0f} GFLOP a second of it); peak memory "
        f"{1024 * peak / 1e9:.2f} GB, before the search {1024 * before / 1e9:.2f} GB"
    )


if __name__ == "__main__":
    main()
