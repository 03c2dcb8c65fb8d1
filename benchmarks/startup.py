"""Seconds from the command to the end of the first training step.

    python -m benchmarks.startup

Runs `moco_tf.train` for one step and measures the time to the line that reports the step. The runs are v2's ResNet-50
at 224 pixels, with 16 images a step, and the quickstart, which first evaluates kNN on 12,000 images. Writes
docs/results/bench/startup.json.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks import results

ROOT = Path(__file__).parent.parent
OUTPUT = results.file("startup")
COMMANDS = {
    "ResNet-50": ["--flagfile=configs/v2.flags", "--dataset=embedded", "--batch_size=16", "--knn_every=0"],
    "quickstart": ["--flagfile=configs/quickstart.flags"],
}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path, default=OUTPUT)
    arguments = parser.parse_args()
    print(f"seconds to the end of the first step, medians of {arguments.rounds}")
    found = {}
    for name, flags in COMMANDS.items():
        found[name] = round(statistics.median(first_step(flags) for _ in range(arguments.rounds)), 1)
        print(f"{name:16} {found[name]:6.1f}")
    results.write(arguments.output, {"rounds": arguments.rounds, "seconds": found})


def first_step(flags):
    """Seconds from the start of the process to its report of step 1."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-u", "-m", "moco_tf.train", *flags, "--max_steps=1", f"--run_dir={folder}/run"]
        begin = time.perf_counter()
        with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
            lines = []
            for line in process.stdout:
                lines.append(line)
                if line.startswith("Epoch"):
                    seconds = time.perf_counter() - begin
        if process.returncode:
            raise SystemExit(f"{' '.join(command)} failed: {''.join(lines[-3:])}")
    return seconds


if __name__ == "__main__":
    main()
