"""What the benchmarks found: a JSON file each, in docs/results/bench/."""

import json
from pathlib import Path

FOLDER = Path(__file__).parent.parent / "docs/results/bench"


def file(name):
    return FOLDER / f"{name}.json"


def write(path, found):
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_suffix(".part")
    aside.write_text(json.dumps(found, indent=1) + "\n")
    aside.replace(path)


def read(path):
    return json.loads(path.read_text())
