"""Runs all comparisons of docs/performance.md, one after another, in some 20 minutes; then draws one page of plots.

    pip install -e ".[bench]"
    python -m benchmarks

Let the machine do nothing else meanwhile. Each part can be run alone (`python -m benchmarks.views`); each part writes
its JSON file to docs/results/bench/. Once all parts have run, `--plot` draws docs/results/bench/bench.png again.
"""

import subprocess
import sys
import time

from benchmarks import results, turns

COLOURS = {
    "moco_tf": "tab:blue",
    "moco_tf+xla": "tab:cyan",
    "eager": "tab:orange",
    "compiled": "tab:red",
    "channels_last": "tab:olive",
    "compiled+channels_last": "tab:brown",
}
PARTS = (
    ("step", "--arch=resnet50", "--image_size=224", "--batch_size=16", "--ways=eager,compiled,channels_last"),
    ("step", "--arch=resnet18", "--image_size=32", "--batch_size=128", "--ways=compiled,channels_last"),
    ("step", "--method=moco_v3", "--arch=vit_small", "--image_size=224", "--batch_size=8", "--ways=compiled"),
    ("views",),
    ("queue", "--sizes=4096,65536,1048576"),
    ("overhead",),
    ("startup", "--rounds=1"),
    ("checkpoint",),
)


def main():
    begun = time.monotonic()
    if sys.argv[1:] == []:
        for part, *flags in PARTS:
            print(f"\n# python -m benchmarks.{part} {' '.join(flags)}".rstrip(), flush=True)
            subprocess.run([sys.executable, "-m", f"benchmarks.{part}", *flags], check=True)
    elif sys.argv[1:] != ["--plot"]:
        raise SystemExit(__doc__)
    plot()
    print(f"\n{results.FOLDER / 'bench.png'}, {(time.monotonic() - begun) / 60:.0f} minutes")


def plot():
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(2, 3, figsize=(13, 6.5), constrained_layout=True)
    steps, views, queue, overhead, startup = panels.flat[:5]
    rows = [row for row in results.read(results.file("step")) if row["machine"] == turns.machine()]
    ways = [way for way in COLOURS if any(way in row["ways"] for row in rows)]
    for number, way in enumerate(ways):
        drawn = [(place, row["ways"][way]["times_ours"]) for place, row in enumerate(rows) if way in row["ways"]]
        medians = [found["median"] for _, found in drawn]
        spread = [[abs(found["quartiles"][end] - found["median"]) for _, found in drawn] for end in (0, 1)]
        places = [place + 0.15 * number for place, _ in drawn]
        steps.bar(places, medians, 0.14, color=COLOURS[way], yerr=spread, label=way)
    names = [f"{row['arch']}\n{row['image_size']} px, {row['batch_size']}\n{row['precision']}" for row in rows]
    steps.set_xticks([place + 0.3 for place in range(len(rows))], names)
    steps.set(title="A step, times moco_tf's", ylabel="times as long")
    steps.set_ylim(0, 1.4 * steps.get_ylim()[1])
    steps.legend(frameon=False, fontsize=8, ncols=2, loc="upper left")

    rates = results.read(results.file("views"))["images_per_second"]
    views.bar(
        list(rates), list(rates.values()), 0.5, color=["C1" if way == "torchvision" else "tab:blue" for way in rates]
    )
    views.set(title="Pairs of v2 views of JPEGs", ylabel="source images/s")

    rows = results.read(results.file("queue"))["rows"]
    sizes = [row["K"] for row in rows]
    queue.plot(sizes, [row["loss_ms"] for row in rows], "o-", label="loss and gradient, ms")
    queue.plot(sizes, [row["enqueue_ms"] for row in rows], "o-", label="enqueuing, ms")
    queue.plot(sizes, [row["peak_beyond_mb"] for row in rows], "o-", label="peak beyond the queue, MB")
    queue.set(title="A longer queue, batch 256", xlabel="K", xscale="log", yscale="log")
    queue.legend(frameon=False, fontsize=8)

    found = results.read(results.file("overhead"))
    parts = found["parts_s"]
    overhead.barh(list(parts), [100 * seconds / found["step_s"] for seconds in parts.values()], 0.5)
    overhead.set(title=f"Beside the encoders, K {found['K']}", xlabel="% of a ResNet-50 step")
    overhead.invert_yaxis()

    seconds = results.read(results.file("startup"))["seconds"]
    startup.bar(list(seconds), list(seconds.values()), 0.4)
    startup.set(title="From the command to step 1", ylabel="s")

    found = results.read(results.file("checkpoint"))
    panels.flat[5].bar(list(found["seconds"]), list(found["seconds"].values()), 0.4)
    panels.flat[5].set(title=f"Saving {found['megabytes']:.0f} MB", ylabel="s")
    for axes in panels.flat:
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(results.FOLDER / "bench.png", dpi=110)


if __name__ == "__main__":
    main()
