"""What saving costs: the seconds in which training waits for a checkpoint of MoCo with a ResNet-50 and K 65,536.

    python -m benchmarks.checkpoint

Compares it with writing as many bytes to one file; both include fsync. Writes docs/results/bench/checkpoint.json.
"""

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path

from benchmarks import results

OUTPUT = results.file("checkpoint")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--output", type=Path, default=OUTPUT)
    arguments = parser.parse_args()
    from moco_tf.startup import load_tensorflow

    load_tensorflow()

    import moco_tf
    from moco_tf.checkpoint import Checkpoints

    model = moco_tf.MoCo(moco_tf.encoders.resnet.resnet50(), head="mlp", queue_size=65536)
    model.compile(moco_tf.SGD(0.03, momentum=0.9))
    seconds = {"checkpoint": [], "one file": []}
    with tempfile.TemporaryDirectory() as folder:
        checkpoints = Checkpoints(Path(folder, "checkpoints"), model)
        for step in range(1, arguments.rounds + 2):  # the first traces
            model.step.assign(step)
            begin = time.perf_counter()
            checkpoints.save()
            seconds["checkpoint"].append(time.perf_counter() - begin)
            size = sum(file.stat().st_size for file in checkpoints.path(step).rglob("*") if file.is_file())
            content = os.urandom(size)
            begin = time.perf_counter()
            with open(Path(folder, "one"), "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            seconds["one file"].append(time.perf_counter() - begin)
    found = {name: round(statistics.median(times[1:]), 3) for name, times in seconds.items()}
    print(
        f"{size / 1e6:.0f} MB, medians of {arguments.rounds}: " + ", ".join(f"{n} {s:.3f} s" for n, s in found.items())
    )
    results.write(arguments.output, {"rounds": arguments.rounds, "megabytes": round(size / 1e6, 1), "seconds": found})


if __name__ == "__main__":
    main()
