"""`python -m moco_tf.data` says what is there and shows the views; `--dataset` finds what it names."""

import pytest

from moco_tf import build
from moco_tf.command import ConfigError
from moco_tf.config import Config
from moco_tf.data import sources
from moco_tf.data.__main__ import main


@pytest.fixture
def photos(tmp_path):
    for number, record in enumerate(sources.embedded("test").in_order(12).as_numpy_iterator()):
        folder = tmp_path / "photos" / ("cat" if number % 3 else "dog")
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{number:02d}.jpg").write_bytes(record["image"])
    return tmp_path / "photos"


def flags(photos, *more):
    run_dir = f"--run_dir={photos.parent / 'run'}"
    return [f"--dataset={photos}", run_dir, "--augment=cifar", "--image_size=32", "--batch_size=4", *more]


def test_it_prints_counts_classes_formats_and_sizes_and_writes_views(photos, capsys):
    assert main(flags(photos)) == 0
    output = capsys.readouterr().out
    for line in (
        f"{photos}: 12 images, 0 of them undecodable",
        "Classes: 2 (cat 8, dog 4)",
        "Formats: JPEG 12",
        "Width: 32 to 32 pixels, median 32",
        f"Views of --augment=cifar, queries above, their keys below: {photos.parent / 'run/data.png'}",
    ):
        assert line in output.splitlines()
    assert {path.name for path in (photos.parent / "run").iterdir()} == {"data.png"}


def test_it_names_bad_files_and_ends_as_a_run_would(photos, capsys):
    (photos / "cat/01.jpg").write_bytes(b"")
    assert main(flags(photos)) == 2
    output = capsys.readouterr()
    assert "Undecodable: cat/01.jpg (empty)" in output.out.splitlines()
    assert "1 of 12 are: cat/01.jpg (empty)" in output.err and output.err.count("\n") == 1
    assert main(flags(photos, "--max_bad_fraction=0.1")) == 0
    assert main(flags(photos, "--max_bad_fraction=0.1", "--batch_size=20")) == 2


def test_the_embedded_images_can_be_looked_at(tmp_path, capsys):
    assert main([f"--run_dir={tmp_path}", "--train_split=test", "--augment=cifar", "--image_size=32"]) == 0
    assert "embedded test: 2000 images, 0 of them undecodable" in capsys.readouterr().out


def test_a_dataset_that_is_nothing_says_what_it_could_be(tmp_path):
    for name in ("/no/such/folder", "no_such_set"):
        with pytest.raises(ConfigError, match="'embedded', a folder of images, or the name of a data set of TFDS"):
            build.find(Config(dataset=name, data_dir=str(tmp_path)), "train")


def test_an_existing_folder_comes_before_a_name_of_tfds(photos):
    folder = photos.rename(photos.parent / "cifar10")
    found = build.find(Config(dataset="cifar10", data_dir=str(folder.parent)), "train")
    assert (found.path, found.size) == (folder, 12)
