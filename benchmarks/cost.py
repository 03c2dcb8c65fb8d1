"""What training costs as the work grows: images in the folder, K, batch, image size and replicas, one at a time.

    python -m benchmarks.cost --folder=DIR

Each point is measured in a process of its own: seconds, and the growth of the process's peak memory. A slope of 1
between two points means that the cost grows as the work does; 0, that it does not grow. Folders of copies of the
embedded images are made below DIR where they are missing. Writes docs/results/bench/cost.json and cost.png.
"""

import argparse
import itertools
import json
import math
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

from benchmarks import folder_start, queue, results, turns

OUTPUT = results.file("cost")
STEPS = 3  # of which the median counts, after one that traces


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="for the folders of images")
    parser.add_argument("--axes", default=",".join(AXES), help=f"some of {', '.join(AXES)}")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)  # measure this value of this axis, in this process
    arguments = parser.parse_args()
    if arguments.one:
        axis, value = arguments.one
        print(json.dumps(AXES[axis][2](int(value), arguments.folder)))
        return
    if unknown := set(arguments.axes.split(",")) - set(AXES):
        parser.error(f"--axes lists some of {', '.join(AXES)}; got {', '.join(unknown)}")
    before = results.read(arguments.output) if arguments.output.exists() else {}
    found = before["axes"] if before.get("machine") == turns.machine() else {}  # a page is of one machine
    for axis in arguments.axes.split(","):
        what, values, _ = AXES[axis]
        print(f"\n{what}\n{axis:>14} {'seconds':>9} {'slope':>6} {'MB':>8} {'slope':>6}")
        found[axis] = []
        for value in values:
            begun = [
                sys.executable,
                "-m",
                "benchmarks.cost",
                f"--folder={arguments.folder}",
                "--one",
                axis,
                str(value),
            ]
            output = subprocess.run(begun, check=True, stdout=subprocess.PIPE, text=True).stdout
            found[axis].append({"value": value} | json.loads(output.splitlines()[-1]))
            seconds, megabytes = (slopes(found[axis], name)[-1] for name in ("seconds", "mb"))
            row = found[axis][-1]
            print(f"{value:14,} {row['seconds']:9.3f} {seconds:>6} {row['mb']:8.0f} {megabytes:>6}", flush=True)
        results.write(arguments.output, {"machine": turns.machine(), "axes": found})
    plot(found, arguments.output.with_suffix(".png"))


def slopes(rows, name):
    """Returns, for each row, by which power of the work its cost has grown since the row before, as texts."""
    texts = [""]
    for before, row in itertools.pairwise(rows):
        grown = row[name] > 0 and before[name] > 0
        power = math.log(row[name] / before[name]) / math.log(row["value"] / before["value"]) if grown else math.nan
        texts.append(f"{power:.2f}")
    return texts


def plot(found, path):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(2, len(found), figsize=(3.2 * len(found), 6), constrained_layout=True, squeeze=False)
    for column, (axis, rows) in zip(panels.T, found.items(), strict=True):
        for axes, (name, label) in zip(column, (("seconds", "seconds"), ("mb", "peak memory, MB")), strict=True):
            axes.plot([row["value"] for row in rows], [max(row[name], 1e-3) for row in rows], "o-")  # the scale is log
            axes.set(xscale="log", yscale="log", xlabel=axis, ylabel=label)
            axes.set_xticks(values := [row["value"] for row in rows], [f"{value:,}" for value in values], rotation=45)
            axes.minorticks_off()
            low, high = axes.get_ylim()
            axes.set_ylim(min(low, high / 20), high)  # a flat curve looks flat
            axes.spines[["top", "right"]].set_visible(False)
        column[0].set_title(AXES[axis][0], fontsize=9)
    figure.savefig(path, dpi=110)


def peak_mb():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6


def first_start(files, folder):
    place, manifest = Path(folder, f"{files}"), Path(folder, f"{files}.csv")
    if not place.exists():
        folder_start.fill(place, files)
    manifest.unlink(missing_ok=True)
    found = folder_start.measure(place, manifest)
    return {"seconds": found["seconds"], "mb": found["mb"]}


def later_start(files, folder):
    found = folder_start.measure(Path(folder, f"{files}"), Path(folder, f"{files}.csv"))
    return {"seconds": found["seconds"], "mb": found["mb"]}


def loss_of(size, _):
    found = queue.measure(size, rounds=7)
    seconds = (found["loss_ms"] + found["enqueue_ms"]) / 1e3
    return {"seconds": seconds, "mb": found["queue_mb"] + found["peak_beyond_mb"]}


def step(batch_size=32, image_size=32, replicas=1):
    """A step of MoCo with a ResNet-18 and K 4,096."""
    from moco_tf.startup import load_tensorflow

    load_tensorflow(replicas if replicas > 1 else 0, training=True)
    import tensorflow as tf

    import moco_tf
    from moco_tf import replicas as replicas_lib

    strategy = replicas_lib.on_one_cpu(replicas) if replicas > 1 else tf.distribute.get_strategy()
    with strategy.scope():
        backbone = moco_tf.encoders.resnet.resnet18(
            image_size=image_size, stem="cifar" if image_size < 64 else "imagenet"
        )
        model = moco_tf.MoCo(backbone, head="mlp", queue_size=4096, temperature=0.2)
        model.compile(moco_tf.SGD(0.03, momentum=0.9, weight_decay=1e-4))
    shape = (batch_size, image_size, image_size, 3)
    batch = tuple(tf.random.stateless_normal(shape, (0, view)) for view in range(2))
    data = next(iter(strategy.experimental_distribute_dataset(tf.data.Dataset.from_tensors(batch))))
    function, before, times = tf.function(lambda: strategy.run(model.train_step, (data,))), peak_mb(), []
    for _ in range(STEPS + 1):
        begun = time.perf_counter()
        tf.nest.map_structure(lambda x: x.numpy(), strategy.experimental_local_results(function())[0])
        times.append(time.perf_counter() - begun)
    return {"seconds": statistics.median(times[1:]), "mb": peak_mb() - before}


AXES = {  # what is measured, the values, and how: (value, folder) -> {"seconds": ..., "mb": ...}
    "images": ("the first start on a folder", (1_000, 10_000, 100_000, 1_000_000), first_start),
    "images_later": ("a later start on it", (1_000, 10_000, 100_000, 1_000_000), later_start),
    "K": ("InfoNCE and enqueuing, batch 256", (4_096, 16_384, 65_536, 262_144, 1_048_576), loss_of),
    "batch": ("a step, ResNet-18 at 32 pixels", (8, 32, 128, 512), lambda value, _: step(batch_size=value)),
    "pixels": ("a step, ResNet-18, 32 images", (64, 128, 192, 256), lambda value, _: step(image_size=value)),
    "replicas": ("a step, 32 images in all", (1, 2, 4, 8), lambda value, _: step(replicas=value)),
}


if __name__ == "__main__":
    main()
