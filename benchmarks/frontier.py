"""How much recipes learn within several budgets of wall time, on the embedded images.

    python -m benchmarks.frontier --budgets=5,15,40 --seeds=0,1,2
    python -m benchmarks.frontier --test

A short run first measures a recipe's speed; the schedule of a run is then as long as its budget allows. Runs train on
nine tenths of the embedded *training* images, with all cores, one after another. kNN and a linear probe on the
held-out tenth judge them, so that no test image chooses a recipe. --test evaluates the finished runs on the 2,000 test
images, once, at the end. Every run is a row of docs/results/frontier.csv; runs in this file are not repeated.
"""

import argparse
import json
import os
import re
import statistics
from pathlib import Path

from benchmarks.small_runs import BASE, ROOT, call, read, write_images
from moco_tf import run_folder
from moco_tf.evaluate import plots, scores

RECIPES = {  # two starting points, the result of the search, and the same without a queue
    "quickstart at 32 pixels": BASE,
    "reference": "--flagfile=configs/embedded_reference.flags",
    "quickstart": "--flagfile=configs/quickstart.flags",
    "end to end, NT-Xent": "--flagfile=configs/quickstart.flags --method=end_to_end --loss=nt_xent --temperature=0.2",
}
START = 12  # seconds before the first step, roughly; they count towards a budget
TIMED = 60  # steps that measure a recipe's speed
COLUMNS = (
    "recipe", "budget_minutes", "seed", "epochs", "images_seen", "wall_seconds",
    "held_out_knn", "held_out_probe", "test_knn", "test_probe",
)  # fmt: skip
KEY = COLUMNS[:3]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=ROOT / "runs/search", help="of the images and the runs")
    parser.add_argument("--budgets", default="5,15,40", help="minutes, comma-separated")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--recipe", action="append", choices=RECIPES, help="only this one; may be given again")
    parser.add_argument("--test", action="store_true", help="judge the finished runs on the test images, at the end")
    parser.add_argument("--output", type=Path, default=ROOT / "docs/results/frontier.csv")
    arguments = parser.parse_args()
    images = arguments.folder / "images"
    if not (images / "done").exists():
        write_images(images)
    rows = read(arguments.output)
    for seed in arguments.seeds.split(","):
        for budget in arguments.budgets.split(","):
            for recipe in arguments.recipe or RECIPES:
                key = dict(zip(KEY, (recipe, budget, seed), strict=True))
                row = next((row for row in rows if key.items() <= row.items()), None)
                if row is None and not arguments.test:
                    row = key | run(arguments.folder, images, recipe, float(budget), seed)
                    rows.append(row)
                elif row is not None and arguments.test and not row["test_knn"]:
                    row |= judged(run_dir(arguments.folder, *key.values()), ["--dataset=embedded"], "test")
                else:
                    continue
                rows.sort(key=_place)
                scores.write_rows(arguments.output, rows)
                print("  ".join(f"{row[name]}" for name in COLUMNS), flush=True)
    if rows:
        print(table(rows))
        draw(rows, arguments.output.with_suffix(".png"))


def _place(row):
    """The sort key of a row: recipe, then budget, then seed."""
    return [*RECIPES].index(row["recipe"]), float(row["budget_minutes"]), int(row["seed"])


def run_dir(folder, recipe, budget, seed):
    return folder / "frontier" / f"{re.sub(r'[^a-z0-9.]+', '-', recipe.lower())},{budget},{seed}"


def run(folder, images, recipe, budget, seed):
    """Trains a recipe for `budget` minutes and judges it on the held-out images; returns its row without the key."""
    data = [f"--dataset={images}", "--knn_every=0", f"--seed={seed}"]
    cores = sorted(os.sched_getaffinity(0))

    def train(into, *flags):
        call(cores, "moco_tf.train", *RECIPES[recipe].split(), *data, *flags, f"--run_dir={into}")

    trial = run_dir(folder, recipe, "speed", 0)
    if not (trial / "metrics.csv").exists():  # once per recipe
        train(trial, f"--max_steps={TIMED}", "--epochs=200", "--seed=0")
    per_second = float(run_folder.rows(trial)[-1]["images_per_second"])
    count = len(list((images / "train").glob("*/*")))
    epochs = max(1, round((60 * budget - START) * per_second / count))
    into = run_dir(folder, recipe, f"{budget:g}", seed)
    train(into, f"--epochs={epochs}")
    seconds = sum(float(s) for s in re.findall(r"Wall time (\d+) s", (into / "train.log").read_text()))
    seen = epochs * count
    row = {"epochs": epochs, "images_seen": seen, "wall_seconds": round(seconds), "test_knn": "", "test_probe": ""}
    return row | judged(into, [f"--dataset={images}", "--eval_split=val"], "held_out")


def judged(encoder, data, kind):
    """{kind_knn, kind_probe}: accuracies in percent."""
    cores, found = sorted(os.sched_getaffinity(0)), {}
    for name, command in (("knn", "moco_tf.evaluate.knn"), ("probe", "moco_tf.evaluate.linear_probe")):
        output = encoder / f"{kind}_{name}"
        call(cores, command, f"--encoder={encoder}", *data, f"--output={output}")
        found[f"{kind}_{name}"] = round(json.loads((output / "summary.json").read_text())["top1"], 2)
    return found


def table(rows):
    """Lines of Markdown: means over the seeds."""
    lines = ["| recipe | minutes | epochs | seconds | " + " | ".join(COLUMNS[6:]) + " | seeds |", "|---" * 9 + "|"]
    for recipe, budget in dict.fromkeys((row["recipe"], row["budget_minutes"]) for row in rows):
        of = [row for row in rows if (row["recipe"], row["budget_minutes"]) == (recipe, budget)]
        cells = [statistics.mean(float(row[name]) for row in of) for name in ("epochs", "wall_seconds")]
        figures = [[float(row[name]) for row in of if row[name] != ""] for name in COLUMNS[6:]]
        figures = [f"{statistics.mean(each):.1f}" if each else "" for each in figures]
        lines.append("| " + " | ".join([recipe, budget, *(f"{c:.0f}" for c in cells), *figures, str(len(of))]) + " |")
    return "\n".join(lines)


def draw(rows, path):
    """Draws held-out kNN over minutes, one curve per recipe."""
    points = []
    for recipe, budget in dict.fromkeys((row["recipe"], row["budget_minutes"]) for row in rows):
        of = [float(r["held_out_knn"]) for r in rows if (r["recipe"], r["budget_minutes"]) == (recipe, budget)]
        points.append({"minutes": float(budget), recipe: statistics.mean(of)})
    names = list(dict.fromkeys(row["recipe"] for row in rows))
    points = [dict.fromkeys(names, "") | point for point in sorted(points, key=lambda point: point["minutes"])]
    plots.curves(path, points, "minutes", *names, unit="kNN top-1 on held-out images, %")


if __name__ == "__main__":
    main()
