"""What a longer queue costs a step of MoCo, in time and memory, from K 4,096 to 1,048,576 at batch 256.

    python -m benchmarks.queue

Each K gets a process of its own. It times InfoNCE with its gradient, and the enqueuing of 256 keys of 128 numbers, as
in `MoCo.train_step`, but without an encoder. A peak is the growth of resident memory from before the queue is made,
less the queue itself. Writes docs/results/bench/queue.json.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

from benchmarks import results

OUTPUT = results.file("queue")
BATCH, DIM = 256, 128


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", default="4096,16384,65536,262144,1048576", help="K")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--output", type=Path, default=OUTPUT)
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)  # measure this K, in this process
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(measure(arguments.one, arguments.rounds)))
        return
    rows = []
    print(f"batch {BATCH}, {DIM} numbers a key, medians of {arguments.rounds}")
    print(f"{'K':>9} {'loss and gradient, ms':>22} {'enqueue, ms':>12} {'queue, MB':>10} {'peak beyond it, MB':>19}")
    for size in map(int, arguments.sizes.split(",")):
        command = [sys.executable, "-m", "benchmarks.queue", f"--one={size}", f"--rounds={arguments.rounds}"]
        row = json.loads(
            subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1]
        )
        print(
            f"{size:9} {row['loss_ms']:22.2f} {row['enqueue_ms']:12.2f} {row['queue_mb']:10.1f} "
            f"{row['peak_beyond_mb']:19.1f}"
        )
        rows.append(row)
    results.write(arguments.output, {"batch": BATCH, "rounds": arguments.rounds, "rows": rows})


def measure(size, rounds):
    from moco_tf.startup import load_tensorflow

    load_tensorflow(training=True)
    import tensorflow as tf

    from moco_tf.methods.losses import info_nce, unit_length
    from moco_tf.methods.queue import Queue

    queries, keys = (unit_length(tf.random.stateless_normal((BATCH, DIM), (0, side))) for side in range(2))
    tf.linalg.matmul(queries, keys, transpose_b=True).numpy()  # starts the runtime
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    queue = Queue(size, DIM)

    @tf.function
    def loss():
        with tf.GradientTape() as tape:
            tape.watch(queries)
            contrast = info_nce(queries, keys, queue.keys.value, 0.2)
        return *contrast, tape.gradient(contrast.loss, queries)

    enqueue = tf.function(lambda: queue.enqueue(keys))
    found = {loss: [], enqueue: []}
    for _ in range(rounds + 1):  # the first traces
        for function, times in found.items():
            begin = time.perf_counter()
            for value in (*(function() or ()), queue.pointer.value):
                value.numpy()
            times.append(1e3 * (time.perf_counter() - begin))
    queue_mb = size * DIM * 4 / 1e6
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    return {
        "K": size,
        "loss_ms": round(statistics.median(found[loss][1:]), 3),
        "enqueue_ms": round(statistics.median(found[enqueue][1:]), 3),
        "queue_mb": round(queue_mb, 1),
        "peak_beyond_mb": round(peak * 1024 / 1e6 - queue_mb, 1),
    }


if __name__ == "__main__":
    main()
