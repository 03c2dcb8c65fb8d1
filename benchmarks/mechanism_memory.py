"""Measures the memory of each mechanism against K, and compares it with a formula.

    python -m benchmarks.mechanism_memory

Trains two steps of each mechanism at each K in a process of its own (32-pixel images, ResNet-10 of width 16, C 128),
and takes the process's peak of resident memory beyond its peak with TensorFlow loaded. The formulas, in float32, are:

    queue        K C                    its keys
    bank         R C                    a key for each of R records, whatever K is
    end-to-end   2 (K + 1) A            what the backward pass needs of both views of K + 1 images: the outputs of
                                        convolutions (BatchNorm reads them) and of ReLUs (the next layer does)

A step with the bank also holds the keys that it has drawn. In addition, all mechanisms hold the weights, and queue and
bank hold the activations of a batch of 128. Writes docs/results/bench/mechanism_memory.json.
"""

import argparse
import json
import resource
import subprocess
import sys
from pathlib import Path

from benchmarks import results

OUTPUT = results.file("mechanism_memory")
DIM, BATCH, SIDE, WIDTH = 128, 128, 32, 16
POINTS = {
    "queue": (1024, 4096, 65536, 262144),
    "bank": (1024, 4096, 65536, 262144),
    "end-to-end": (127, 511, 1023, 2047),
}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=int, default=1_281_167, help="of the bank; ImageNet-1k has the default")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    parser.add_argument("--one", nargs=2, metavar=("MECHANISM", "K"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        mechanism, size = arguments.one
        print(json.dumps(measure(mechanism, int(size), arguments.records)))
        return
    rows = []
    print(f"{'mechanism':12} {'K':>7} {'peak, MB':>9} {'formula, MB':>12}")
    for mechanism, sizes in POINTS.items():
        for size in sizes:
            command = [sys.executable, "-m", "benchmarks.mechanism_memory", f"--records={arguments.records}"]
            done = subprocess.run(
                [*command, "--one", mechanism, str(size)], check=True, capture_output=True, text=True
            )
            rows.append(json.loads(done.stdout.splitlines()[-1]))
            print(f"{mechanism:12} {size:7} {rows[-1]['peak_mb']:9.0f} {rows[-1]['formula_mb']:12.1f}", flush=True)
    results.write(arguments.output, {"command": " ".join(sys.argv[1:]), "rows": rows})


def measure(mechanism, size, records):
    from moco_tf.startup import load_tensorflow

    load_tensorflow(training=True)
    import numpy as np
    import tensorflow as tf

    import moco_tf

    tf.linalg.matmul(tf.ones((64, 64)), tf.ones((64, 64)))  # starts the runtime
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    backbone = moco_tf.encoders.resnet.resnet10(image_size=SIDE, width=WIDTH, stem="cifar")
    batch = BATCH
    if mechanism == "queue":
        model, floats = moco_tf.MoCo(backbone, dim=DIM, queue_size=size), size * DIM
    elif mechanism == "bank":
        model, floats = moco_tf.MemoryBank(backbone, records, dim=DIM, queue_size=size), records * DIM
    else:
        batch = size + 1
        model, floats = moco_tf.EndToEnd(backbone, dim=DIM), 2 * batch * activations(backbone)
    model.compile(moco_tf.SGD(0.03, momentum=0.9))
    rng = np.random.default_rng(0)
    query, key = (rng.normal(size=(batch, SIDE, SIDE, 3)).astype("float32") for _ in range(2))
    other = np.arange(batch) if mechanism == "bank" else key
    step = tf.function(model.train_step)
    for _ in range(2):
        step((tf.constant(query), tf.constant(other)))["loss"].numpy()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    return {
        "mechanism": mechanism,
        "K": size,
        "batch": batch,
        "peak_mb": peak * 1024 / 1e6,
        "formula_mb": floats * 4 / 1e6,
    }


def activations(backbone):
    """A: how many numbers the backward pass needs per image, the outputs of convolutions and of ReLUs."""
    from keras import layers

    kept = [layer.output.shape[1:] for layer in backbone.layers if isinstance(layer, (layers.Conv2D, layers.ReLU))]
    return sum(int(height) * int(width) * int(channels) for height, width, channels in kept)


if __name__ == "__main__":
    main()
