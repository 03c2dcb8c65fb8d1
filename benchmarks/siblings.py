"""What several pictures of one thing teach beyond crops of each, on simulated clips.

    python -m benchmarks.siblings

A simulated clip shows an embedded CIFAR-10 training image at ten places and scales on ten neighbouring crops of one
photograph (one of scikit-learn's two). `--pretext=crops` takes each frame as an image of its own; `siblings` takes two
frames of a clip, with and without `--mask_siblings`, or four (three keys) with it. All train for 320 steps. kNN top-1
on the embedded test images judges the encoders. The benchmark is resumable: it does not make or train again what
--folder holds. Writes docs/results/bench/siblings.json.
"""

import argparse
import subprocess
import sys
from pathlib import Path

import numpy as np
import tensorflow as tf

from benchmarks import results, turns

ROOT = Path(__file__).parent.parent
CLIPS, FRAMES, SIDE, BATCH, STEPS = 2048, 10, 48, 128, 320  # SIDE: of a frame, in pixels
FLAGS = [
    *("--arch=resnet10", "--width=16", "--stem=cifar", "--image_size=32", "--augment=cifar", "--crop_min=0.2"),
    *(f"--batch_size={BATCH}", "--lr=0.06", "--lr_per=step", "--queue_size=1024", "--momentum=0.99"),
    *("--temperature=0.1", "--dim=64", "--knn_every=0"),
]
KINDS = {  # flags, and epochs that make STEPS steps
    "crops": (["--pretext=crops"], STEPS * BATCH // (CLIPS * FRAMES)),
    "siblings": (["--pretext=siblings"], STEPS * BATCH // CLIPS),
    "siblings, masked": (["--pretext=siblings", "--mask_siblings"], STEPS * BATCH // CLIPS),
    "siblings, 3 keys, masked": (["--pretext=siblings", "--positives=3", "--mask_siblings"], STEPS * BATCH // CLIPS),
}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=ROOT / "runs/siblings", help="of clips and runs")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--output", type=Path, default=results.file("siblings"))
    arguments = parser.parse_args()
    clips = arguments.folder / "clips"
    if not (clips / "done").exists():
        make(clips)
        (clips / "done").touch()
    accuracies = {kind: [] for kind in KINDS}
    for seed in range(arguments.seeds):
        for kind, (flags, epochs) in KINDS.items():
            run = arguments.folder / f"{kind.replace(', ', '-').replace(' ', '-')}-{seed}"
            if not (run / "knn/knn.txt").exists():
                own = [*flags, f"--epochs={epochs}", f"--dataset={clips}", f"--seed={seed}", f"--run_dir={run}"]
                _command("moco_tf.train", *FLAGS, *own)
                said = _command(
                    "moco_tf.evaluate.knn", f"--encoder={run}", "--dataset=embedded", f"--output={run}/knn"
                )
                (run / "knn/knn.txt").write_text(said)
            accuracies[kind].append(_accuracy((run / "knn/knn.txt").read_text()))
    print(f"kNN top-1 on the embedded test images after {STEPS} steps of {BATCH} on {CLIPS} simulated clips:")
    for kind, found in accuracies.items():
        print(f"  {kind:26} {'  '.join(f'{x:.1f}' for x in found)}   mean {np.mean(found):.1f}")
    results.write(arguments.output, {"machine": turns.machine(), "steps": STEPS, "knn_top1": accuracies})


def make(folder):
    """Writes the clips: folder/<number>/<frame>.jpg."""
    from sklearn.datasets import load_sample_images

    from moco_tf.data import sources
    from moco_tf.data.encoded import decode

    photographs, rng = load_sample_images().images, np.random.default_rng(0)
    records = sources.embedded("train").in_order(CLIPS)
    for number, record in enumerate(records):
        (folder / f"{number:04}").mkdir(parents=True, exist_ok=True)
        thing, photograph = decode(record["image"]).numpy(), photographs[number % len(photographs)]
        corner = rng.integers(0, np.array(photograph.shape[:2]) - SIDE - 2 * FRAMES)
        drift, place, speed = rng.integers(-2, 3, 2), rng.uniform(0, SIDE, 2), rng.uniform(-2, 2, 2)
        scale, growth = rng.uniform(24, 40), rng.uniform(-1, 1)
        for frame in range(FRAMES):
            top, left = np.clip(corner + FRAMES * 2 + drift * frame, 0, np.array(photograph.shape[:2]) - SIDE)
            canvas = photograph[top : top + SIDE, left : left + SIDE].copy()
            side = int(np.clip(scale + growth * frame, 20, SIDE))
            y, x = np.clip(place + speed * frame, 0, SIDE - side).astype(int)
            canvas[y : y + side, x : x + side] = tf.image.resize(thing, (side, side), antialias=True).numpy()
            data = tf.io.encode_jpeg(canvas, quality=90).numpy()
            (folder / f"{number:04}/{frame}.jpg").write_bytes(data)


def _command(module, *arguments):
    command = [sys.executable, "-m", module, *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(command)}\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    return done.stdout


def _accuracy(said):
    """The percentage in the last line of moco_tf.evaluate.knn's output that has one."""
    line = [line for line in said.splitlines() if "%" in line][-1]
    return float(line.split("%")[0].split()[-1])


if __name__ == "__main__":
    main()
