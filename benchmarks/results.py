"""The benchmarks' results: one JSON file for each, in docs/results/bench/."""

import json
from pathlib import Path

from moco_tf import files

FOLDER = Path(__file__).parent.parent / "docs/results/bench"


def file(name):
    return FOLDER / f"{name}.json"


def write(path, found):
    path.parent.mkdir(parents=True, exist_ok=True)
    files.write_json(path, found)


def read(path):
    return json.loads(path.read_text())
