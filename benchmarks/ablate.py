"""Runs the papers' ablations at a laptop's scale: each is a table of runs of `moco_tf.train` on the embedded images.

    python -m benchmarks.ablate --study=mechanism --seeds=0,1 --jobs=2

Each point of a study is a run in its own folder under --runs, named after the flags that differ from those of --base.
Give another base another --output. An interrupted study resumes when it is started again. It does not repeat finished
points, including those of other studies and those in a CSV file of --output. A study ends with
<study>.csv, <study>.png and a sentence on the papers' orderings.

    python -m benchmarks.ablate --study=pretext --epochs=6 --output=docs/results/pretext

compares pretext tasks at equal numbers of images, and then at equal time: each gets as many epochs as fit into the
time that the first point took. Seconds count only the cores that a run got, so that other work on the machine does not
count. kNN, a linear probe, and fine-tuning on a tenth of the labels judge the encoders.
"""

import csv
import dataclasses
import json
import math
import os
import re
import statistics
import sys
import time
from pathlib import Path

from benchmarks import side_by_side
from moco_tf import command, config, run_folder

REPOSITORY = Path(__file__).parent.parent
COLUMNS = (
    "series", "x", "flags", "epochs", "seed", "knn_top1", "untrained_knn_top1", "loss", "contrast_top1", "feature_std",
    "seconds", "probe_top1", "finetune_top1",
)  # fmt: skip
SHARE = "share_of_cores.json"  # in a run's folder: the share of its cores' time that the run got beside other work
JUDGES = {  # the commands that judge an encoder beside kNN, in studies that ask for them
    "probe_top1": ("moco_tf.evaluate.linear_probe",),
    "finetune_top1": ("moco_tf.evaluate.finetune", "--labels=10", "--epochs=20"),
}


@dataclasses.dataclass(frozen=True)
class Point:
    """A run of a study: its curve, its place on the curve, its flags, and the paper's figure if there is one."""

    series: str
    x: str
    flags: dict
    paper: str = ""


@dataclasses.dataclass(frozen=True)
class Study:
    axis: str  # what x is
    points: tuple
    orderings: tuple  # ((series, x), (series, x)): by the paper, the first is better than the second
    source: str  # where the paper's figures come from, and what they are
    base: str = "configs/ablate.flags"
    common: tuple = ()  # arguments that all points add to the base
    judged: bool = False  # also by JUDGES
    at_equal_time: bool = False  # runs the points once more, with other numbers of epochs; x is then in no order


SIZES = ("128", "512", "1024", "4096")
RATE = 0.03  # learning rate of configs/ablate.flags, for a batch of 128; another --base scales all learning rates
BANK = {"method": "memory_bank", "lr": "0.003"}  # at 0.03 and 0.01 its embeddings collapse


def _end_to_end(batch):
    """K is the batch less one; the learning rate scales with the batch."""
    if batch == "128":
        return {"method": "end_to_end"}
    return {"method": "end_to_end", "batch_size": batch, "lr": f"{RATE * int(batch) / 128:g}"}


def _queue(size):
    return {} if size == "4096" else {"queue_size": size}


def _ladder(head, augmentation, cosine):
    flags = {} if head else {"head": "linear", "temperature": "0.07"}
    flags |= {"augment": "v2" if augmentation else "v1"} | ({} if cosine else {"lr_schedule": "step"})
    return flags | ({"temperature": "0.2"} if head else {})


MECHANISM = {  # by series: the flags at K, and the paper's figures
    "queue (MoCo)": (_queue, {"4096": "59.0"}),
    "memory bank": (lambda size: BANK | _queue(size), {}),
    "end-to-end": (_end_to_end, {}),
}

STUDIES = {
    "mechanism": Study(
        axis="K (end-to-end: batch, K + 1)",
        points=(
            *(
                Point(series, size, flags(size), paper.get(size, ""))
                for series, (flags, paper) in MECHANISM.items()
                for size in SIZES
            ),
            Point("memory bank, NCE", "4096", BANK | {"loss": "nce"}),
        ),
        orderings=tuple((("queue (MoCo)", size), ("memory bank", size)) for size in SIZES)
        + tuple(
            ((series, large), (series, small))
            for series in MECHANISM
            for large, small in zip(SIZES[1:], SIZES[:-1], strict=True)
        ),
        source="MoCo, figure 3: linear probe on ImageNet, m 0.999; at K 65536 the queue has 60.6 and the bank 58.0",
    ),
    "momentum": Study(
        axis="m",
        points=(
            Point("queue (MoCo)", "0", {"momentum": "0"}, "fails"),
            Point("queue (MoCo)", "0.9", {"momentum": "0.9"}, "55.2"),
            Point("queue (MoCo)", "0.99", {}, "57.8"),
            Point("queue (MoCo)", "0.999", {"momentum": "0.999"}, "59.0"),
            Point("queue (MoCo)", "0.9999", {"momentum": "0.9999"}, "58.9"),
        ),
        orderings=tuple(
            (("queue (MoCo)", better), ("queue (MoCo)", worse))
            for better, worse in (("0.9", "0"), ("0.99", "0.9"), ("0.999", "0.99"))
        ),
        source="MoCo, section 4.1: linear probe on ImageNet, K 4096; m 0 fails",
    ),
    "queue_size": Study(
        axis="K",
        points=tuple(
            Point("queue (MoCo)", size, _queue(size), "59.0" if size == "4096" else "") for size in (*SIZES, "8192")
        ),
        orderings=tuple(
            (("queue (MoCo)", large), ("queue (MoCo)", small))
            for large, small in zip((*SIZES[1:], "8192"), SIZES, strict=True)
        ),
        source="MoCo, figure 3: linear probe on ImageNet, m 0.999; 60.6 at K 65536",
    ),
    "recipe": Study(
        axis="what of v2 is added to v1",
        points=(
            Point("v1 to v2", "nothing", _ladder(False, False, False), "60.6"),
            Point("v1 to v2", "head", _ladder(True, False, False), "66.2"),
            Point("v1 to v2", "aug", _ladder(False, True, False), "63.4"),
            Point("v1 to v2", "cosine", _ladder(False, False, True)),
            Point("v1 to v2", "head, aug", _ladder(True, True, False), "67.3"),
            Point("v1 to v2", "all", _ladder(True, True, True), "67.5"),
        ),
        orderings=tuple(
            (("v1 to v2", better), ("v1 to v2", worse))
            for better, worse in (
                ("head", "nothing"),
                ("aug", "nothing"),
                ("head", "aug"),
                ("head, aug", "head"),
                ("all", "head, aug"),
            )
        ),
        source="MoCo v2, table 1: linear probe on ImageNet, 200 epochs; the head comes with T 0.2, as there",
    ),
    "temperature": Study(
        axis="T",
        points=tuple(
            Point("queue (MoCo)", value, {} if value == "0.1" else {"temperature": value}, paper)
            for value, paper in (("0.05", ""), ("0.07", ""), ("0.1", ""), ("0.2", "66.2"), ("0.5", ""))
        ),
        orderings=((("queue (MoCo)", "0.2"), ("queue (MoCo)", "0.07")),),
        source="MoCo v2, section 3: linear probe on ImageNet with the MLP head, T 0.2 the best",
    ),
    "shuffle_bn": Study(
        axis="BatchNorm of the 128 images",
        points=(
            Point("queue (MoCo)", "together", {}),
            Point("queue (MoCo)", "8 groups, shuffled", {"bn_groups": "8", "shuffle_bn": "true"}),
            Point("queue (MoCo)", "8 groups", {"bn_groups": "8"}),
        ),
        orderings=((("queue (MoCo)", "8 groups, shuffled"), ("queue (MoCo)", "8 groups")),),
        source="MoCo, section 3.3 and appendix: without shuffling, pretext accuracy above 99.9 % while kNN falls",
    ),
}


IMAGES, TIME = "equal images", "equal time"  # series of the study of tasks
PLAIN = {"augment": "flip", "lr": "0.05"}
TASKS = {  # each task's flags that differ from the base's, and MoCo's table 1 (linear probe on ImageNet, R50 or wider)
    "crops": ({}, "60.6"),
    "patches": ({"pretext": "patches"}, ""),
    "labels": ({"pretext": "labels"}, ""),
    "cmc": ({"pretext": "cmc", "head": "mlp"}, "64.1"),
    "cpc": ({"pretext": "cpc", "optimizer": "adamw", "lr": "0.001", "dim": "64", "hidden_dim": "64"}, "48.7"),
    "rotation": ({"pretext": "rotation"} | PLAIN, "55.4"),
    "position": ({"pretext": "position", "lr": "0.05"}, "51.4"),
    "jigsaw": ({"pretext": "jigsaw", "lr": "0.05"}, "44.6"),
    "colorize": ({"pretext": "colorize"} | PLAIN, "39.6"),
    "denoise": ({"pretext": "denoise"} | PLAIN, ""),
    "inpaint": ({"pretext": "inpaint"} | PLAIN, ""),
    "exemplar": ({"pretext": "exemplar", "lr": "0.05"}, "46.0"),
    "cluster": ({"pretext": "cluster", "lr": "0.05"}, "48.4"),
}
STUDIES["pretext"] = Study(
    axis="pretext task",
    points=tuple(Point(IMAGES, task, flags, paper) for task, (flags, paper) in TASKS.items()),
    orderings=tuple(
        ((IMAGES, "crops"), (IMAGES, task)) for task in TASKS if TASKS[task][1] and task not in ("crops", "cmc")
    ),
    source="MoCo, table 1: linear probe on ImageNet; MoCo and CPC a ResNet-50, others wider ones, CMC two of them",
    base="configs/pretext.flags",
    judged=True,
    at_equal_time=True,
)
ALONE = {"pretext": "mae"}
STUDIES["mae"] = Study(
    axis="lambda, or share of the patches that is hidden",
    points=(
        Point("lambda", "0: MoCo v3", {"reconstruction_weight": "0"}),
        Point("lambda", "0.1", {"reconstruction_weight": "0.1"}),
        Point("lambda", "1", {}),
        Point("lambda", "10", {"reconstruction_weight": "10"}),
        Point("lambda", "infinity: MAE", ALONE),
        Point("hidden, lambda 1", "0.25", {"mask_ratio": "0.25"}),
        Point("hidden, lambda 1", "0.5", {}),
        Point("hidden, lambda 1", "0.75", {"mask_ratio": "0.75"}),
        Point("hidden, MAE", "0.5", ALONE),
        Point("hidden, MAE", "0.75", ALONE | {"mask_ratio": "0.75"}),
    ),
    orderings=((("lambda", "1"), ("lambda", "0: MoCo v3")), (("lambda", "1"), ("lambda", "infinity: MAE"))),
    source="CAN (arXiv 2210.16870): linear probe of a ViT-B 74.8, of MAE 68.0, of SimCLR 73.5",
    base="configs/mae_moco.flags",
    common=("--precision=float32", "--warmup_epochs=1"),  # for any processor; for fewer epochs than the recipe's 24
    judged=True,
)


@dataclasses.dataclass(frozen=True)
class Settings:
    study: str = command.flag("mechanism", "Which ablation.", choices=tuple(STUDIES))
    seeds: tuple[int, ...] = command.flag((0, 1), "Each point is run with each of these seeds, in their order.")
    epochs: int = command.flag(4, "Passes over the 10,000 images in each run.")
    jobs: int = command.flag(1, "Runs side by side, each on its share of the cores.")
    base: str = command.flag("", "Flag file of what all points have in common; '': the study's own.", path=True)
    runs: str = command.flag("", "Folder of the runs; '': below runs/, named after the base.", path=True)
    output: str = command.flag("docs/results/ablations", "Folder of the CSV files and plots.", path=True)

    def __post_init__(self):
        command.check_values(self)
        for name in ("epochs", "jobs"):
            command.require(self, getattr(self, name) > 0, name, "is more than 0")
        command.require(self, self.seeds and min(self.seeds) >= 0, "seeds", "lists numbers from 0 up")


def main(arguments):
    """Runs the command; returns the process's exit status."""
    return command.run("benchmarks.ablate", __doc__, lambda given: ablate(_parse(given)), arguments)


def _parse(arguments):
    return command.parse(Settings, "benchmarks.ablate", arguments)


def ablate(settings):
    """Runs the missing points of a study, then writes its files; returns the process's exit status."""
    study = STUDIES[settings.study]
    base = settings.base or study.base
    settings = dataclasses.replace(settings, base=base, runs=settings.runs or f"runs/{Path(base).stem}")
    if study.base == STUDIES["mechanism"].base:
        study = at_rate(study, config.read(REPOSITORY / settings.base).lr)
    file = Path(settings.output, f"{settings.study}.csv")
    known = recorded(Path(settings.output), study.base)
    failures = run_missing(settings, study, known, file)
    if study.at_equal_time:
        study = at_equal_time(study, known, settings.epochs)
        failures += run_missing(settings, study, known, file)
    if write(file, study, known):
        means = summary(study, known, settings.epochs)
        plot(settings.study, study, means, untrained(study, known, settings.epochs), file.with_suffix(".png"))
        print(f"{file}\n{file.with_suffix('.png')}")
        print(f"{table(study, means)}\nThe paper's figures: {study.source}.\n{verdict(study, means)}")
        if study.judged:
            print(judged_table(study, known, settings.epochs))
    return 1 if failures else 0


def run_missing(settings, study, known, file):
    """Runs the points that are not `known`, adds them to `known` and writes the file; returns how many failed."""
    missing = [(seed, flags) for seed in settings.seeds for flags in _distinct(study)]
    missing = [(seed, flags) for seed, flags in missing if (flags, settings.epochs, seed) not in known]
    print(f"{settings.study}: {len(missing)} runs to do of {len(_distinct(study)) * len(settings.seeds)}", flush=True)
    failures = 0
    results = side_by_side.done(missing, settings.jobs, lambda point, cores: run(settings, *point, cores))
    for (seed, flags), (result, text) in results:
        print(f"  {flags or 'as it is'}, seed {seed}: {text}", flush=True)
        if result is None:
            failures += 1
            continue
        known[flags, settings.epochs, seed] = result
        write(file, study, known)
    return failures


def at_equal_time(study, known, epochs):
    """Returns the study with each point once more, with as many epochs as fit into the first point's time.

    Leaves out points whose time for `epochs` passes is not known: not yet, or only of runs that were interrupted.
    """

    def seconds(point):
        keys = sorted(key for key in known if key[:2] == (name(point.flags), epochs) and known[key]["seconds"])
        return float(known[keys[0]]["seconds"]) if keys else None  # the first seed's: later seeds do not change it

    first, more = seconds(study.points[0]), []
    for point in study.points:
        if first and (own := seconds(point)):
            flags = point.flags | {"epochs": f"{max(1, round(epochs * first / own))}"}
            flags = point.flags if flags["epochs"] == str(epochs) else flags
            more.append(dataclasses.replace(point, series=TIME, flags=flags))
    return dataclasses.replace(study, points=(*study.points, *more))


def at_rate(study, rate):
    """Returns the study with the learning rates of its points multiplied by `rate` / RATE."""

    def scaled(flags):
        return flags | ({"lr": f"{float(flags['lr']) * rate / RATE:g}"} if "lr" in flags else {})

    points = tuple(dataclasses.replace(point, flags=scaled(point.flags)) for point in study.points)
    return dataclasses.replace(study, points=points)


def name(flags):
    """A point's flags as one text: what they add to those of --base."""
    return " ".join(f"--{flag}={value}" for flag, value in flags.items())


def _distinct(study):
    return list(dict.fromkeys(name(point.flags) for point in study.points))


def run(settings, seed, flags, cores):
    """Trains a point on some cores; returns (its figures, or None if it failed; a text about it)."""
    epochs = next((int(f.partition("=")[2]) for f in flags.split() if f.startswith("--epochs=")), settings.epochs)
    folder = Path(settings.runs, f"{flags.replace('--', '').replace(' ', ',') or 'base'},{settings.epochs},{seed}")
    drops = f"{round(0.6 * epochs)},{round(0.8 * epochs)}"  # as v1's 120 and 160 of 200
    common = STUDIES[settings.study].common
    arguments = [f"--flagfile={REPOSITORY / settings.base}", *common, f"--epochs={epochs}", f"--seed={seed}"]
    arguments += [f"--knn_every={epochs}", f"--lr_drops={drops}", *flags.split(), f"--run_dir={folder}"]
    begun = time.monotonic()
    commands = [] if figures(folder, epochs) else [("moco_tf.train", *arguments)]
    if STUDIES[settings.study].judged:
        for column, judge in JUDGES.items():
            output = folder / column
            if not (output / "summary.json").exists():
                commands.append((*judge, f"--encoder={folder}", f"--seed={seed}", f"--output={output}"))
    for words in commands:
        failure, share = side_by_side.call(words, cores)
        if failure:
            return None, f"failed: {failure}"
        if words[0] == "moco_tf.train":
            (folder / SHARE).write_text(json.dumps(share))
    found = figures(folder, epochs)
    return found, f"kNN {float(found['knn_top1']):.1f} %, {time.monotonic() - begun:.0f} s"


def figures(folder, epochs):
    """Returns a finished run's last row as CSV columns, with its judges' figures; None if the run is not finished."""
    try:
        with open(folder / "metrics.csv", newline="") as file:
            row = list(csv.DictReader(file))[-1]
        baselines = run_folder.baselines(folder)
    except (FileNotFoundError, IndexError):
        return None
    if int(row["epoch"]) != epochs or not row["knn_top1"]:
        return None
    kept = {column: row.get(column, "") for column in ("knn_top1", "loss", "contrast_top1", "feature_std")}
    for column in JUDGES:
        summary = folder / column / "summary.json"
        kept[column] = repr(json.loads(summary.read_text())["top1"]) if summary.exists() else ""
    said = (folder / "train.log").read_text()
    spent = re.findall(r"(?:preparing epochs|steps|waiting for images|other) (\d+\.\d)", said)
    share = json.loads((folder / SHARE).read_text()) if (folder / SHARE).exists() else 1.0
    # Of an interrupted run the log has the last part alone.
    is_whole = bool(spent) and "Going on from step" not in said
    seconds = f"{sum(map(float, spent)) * min(share, 1.0):.1f}" if is_whole else ""  # no start, evaluation or saving
    return kept | {"untrained_knn_top1": repr(baselines["untrained"]), "seconds": seconds}


def recorded(output, base):
    """Returns {(flags, epochs, seed): figures} of all points in a folder's CSV files, of studies with this base."""
    known = {}
    for path in sorted(output.glob("*.csv")):
        if path.stem not in STUDIES or STUDIES[path.stem].base != base:
            continue
        with open(path, newline="") as file:
            for row in csv.DictReader(file):
                key = row["flags"], int(row["epochs"]), int(row["seed"])
                known[key] = {column: row.get(column) or "" for column in COLUMNS[5:]}  # older files have fewer
    return known


def write(file, study, known):
    """Writes a study's CSV with all known epochs and seeds; returns the number of rows.

    Rows of points that the study does not have, such as those at equal time while their number is not known, stay.
    """
    rows = [
        {"series": point.series, "x": point.x, "flags": flags, "epochs": epochs, "seed": seed} | found
        for point in study.points
        for (flags, epochs, seed), found in sorted(known.items())
        if flags == name(point.flags)
    ]
    if rows and file.exists():
        place = lambda row: tuple(str(row[column]) for column in COLUMNS[:5])  # noqa: E731
        written = {place(row) for row in rows}
        with open(file, newline="") as text:
            rows += [row for row in csv.DictReader(text) if place(row) not in written]
    if rows:
        file.parent.mkdir(parents=True, exist_ok=True)
        aside = file.with_suffix(".writing")
        with open(aside, "w", newline="") as text:
            writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
        os.replace(aside, file)
    return len(rows)


def summary(study, known, epochs):
    """Returns {(series, x): kNN top-1 in percent of each known seed}."""
    found = {
        (point.series, point.x): [
            float(known[key]["knn_top1"]) for key in sorted(known) if key[:2] == (name(point.flags), epochs)
        ]
        for point in study.points
    }
    return {place: values for place, values in found.items() if values}


def untrained(study, known, epochs):
    """Returns {x: mean kNN top-1 of the untrained encoders}."""
    found = {}
    for point in study.points:
        of_seeds = [
            float(row["untrained_knn_top1"]) for key, row in known.items() if key[:2] == (name(point.flags), epochs)
        ]
        if of_seeds:
            found.setdefault(point.x, statistics.mean(of_seeds))  # the first series has the most seeds
    return found


def table(study, values):
    """Lines of Markdown: each point's kNN top-1, mean and seeds, beside the paper's figure."""
    lines = [f"| | {study.axis} | kNN top-1, % | seeds | paper |", "|---|---|---|---|---|"]
    for point in study.points:
        if seeds := values.get((point.series, point.x)):
            each = ", ".join(f"{value:.1f}" for value in seeds)
            lines.append(f"| {point.series} | {point.x} | {statistics.mean(seeds):.1f} | {each} | {point.paper} |")
    return "\n".join(lines)


def judged_table(study, known, epochs):
    """Lines of Markdown: each point's means and half spreads, by all judges, and how long training took."""
    columns = ("untrained_knn_top1", "knn_top1", *JUDGES, "seconds")
    lines = [f"| | {study.axis} | untrained kNN | kNN | probe | fine-tuned | seconds | seeds |", "|---" * 8 + "|"]
    for point in study.points:
        rows = [known[key] for key in sorted(known) if key[:2] == (name(point.flags), epochs)]
        cells = []
        for column in columns if rows else ():
            found = [float(row[column]) for row in rows if row[column]]
            spread = f" ± {(max(found) - min(found)) / 2:.1f}" if len(found) > 1 and column != "seconds" else ""
            cells.append(f"{statistics.mean(found):.1f}{spread}" if found else "")
        if rows:
            lines.append("| " + " | ".join([point.series, point.x, *cells, str(len(rows))]) + " |")
    return "\n".join(lines)


def verdict(study, values):
    """Says which of the paper's orderings held by more than twice the standard error of the difference.

    The spread of the seeds is that of all points together, because two seeds say little about one point's spread.
    """
    of_runs = {name(point.flags): values.get((point.series, point.x), []) for point in study.points}  # each run once
    squares = sum(statistics.variance(v) * (len(v) - 1) for v in of_runs.values() if len(v) > 1)
    freedom = sum(len(v) - 1 for v in of_runs.values() if v)
    if not freedom:
        return "One seed does not tell the paper's orderings from chance."
    spread = math.sqrt(squares / freedom)
    said = {"held": [], "reversed": [], "not told apart": []}
    for better, worse in study.orderings:
        if better in values and worse in values:
            difference = statistics.mean(values[better]) - statistics.mean(values[worse])
            error = spread * math.sqrt(1 / len(values[better]) + 1 / len(values[worse]))
            kind = "not told apart" if abs(difference) <= 2 * error else "held" if difference > 0 else "reversed"
            series = f"{better[0]} " if better[0] != worse[0] or len({p.series for p in study.points}) > 1 else ""
            other = f"{worse[0]} " if better[0] != worse[0] else ""
            said[kind].append(f"{series}{better[1]} over {other}{worse[1]} ({difference:+.1f})")
    total = sum(map(len, said.values()))
    parts = [f"{kind}: {'; '.join(cases)}" for kind, cases in said.items() if cases]
    return (
        f"Of the paper's {total} orderings {len(said['held'])} held (seeds spread by {spread:.2f} points, standard "
        f"deviation). {'. '.join(part[0].upper() + part[1:] for part in parts)}."
    )


def plot(title, study, values, untrained, path):
    """Draws kNN against x: the mean of the seeds, with bars from the lowest to the highest, and untrained encoders."""
    try:
        import matplotlib
    except ImportError:
        print("No plot: matplotlib is missing (pip install -e '.[docs]').")
        return
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    places = list(dict.fromkeys(point.x for point in study.points))
    figure, axes = plt.subplots(figsize=(7, 4), constrained_layout=True)
    series = list(dict.fromkeys(point.series for point in study.points))
    for number, one in enumerate(series):
        drawn = [(places.index(x), v) for (s, x), v in values.items() if s == one]
        if not drawn:
            continue
        xs, seeds = zip(*drawn, strict=True)
        means = [statistics.mean(v) for v in seeds]
        bars = [
            [m - min(v) for m, v in zip(means, seeds, strict=True)],
            [max(v) - m for m, v in zip(means, seeds, strict=True)],
        ]
        shifted = [x + 0.06 * (number - (len(series) - 1) / 2) for x in xs]
        line = "-" if len(xs) > 1 and not study.at_equal_time else ""
        axes.errorbar(shifted, means, bars, marker="o", capsize=4, label=one, linestyle=line)
    drawn = [x for x in places if x in untrained]
    axes.plot([places.index(x) for x in drawn], [untrained[x] for x in drawn], "_", color="0.5", label="untrained")
    crowded = sum(map(len, places)) > 60
    axes.set_xticks(range(len(places)), places, rotation=30 * crowded, ha="right" if crowded else "center")
    axes.set(
        xlabel=study.axis, ylabel="kNN top-1, %", title=f"{title}: mean of the seeds, bars from lowest to highest"
    )
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=120)
    plt.close(figure)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
