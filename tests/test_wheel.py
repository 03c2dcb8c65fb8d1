"""What a built wheel carries is enough: installed, in an empty folder, it trains, judges and exports."""

import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf

REPOSITORY = Path(__file__).parent.parent
BUILT_FROM = ("LICENSE", "README.md", "pyproject.toml", "benchmarks", "configs", "export", "moco_tf", "tests")
SMALL = ["--width=4", "--batch_size=32", "--queue_size=64", "--knn_every=0"]


def pip(*arguments):
    done = subprocess.run([sys.executable, "-m", "pip", *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel, built from a copy: a build folder in the repository could hold files that are gone."""
    copy = tmp_path_factory.mktemp("copy")
    for name in BUILT_FROM:
        if (REPOSITORY / name).is_dir():
            shutil.copytree(REPOSITORY / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(REPOSITORY / name, copy / name)
    here = all(importlib.util.find_spec(name) for name in ("setuptools", "wheel"))
    pip("wheel", "--no-deps", *(["--no-build-isolation"] if here else []), f"--wheel-dir={copy / 'dist'}", str(copy))
    (path,) = (copy / "dist").glob("*.whl")
    return path


@pytest.fixture(scope="module")
def run(wheel, tmp_path_factory):
    """Installs the wheel; gives a function that calls its Python, with `at`, the empty folder where it runs."""
    environment = tmp_path_factory.mktemp("environment")
    venv.create(environment)
    python = environment / ("Scripts" if os.name == "nt" else "bin") / "python"
    pip("--python", str(python), "install", "--no-deps", "--no-index", str(wheel))
    # The packages that it needs are those of this Python. A .pth file's folder comes after the environment's own, and
    # its .pth files, an editable install's among them, are not read.
    site = sysconfig.get_path("purelib", vars={"base": str(environment), "platbase": str(environment)})
    (Path(site) / "needed.pth").write_text(sysconfig.get_path("purelib") + "\n")
    folder = tmp_path_factory.mktemp("empty")
    variables = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}

    def call(*arguments):
        return subprocess.run(
            [python, *arguments], cwd=folder, env=variables, capture_output=True, text=True, check=False
        )

    call.at, call.package = folder, Path(site) / "moco_tf"
    found = call("-c", "import moco_tf; print(moco_tf.__file__)")
    assert found.stdout.strip() == str(call.package / "__init__.py"), found.stderr
    return call


@pytest.fixture(scope="module")
def trained(run):
    """What the quickstart printed, cut short."""
    done = run("-m", "moco_tf.train", "--flagfile=configs/quickstart.flags", *SMALL, "--max_steps=2")
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_wheel_holds_the_package_and_every_recipe_and_no_tests_or_benchmarks(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {"moco_tf"}
    assert not {name for name in names if {"tests", "benchmarks", "conftest.py"} & set(name.split("/"))}
    moved = {"moco_tf": "moco_tf", "configs": "moco_tf/configs", "export/serving": "moco_tf/serving/server"}
    for folder, inside in moved.items():
        for path in (REPOSITORY / folder).rglob("*"):
            if path.is_file() and "__pycache__" not in path.parts:
                assert f"{inside}/{path.relative_to(REPOSITORY / folder).as_posix()}" in names


def test_an_installed_wheel_trains_by_a_packaged_recipe_and_says_which(run, trained):
    assert trained.startswith(f"Recipe: {run.package}/configs/quickstart.flags\n")
    assert "Done: step 2 of" in trained
    assert "--augment=cifar\n" in (run.at / "runs/quickstart/config.flags").read_text()


def test_an_installed_wheel_judges_what_it_trained(run, trained):
    done = run("-m", "moco_tf.evaluate.knn", "--encoder=runs/quickstart", "--limit=200", "--k=5")
    assert done.returncode == 0, done.stdout + done.stderr
    assert (run.at / "runs/quickstart/knn/summary.json").exists()
    probe = run("-m", "moco_tf.evaluate.linear_probe", "--flagfile=configs/linear_v1.flags")
    assert probe.stdout == f"Recipe: {run.package}/configs/linear_v1.flags\n" and probe.returncode == 2


def test_an_installed_wheel_exports_what_it_trained_and_names_a_start_script_that_is_there(run, trained):
    done = run("-m", "moco_tf.serving.export", "--run_dir=runs/quickstart", "--output=models/encoder")
    assert done.returncode == 0, done.stdout + done.stderr
    script = run.package / "serving/server/serve.sh"
    assert f"Wrote models/encoder/1. Serve it: {script} models\n" in done.stdout
    assert os.access(script, os.X_OK)
    encoder = tf.saved_model.load(str(run.at / "models/encoder/1")).signatures["serving_default"]
    answer = encoder(images=tf.zeros((3, 40, 36, 3), tf.uint8))
    assert answer["features"].shape == (3, 32) and np.isfinite(answer["features"]).all()
