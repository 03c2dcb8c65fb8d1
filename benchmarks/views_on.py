"""What views cost by --views_on, microseconds an image: in the pipeline (processor time) and in the step (wall time).

    python -m benchmarks.views_on

The setting is the embedded images and the recipe of the CIFAR-10 demo, with pairs of views in batches of 128. The ways
take turns; the figures are medians of --rounds. Writes docs/results/bench/views_on.json.
"""

import argparse
import functools
import statistics
import time
from pathlib import Path

from benchmarks import results, turns

WAYS = ("host", "both", "device")
BATCH, BATCHES, FIRST = 128, 40, 5  # images; timed batches, and batches before them


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path, default=results.file("views_on"))
    arguments = parser.parse_args()
    import tensorflow as tf

    from moco_tf.data import sources
    from moco_tf.data.inputs.image import CIFAR10
    from moco_tf.data.views import batches
    from moco_tf.pretext import crops

    source, costs = sources.embedded("train"), {way: {"pipeline": [], "step": []} for way in WAYS}
    for _ in range(arguments.rounds):
        for way in WAYS:
            options = crops.Options(augment="cifar", views_on=way)
            task = functools.partial(crops.views, inputs=CIFAR10, options=options)
            made = iter(batches(source, task, BATCH, seed=0, at_once=crops.at_once(source, options)))
            for _ in range(FIRST):
                views = next(made)["views"]
            begun = time.process_time()
            for _ in range(BATCHES):
                views = next(made)["views"]
            costs[way]["pipeline"].append((time.process_time() - begun) / BATCHES / BATCH * 1e6)
            del made
            if on_device := crops.on_device(CIFAR10, options):
                finish = tf.function(on_device, jit_compile=True, autograph=False)
                finish(views)
                begun = time.perf_counter()
                for _ in range(BATCHES):
                    finished = finish(views)
                float(finished[0][0, 0, 0, 0])  # waits for a GPU
                costs[way]["step"].append((time.perf_counter() - begun) / BATCHES / BATCH * 1e6)
    found = {way: {p: round(statistics.median(all_), 1) for p, all_ in c.items() if all_} for way, c in costs.items()}
    for way, cost in found.items():
        print(f"{way:8}" + "".join(f"  {part} {value} us" for part, value in cost.items()))
    results.write(arguments.output, {"machine": turns.machine(), "microseconds_an_image": found})


if __name__ == "__main__":
    main()
