"""The notebooks of examples/ have no outputs in the repository, and run; the commands of docs/tutorial.md run."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parent.parent
NOTEBOOKS = sorted((REPOSITORY / "examples").glob("*.ipynb"))


@pytest.mark.parametrize("file", NOTEBOOKS, ids=lambda file: file.stem)
def test_it_has_no_outputs(file):
    code = [cell for cell in json.loads(file.read_text())["cells"] if cell["cell_type"] == "code"]
    assert code and not any(cell["outputs"] or cell["execution_count"] for cell in code)


@pytest.mark.slow
@pytest.mark.parametrize("file", NOTEBOOKS, ids=lambda file: file.stem)
def test_it_runs(file, tmp_path):
    import nbformat
    from nbclient import NotebookClient

    notebook = nbformat.read(file, as_version=4)
    NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(tmp_path)}}).execute()


@pytest.mark.slow
def test_the_tutorials_commands_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cells = json.loads((REPOSITORY / "examples/photographs.ipynb").read_text())["cells"]
    exec("".join(cells[1]["source"]), {})  # makes the folder
    text = (REPOSITORY / "docs/tutorial.md").read_text().replace("\\\n", "")
    commands = re.findall(r"^python (-m moco_tf\..*)$", text, re.M)
    assert len(commands) == 7
    for command in commands:
        short = ["--max_steps=4"] if "moco_tf.train" in command else []
        subprocess.run([sys.executable, *shlex.split(command), *short], check=True)
    for page in ("runs/photos/look/report.html", "alike.html", "duplicates/duplicates.html", "odd/odd.html"):
        assert (tmp_path / page).exists(), page
