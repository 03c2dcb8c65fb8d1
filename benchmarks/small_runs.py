"""Finds the settings that learn most, by runs that differ from the quickstart at 32 pixels in a few flags.

    python -m benchmarks.small_runs --jobs=2

A tenth of the embedded *training* images is held out. A run trains on the other nine tenths, and kNN top-1 on the
held-out tenth judges it (one standard error is about 1.5 points); no test image judges. On two cores, a run
has one with --jobs=2, so compare its seconds only with those of other such runs. Every run is a row of
docs/results/small_runs.csv, including those that lost. The benchmark is resumable: runs in this file are not repeated.
"""

import argparse
import collections
import concurrent.futures
import csv
import hashlib
import json
import os
import queue
import re
import subprocess
import sys
from pathlib import Path

import numpy as np

from moco_tf import run_folder
from moco_tf.data import sources
from moco_tf.evaluate import scores

ROOT = Path(__file__).parent.parent
LONGEST = 200  # characters of a trial's folder name: names have at most 255 bytes
HELD_OUT = 10  # every tenth image of a class
COLUMNS = ("flags", "seed", "seconds_of_steps", "images_per_second", "held_out_knn_top1")
# The search starts from what the quickstart was at 32 pixels.
BASE = (
    "--flagfile=configs/quickstart.flags --image_size=32 --views_on=host --queue_size=4096 --crop_min=0.2 --lr=0.03 "
    "--momentum=0.99 --epochs=6"
)
SMALL = "--views_on=device --image_size=16"  # a quarter of the pixels; crops are decoded once, in memory
NT_XENT = f"{SMALL} --crop_min=0.4 --lr=0.06 --method=end_to_end --loss=nt_xent --temperature=0.2"
SLOW = f"{SMALL} --queue_size=1024 --crop_min=0.4 --lr=0.06 --momentum=0.996"  # the key encoder
TRIALS = (
    "",
    "--queue_size=1024 --lr=0.06",
    "--queue_size=1024",
    "--lr=0.06",
    "--queue_size=1024 --batch_size=64 --lr=0.06",
    "--queue_size=1024 --lr=0.06 --momentum=0.97",
    "--queue_size=1024 --lr=0.06 --temperature=0.2",
    "--queue_size=1024 --lr=0.06 --positives=3 --mask_siblings --epochs=4",
    "--queue_size=1024 --lr=0.06 --symmetric --epochs=3",
    "--queue_size=1024 --lr=0.06 --crop_min=0.4",
    f"{SMALL} --queue_size=1024 --crop_min=0.4 --lr=0.06 --epochs=14",
    f"{SMALL} --queue_size=1024 --crop_min=0.4 --lr=0.06 --width=32 --epochs=12",
    "--views_on=device --image_size=24 --queue_size=1024 --crop_min=0.4 --lr=0.06 --epochs=10",
    f"{NT_XENT} --epochs=12",
    f"{NT_XENT} --batch_size=256 --epochs=14",
    f"{SLOW} --epochs=16",
    f"{SLOW} --momentum=0.998 --epochs=16",
    f"{SLOW} --temperature=0.2 --epochs=16",
    f"{SLOW} --lr=0.12 --epochs=16",
    f"{SLOW} --lr=0.04 --epochs=16",
    f"{SLOW} --crop_min=0.2 --epochs=16",
    f"{SLOW} --crop_min=0.6 --epochs=16",
    f"{SLOW} --queue_size=4096 --epochs=16",
    f"{SLOW} --queue_size=512 --epochs=16",
    f"{SLOW} --width=32 --epochs=13",
    f"{SLOW} --positives=3 --mask_siblings --epochs=9",
    f"{SLOW} --symmetric --epochs=9",
    f"{SLOW} --small_views=2 --epochs=12",
    f"{SLOW} --small_views=2 --small_crop_max=0.6 --epochs=12",
    f"{SLOW} --pretext=patches --epochs=14",
    f"{SLOW} --growing_sizes=12,14 --epochs=20",
    f"{SLOW} --growing_sizes=12,16 --image_size=20 --epochs=16",
    f"{SLOW} --momentum_schedule=cosine --epochs=16",
    "--views_on=device --image_size=32 --growing_sizes=16,24 --width=32 --queue_size=4096 --crop_min=0.2 --lr=0.06 "
    "--momentum=0.996 --epochs=36",
    f"{SLOW} --optimizer=adamw --lr=0.001 --weight_decay=0.05 --epochs=16",
    f"{SLOW} --optimizer=lars --lr=0.6 --weight_decay=1e-6 --warmup_epochs=1 --epochs=16",
)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=ROOT / "runs/search", help="of the images and the runs")
    parser.add_argument("--seeds", default="0", help="comma-separated; each trial is run with each")
    parser.add_argument("--jobs", type=int, default=1, help="runs side by side, each on its share of the cores")
    parser.add_argument("--trial", action="append", help="flags of a trial, in place of those of this file")
    parser.add_argument("--output", type=Path, default=ROOT / "docs/results/small_runs.csv")
    arguments = parser.parse_args()
    images = arguments.folder / "images"
    if not (images / "done").exists():
        write_images(images)
    rows = read(arguments.output)
    known = {(row["flags"], row["seed"]) for row in rows}
    trials = [(flags, seed) for seed in arguments.seeds.split(",") for flags in arguments.trial or TRIALS]
    shares, cores = queue.SimpleQueue(), sorted(os.sched_getaffinity(0))
    for job in range(arguments.jobs):
        shares.put(cores[job :: arguments.jobs] or cores)
    with concurrent.futures.ThreadPoolExecutor(arguments.jobs) as pool:
        missing = [trial for trial in trials if trial not in known]
        done = [pool.submit(run, arguments.folder, images, *trial, shares) for trial in missing]
        for future in concurrent.futures.as_completed(done):
            rows.append(future.result())
            print("  ".join(f"{rows[-1][name]}" for name in COLUMNS), flush=True)
            scores.write_rows(arguments.output, rows)


def write_images(folder):
    """Writes folder/train and folder/val, with a folder for each class in them."""
    source, seen = sources.embedded("train"), collections.Counter()
    for number, record in enumerate(source.in_order().as_numpy_iterator()):
        split = "train" if seen[record["label"]] % HELD_OUT else "val"
        seen[record["label"]] += 1
        place = folder / split / source.class_names[record["label"]]
        place.mkdir(parents=True, exist_ok=True)
        (place / f"{number:05}.jpg").write_bytes(record["image"])
    (folder / "done").touch()


def read(path):
    if not path.exists():
        return []
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def run(folder, images, flags, seed, shares):
    """Trains and judges one trial on one share of the cores; returns its row."""
    name = re.sub(r"[^\w.]+", "-", flags).strip("-") or "quickstart"
    if len(name) > LONGEST:
        name = f"{name[:LONGEST]}-{hashlib.sha256(flags.encode()).hexdigest()[:8]}"
    run_dir = folder / name / seed
    share = shares.get()
    try:
        data = [f"--dataset={images}", "--eval_split=val", "--knn_every=0", f"--seed={seed}", f"--run_dir={run_dir}"]
        call(share, "moco_tf.train", *BASE.split(), *flags.split(), *data)
        call(share, "moco_tf.evaluate.knn", f"--encoder={run_dir}", f"--output={run_dir / 'knn'}", "--k=200")
    finally:
        shares.put(share)
    speed = np.median([float(row["images_per_second"]) for row in run_folder.rows(run_dir)])
    steps = re.findall(r"steps ([\d.]+), waiting for images ([\d.]+)", (run_dir / "train.log").read_text())
    seconds = sum(float(part) for parts in steps for part in parts)
    top1 = json.loads((run_dir / "knn/summary.json").read_text())["top1"]
    return dict(zip(COLUMNS, (flags, seed, round(seconds), round(speed), round(top1, 1)), strict=True))


def call(share, module, *arguments):
    """Runs a command on these cores."""
    done = subprocess.run(
        [sys.executable, "-m", module, *arguments],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": str(len(share))},
        capture_output=True,
        text=True,
        preexec_fn=lambda: os.sched_setaffinity(0, share),
        check=False,
    )
    if done.returncode:
        raise SystemExit(f"{module} {' '.join(arguments)}\n{done.stdout[-1000:]}{done.stderr[-1000:]}")


if __name__ == "__main__":
    main()
