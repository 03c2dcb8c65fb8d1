"""The built wheel carries all that a user types: recipes and exports, from an empty folder."""

import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parent.parent
SMALL = ["--arch=resnet10", "--width=4", "--batch_size=50", "--queue_size=100", "--train_split=test", "--knn_every=0"]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"  # what git tracks or would: a build leaves folders beside what it builds
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard", "-z"], cwd=REPOSITORY, check=True, capture_output=True
    )
    for name in listed.stdout.decode().split("\0"):
        if (REPOSITORY / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((REPOSITORY / name).read_bytes())
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", f"--wheel-dir={folder}", str(source)]
    subprocess.run(build, check=True)
    return next(folder.glob("moco_tf-*.whl"))


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """An environment with the wheel and this one's packages but for moco_tf, and an empty folder to work in."""
    folder = tmp_path_factory.mktemp("installed")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder / "venv"], check=True)
    python = folder / "venv/bin/python"
    packages = next((folder / "venv/lib").glob("python*/site-packages"))
    with zipfile.ZipFile(wheel) as file:  # what pip would do with it, in a fraction of the time
        file.extractall(packages)
    (packages / "others.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")  # its own .pth files are not read
    (folder / "empty").mkdir()

    def run(*arguments):
        done = subprocess.run([python, *arguments], cwd=folder / "empty", capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        return done.stdout

    found = run("-c", "import moco_tf; print(moco_tf.__file__)").strip()
    assert Path(found).is_relative_to(packages)
    return run


def test_the_wheel_holds_the_package_and_the_recipes_and_nothing_of_tests_or_benchmarks(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {"moco_tf"}
    recipes = {name.removeprefix("moco_tf/configs/") for name in names if name.startswith("moco_tf/configs/")}
    assert recipes - {"__init__.py"} == {path.name for path in (REPOSITORY / "configs").glob("*.flags")}
    modules = {str(path.relative_to(REPOSITORY)) for path in (REPOSITORY / "moco_tf").rglob("*.py")}
    assert modules <= set(names)
    assert any(name.startswith("moco_tf/data/embedded/") for name in names)


def test_a_recipe_trains_and_what_it_leaves_is_judged_and_exported(installed):
    flags = ["--flagfile=configs/quickstart.flags", *SMALL, "--max_steps=2", "--run_dir=run"]
    output = installed("-m", "moco_tf.train", *flags)
    assert "moco_tf/configs/quickstart.flags" in output.splitlines()[0]
    assert "Done: step 2 of" in output
    assert "kNN" in installed("-m", "moco_tf.evaluate.knn", "--encoder=run", "--dataset=embedded", "--limit=100")
    output = installed("-m", "moco_tf.serving.export", "--run_dir=run", "--output=encoder")
    assert "Wrote encoder/1" in output
    read = "from moco_tf import frozen; print(frozen.read('encoder').preprocessing.image_size)"
    assert installed("-c", read).split()[-1] == "32"


def test_every_export_command_answers(installed):
    assert all(
        word in installed("-m", "moco_tf.serving.export", "--help") for word in ("encoder", "classifier", "client")
    )
    for word in ("encoder", "classifier", "client"):
        assert "--output" in installed("-m", "moco_tf.serving.export", word, "--help")
