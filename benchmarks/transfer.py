"""What pre-training is worth to detection and segmentation: MoCo, supervised and random encoders on three small sets.

    pip install -e ".[bench,transfer]"
    pip download --no-deps deepforest==2.1.0
    python -m benchmarks.transfer --wheel=deepforest-2.1.0-py3-none-any.whl --jobs=2

The set trees has real boxes (tree_crowns.py); composite_detect and composite_segment have synthetic scenes
(composite_scenes.py). Makes data and encoders once under --runs, then fine-tunes each encoder on each of --labels
percent of the training images with each of --seeds. The encoders of a seed get the same images, steps and learning
rate. The error bars show the spread of fine-tuning alone, because there is only one pre-training seed.

An interrupted study resumes when it is started again; it does not repeat runs in a CSV file of --output. Each set ends
with <set>.csv, <set>.png, a table, and how far each encoder lies from the random one.

All encoders have the same architecture, a ResNet-10 of width 16. MoCo on CIFAR-10 and the supervised encoder see the
same images equally often, so they can be compared. MoCo on tiles has seen the images that the trees' detector learns
from, without their labels; it has no supervised counterpart.
"""

import csv
import dataclasses
import json
import os
import statistics
import sys
import time
from pathlib import Path

from benchmarks import side_by_side
from moco_tf import command, run_folder

SIZE = 96  # side of the images in detection and segmentation
PASSES = 20  # over CIFAR-10's images, by MoCo and by the supervised encoder
MOCO = (
    *("moco_tf.train", "--arch=resnet10", "--width=16", "--stem=imagenet", "--views_on=device", "--seed=0"),
    *("--momentum=0.99", "--temperature=0.1", "--lr_per=step", "--weight_decay=5e-4"),
)
# CIFAR-10's 32 pixels are enlarged, so that the stem leaves something of them; objects in scenes have 24 to 40 pixels.
# At 64 pixels, kNN after four passes is no better (36 %), and a pass takes half as long again.
ON_CIFAR = (
    *(*MOCO, "--image_size=48", "--augment=cifar", "--crop_min=0.2", "--queue_size=1024"),
    *("--batch_size=128", "--lr=0.06", f"--epochs={PASSES}", f"--knn_every={PASSES}"),
)
# There are 1258 tiles, and each overlaps eight others. A long queue would hold a query's own tile and those eight.
ON_TILES = (
    *(*MOCO, f"--image_size={SIZE}", "--augment=v2", "--queue_size=256"),
    *("--batch_size=64", "--lr=0.03", "--epochs=40", "--knn_every=0"),
)
LABELLED = ("moco_tf.evaluate.finetune", "--init=random", "--crop_min=0.2", f"--epochs={PASSES}")
SUPERVISED = "supervised/model.keras"


# Boxes have sides of 20 to 40 pixels. At these learning rates, each task learns some drawn shapes quickly. With a
# pyramid of 256 channels, a run takes twice as long.
HEADS = {
    "detect": ("--smallest_anchor=16", "--head_layers=1", "--pyramid_channels=64", "--lr=0.01"),
    "segment": ("--lr=0.03",),
}


@dataclasses.dataclass(frozen=True)
class Set:
    task: str  # the command, moco_tf.transfer.<task>
    data: str  # a folder of --runs
    inits: dict  # {name: (a run in --runs; --init: encoder, random, or a file in --runs)}
    figures: tuple  # of summary.json, in percent; the first one compares the encoders


COMPOSITE = {
    "random": ("moco_cifar", "random"),
    "MoCo": ("moco_cifar", "encoder"),
    "supervised": ("moco_cifar", SUPERVISED),
}
SETS = {
    "trees": Set(
        "detect",
        "tree_crowns",
        {
            "random": ("moco_tiles", "random"),
            "MoCo, tiles": ("moco_tiles", "encoder"),
            "MoCo, CIFAR-10": ("moco_cifar", "encoder"),
            "supervised, CIFAR-10": ("moco_cifar", SUPERVISED),
        },
        ("ap50", "ap", "ap75"),
    ),
    "composite_detect": Set("detect", "composite", COMPOSITE, ("ap50", "ap50_any_class", "ap", "ap75")),
    "composite_segment": Set("segment", "composite", COMPOSITE, ("miou",)),
}
NAMES = {"ap": "AP", "ap50": "AP50", "ap75": "AP75", "ap50_any_class": "AP50, any class", "miou": "mean IoU"}
COLUMNS = ("init", "labels", "steps", "seed", *NAMES, "seconds")
KEY = 4  # how many columns, from the first, identify a run


@dataclasses.dataclass(frozen=True)
class Settings:
    set: str = command.flag(",".join(SETS), "Which sets, of trees, composite_detect and composite_segment.")
    labels: tuple[int, ...] = command.flag((10, 30, 100), "Percent of the training images.")
    seeds: tuple[int, ...] = command.flag((0, 1, 2), "Each run is made with each of these seeds.")
    steps: int = command.flag(300, "Steps of each run, of 8 images.")
    jobs: int = command.flag(1, "Runs side by side, each on its share of the cores.")
    wheel: str = command.flag("", "The wheel of deepforest 2.1.0, for trees.", path=True)
    cifar: str = command.flag("", "CIFAR-10 as <split>/<class>/<image>; '': the packaged 12,000 images.", path=True)
    runs: str = command.flag("runs/transfer", "Folder of data, encoders and runs.", path=True)
    output: str = command.flag("docs/results/transfer", "Folder of the CSV files and plots.", path=True)

    def __post_init__(self):
        command.check_values(self)
        for name in ("steps", "jobs"):
            command.require(self, getattr(self, name) > 0, name, "is more than 0")
        command.require(self, self.seeds and min(self.seeds) >= 0, "seeds", "lists numbers from 0 up")
        command.require(
            self, self.labels and all(0 < x <= 100 for x in self.labels), "labels", "lists percentages, 1 to 100"
        )
        command.require(self, {*self.sets} <= {*SETS}, "set", f"lists sets, of {', '.join(SETS)}")
        made = Path(self.runs, "tree_crowns").exists() or Path(self.wheel).is_file()
        command.require(self, made or "trees" not in self.sets, "wheel", "names a file, which --set=trees needs")

    @property
    def sets(self):
        return tuple(dict.fromkeys(self.set.split(",")))


def main(arguments):
    """Runs the command; returns the process's exit status."""
    program = "benchmarks.transfer"
    return command.run(program, __doc__, lambda words: study(command.parse(Settings, program, words)), arguments)


def study(settings):
    """Makes what the sets need, runs what is missing, and writes each set's files; returns the exit status."""
    known = {name: recorded(Path(settings.output, f"{name}.csv")) for name in settings.sets}
    wanted = [(name, *key) for name in settings.sets for key in keys(settings, name)]
    missing = [(name, *key) for name, *key in wanted if tuple(key) not in known[name]]
    print(f"{len(missing)} runs to do of {len(wanted)}", flush=True)
    failures = prepare(settings, {name for name, *_ in missing})
    missing = [] if failures else missing
    results = side_by_side.done(missing, settings.jobs, lambda point, cores: run(settings, point, cores))
    for (name, *key), (result, text) in results:
        print(f"  {name}, {key[0]}, {key[1]} %, seed {key[3]}: {text}", flush=True)
        if result is None:
            failures += 1
            continue
        known[name][tuple(key)] = result
        write(Path(settings.output, f"{name}.csv"), known[name])
    for name in settings.sets:
        chosen = {key: known[name][key] for key in keys(settings, name) if key in known[name]}
        if chosen:
            plot(name, chosen, Path(settings.output, f"{name}.png"))
            print(f"\n{name}, {settings.steps} steps\n\n{table(name, chosen)}\n\n{gains(name, chosen)}")
    return 1 if failures else 0


def keys(settings, name):
    """(init, labels, steps, seed) of all runs of a set."""
    return [
        (init, labels, settings.steps, seed)
        for seed in settings.seeds  # the first seed of all points runs first
        for labels in settings.labels
        for init in SETS[name].inits
    ]


# What runs need.


def preparations(settings, sets):
    """The commands that make what some sets need, in stages, each of which needs the earlier stages.

    Returns:
      [{a folder of --runs: (words of the command that makes it)}].
    """
    runs = Path(settings.runs)
    tiles = f"--dataset={runs / 'tree_crowns/unlabelled'}"
    cifar = f"--dataset={settings.cifar or 'embedded'}"
    stages = [
        {
            "tree_crowns": ("benchmarks.tree_crowns", f"--wheel={settings.wheel}", f"--output={runs / 'tree_crowns'}"),
            "composite": (
                "benchmarks.composite_scenes",
                f"--cifar={settings.cifar}",
                f"--output={runs / 'composite'}",
            ),
        },
        {
            "moco_cifar": (*ON_CIFAR, cifar, f"--run_dir={runs / 'moco_cifar'}"),
            "moco_tiles": (*ON_TILES, tiles, f"--run_dir={runs / 'moco_tiles'}"),
        },
        {"supervised": (*LABELLED, f"--encoder={runs / 'moco_cifar'}", f"--output={runs / 'supervised'}")},
    ]
    needed = {SETS[name].data for name in sets}
    for name in sets:
        for encoder, start in SETS[name].inits.values():
            needed |= {encoder, Path(start).parts[0]}
    return [{folder: words for folder, words in stage.items() if folder in needed} for stage in stages]


def prepare(settings, sets):
    """Makes the missing data and encoders that some sets need; returns how many failed."""
    for stage in preparations(settings, sets):
        missing = [folder for folder in stage if not is_made(Path(settings.runs, folder))]
        begun, failures = time.monotonic(), 0

        def make(folder, cores, stage=stage):
            return side_by_side.failure(stage[folder], cores)

        for folder, said in side_by_side.done(missing, settings.jobs, make):
            print(f"  {folder}: {f'failed: {said}' if said else f'{time.monotonic() - begun:.0f} s'}", flush=True)
            failures += said is not None
        if failures:
            return failures
    return 0


def is_made(folder):
    """Whether a folder holds whole data, a finished run of moco_tf.train, or a supervised encoder."""
    if config := run_folder.recorded(folder):
        return any(int(row["epoch"]) == config.epochs for row in run_folder.rows(folder))
    return any((folder / last).exists() for last in ("annotations", "summary.json"))


# Runs.


def words(settings, name, init, labels, steps, seed):
    """The words of a run's command, the last of which is --output."""
    runs, chosen = Path(settings.runs), SETS[name]
    encoder, start = chosen.inits[init]
    return (
        f"moco_tf.transfer.{chosen.task}",
        f"--encoder={runs / encoder}",
        f"--init={runs / start if start == SUPERVISED else start}",
        f"--dataset={runs / chosen.data}",
        *("--train_split=train", "--eval_split=test", f"--labels={labels}", f"--seed={seed}", f"--steps={steps}"),
        *("--batch_size=8", f"--image_size={SIZE}"),
        *HEADS[chosen.task],
        f"--output={runs / name / init.replace(', ', '-')},{labels},{steps},{seed}",
    )


def run(settings, point, cores):
    """Fine-tunes an encoder on some cores; returns (the figures, or None if it failed; a text about it)."""
    begun = time.monotonic()
    command_words = words(settings, *point)
    summary = Path(command_words[-1].partition("=")[2], "summary.json")
    if not summary.exists() and (said := side_by_side.failure(command_words, cores)):
        return None, f"failed: {said}"
    found, seconds = json.loads(summary.read_text()), f"{time.monotonic() - begun:.0f}"
    kept = {figure: repr(found[figure]) if figure in found else "" for figure in NAMES}
    first = SETS[point[0]].figures[0]
    return kept | {"seconds": seconds}, f"{NAMES[first]} {found[first]:.1f}, {seconds} s"


# Files.


def recorded(file):
    """{(init, labels, steps, seed): figures} of a CSV file; empty if there is no file."""
    if not file.exists():
        return {}
    with open(file, newline="") as text:
        return {
            (row["init"], int(row["labels"]), int(row["steps"]), int(row["seed"])): {c: row[c] for c in COLUMNS[KEY:]}
            for row in csv.DictReader(text)
        }


def write(file, known):
    """Writes all known runs to a CSV file, in one step."""
    file.parent.mkdir(parents=True, exist_ok=True)
    aside = file.with_suffix(".writing")
    with open(aside, "w", newline="") as text:
        writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(dict(zip(COLUMNS[:KEY], key, strict=True)) | found for key, found in sorted(known.items()))
    os.replace(aside, file)


def by_seed(known, init, labels, figure):
    """{seed: a figure} of the runs of an init with `labels` percent of the training images."""
    return {key[3]: float(found[figure]) for key, found in known.items() if key[:2] == (init, labels)}


def places(name, known):
    """(init, labels) of the runs there are, labels ascending, inits in the set's order."""
    shares = sorted({labels for _, labels, *_ in known})
    return [(init, x) for x in shares for init in SETS[name].inits if any(key[:2] == (init, x) for key in known)]


def table(name, known):
    """Lines of Markdown: mean and standard deviation of the seeds."""
    figures = SETS[name].figures
    lines = [f"| labels | encoder | {' | '.join(NAMES[figure] for figure in figures)} | seeds |"]
    lines.append("|---" * (3 + len(figures)) + "|")
    for init, labels in places(name, known):
        cells = [list(by_seed(known, init, labels, figure).values()) for figure in figures]
        lines.append(f"| {labels} % | {init} | {' | '.join(map(mean_and_spread, cells))} | {len(cells[0])} |")
    return "\n".join(lines)


def mean_and_spread(values):
    spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.1f}{spread}"


def gains(name, known):
    """Lines on how far each encoder lies from the random one: mean and standard error of the seeds.

    The two encoders of a seed have the same labelled images, so that differences are taken seed by seed.
    """
    figure, lines = SETS[name].figures[0], []
    for init, labels in places(name, known):
        own, random = (by_seed(known, one, labels, figure) for one in (init, "random"))
        differences = [own[seed] - random[seed] for seed in own if seed in random]
        if init == "random" or not differences:
            continue
        error = "one seed"
        if len(differences) > 1:
            error = f"standard error {statistics.stdev(differences) / len(differences) ** 0.5:.1f}"
        lines.append(f"{labels} %: {init} {statistics.mean(differences):+.1f} {NAMES[figure]} from random ({error}).")
    return "\n".join(lines)


def plot(name, known, file):
    """Draws the set's first two figures against the percent of labels: means, bars of a standard deviation."""
    try:
        import matplotlib
    except ImportError:
        print("No plot: matplotlib is missing (pip install -e '.[docs]').")
        return
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figures = SETS[name].figures[:2]
    figure, panels = plt.subplots(
        1, len(figures), figsize=(5 * len(figures), 4), constrained_layout=True, squeeze=False
    )
    shares = sorted({labels for _, labels, *_ in known})
    for axes, column in zip(panels[0], figures, strict=True):
        for number, init in enumerate(SETS[name].inits):
            found = [
                (place, list(by_seed(known, init, labels, column).values())) for place, labels in enumerate(shares)
            ]
            found = [(place + 0.05 * number, values) for place, values in found if values]
            if found:
                xs, seeds = zip(*found, strict=True)
                bars = [statistics.stdev(values) if len(values) > 1 else 0 for values in seeds]
                axes.errorbar(xs, list(map(statistics.mean, seeds)), bars, marker="o", capsize=4, label=init)
        axes.set_xticks(range(len(shares)), [f"{labels} %" for labels in shares])
        axes.set(xlabel="training images", ylabel=f"{NAMES[column]}, %")
        axes.spines[["top", "right"]].set_visible(False)
    panels[0, 0].legend(frameon=False)
    figure.suptitle(f"{name}: mean of the seeds,\nbars of one standard deviation")
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=120)
    plt.close(figure)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
