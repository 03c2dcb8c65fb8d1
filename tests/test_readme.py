"""What the README shows runs."""

import re
from pathlib import Path

import tensorflow as tf

from moco_tf.data import sources

REPOSITORY = Path(__file__).parent.parent


def test_the_python_example_runs(tmp_path, monkeypatch):
    (example,) = re.findall(r"```python\n(.*?)```", (REPOSITORY / "README.md").read_text(), re.DOTALL)
    (tmp_path / "photos").mkdir()
    for number, record in enumerate(sources.embedded("test").in_order().take(192).as_numpy_iterator()):
        (tmp_path / f"photos/{number}.jpg").write_bytes(record["image"])
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(compile(example, "README.md", "exec"), names)
    assert names["features"].shape == (192, 128)
    assert names["features"].std() > 0
    assert int(names["model"].step) == 6
    assert tf.io.gfile.exists("moco.keras")


def test_the_files_that_it_names_exist():
    text = (REPOSITORY / "README.md").read_text()
    for name in re.findall(r"\]\(([^)h][^)]*)\)|`((?:configs|moco_tf|docs|tests)/[\w./]+)`", text):
        assert (REPOSITORY / (name[0] or name[1])).exists(), name
