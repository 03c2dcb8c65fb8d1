"""How long whole commands take, and the share of their epochs that training steps take.

    python -m benchmarks.run
    git worktree add ../before HEAD~1; python -m benchmarks.run --before=../before --rounds=3

Runs the quickstart, five epochs on a folder of 1,000 images at 64 pixels, and kNN and features of the quickstart's
encoder, each command in a process of its own. With --before, another checkout's commands take turns with these
commands, and the last column is how many times as long a command takes here (median of the rounds' ratios). Writes its
JSON file to docs/results/bench/.
"""

import argparse
import csv
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks import folder_start, results, turns
from moco_tf.startup import load_tensorflow

ROOT = Path(__file__).parent.parent
OUTPUT = results.file("run")
FOLDER = ["--image_size=64", "--epochs=5", "--batch_size=64", "--queue_size=512", "--knn_every=0"]
SMALL = ["--batch_size=8", "--knn_every=0", "--max_steps=2"]  # an encoder to evaluate, whatever it has learnt


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", type=Path, help="another checkout, to take turns with")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--commands", default="quickstart,folder,knn,features", help="those to run, of these")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    arguments = parser.parse_args()
    load_tensorflow()  # `fill` reads images with it
    checkouts = {"here": ROOT} | ({"before": arguments.before.resolve()} if arguments.before else {})
    found = {"machine": turns.machine(), "rounds": arguments.rounds, "commands": {}}
    with tempfile.TemporaryDirectory() as place:
        place = Path(place)
        folder_start.fill(place / "photos", 1000)
        quickstart = ["moco_tf.train", "--flagfile=configs/quickstart.flags"]
        run([*quickstart, *SMALL, f"--run_dir={place}/encoder"], ROOT)
        commands = {
            "quickstart": quickstart,
            "folder": [*quickstart, *FOLDER, f"--dataset={place}/photos"],
            "knn": ["moco_tf.evaluate.knn", f"--encoder={place}/encoder"],
            "features": ["moco_tf.evaluate.features", f"--encoder={place}/encoder"],
        }
        print(f"{'command':12} {'seconds':>8} {'step_share':>11} {'before':>8} {'times as long':>14}")
        for name in arguments.commands.split(","):
            found["commands"][name] = of_command = measure(commands[name], checkouts, arguments.rounds, place / "out")
            print(
                f"{name:12} {statistics.median(of_command['here']):8.1f} {of_command['step_share'] or '':>11} "
                + (
                    f"{statistics.median(of_command['before']):8.1f} {of_command['times']:14.2f}"
                    if arguments.before
                    else ""
                ),
                flush=True,
            )
            results.write(arguments.output, found)


def measure(command, checkouts, rounds, output):
    """{checkout: seconds of each round}, with the median `step_share` of the epochs here, and the median ratio."""
    found, shares = {name: [] for name in checkouts}, []
    trains = command[0] == "moco_tf.train"
    for number in range(rounds):
        for name in list(checkouts)[:: 1 if number % 2 else -1]:
            begun = time.perf_counter()
            run([*command, f"--{'run_dir' if trains else 'output'}={output}"], checkouts[name])
            found[name].append(round(time.perf_counter() - begun, 2))
            if trains and name == "here":
                with open(output / "metrics.csv", newline="") as file:
                    shares += [float(row["step_share"]) for row in csv.DictReader(file) if row["step_share"]]
            shutil.rmtree(output)
    found["step_share"] = round(statistics.median(shares), 3) if shares else None
    if "before" in found:
        ratios = [here / before for here, before in zip(found["here"], found["before"], strict=True)]
        found["times"] = round(statistics.median(ratios), 3)
    return found


def run(command, checkout):
    done = subprocess.run([sys.executable, "-m", *command], cwd=checkout, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed: {done.stdout[-2000:]}{done.stderr[-2000:]}")


if __name__ == "__main__":
    main()
