"""Data, classes, runs, encoders and results whose names are not text: every command reads and writes them."""

import csv
import json
import logging
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf

from export import classifier, client, encoder
from moco_tf import run_folder, torch_weights, train
from moco_tf.data import __main__ as data
from moco_tf.evaluate import compare, features, finetune, knn, linear_probe, look
from moco_tf.serving import client as serving_client

CLASSES = [os.fsdecode(name) for name in (b"k\xf6ln", b"m\xfcnchen")]
SHOWN = ["k\\udcf6ln", "m\\udcfcnchen"]
SMALL = ["--arch=resnet10", "--width=4", "--stem=cifar", "--image_size=32", "--augment=cifar", "--dim=8"]
SMALL += ["--batch_size=4", "--queue_size=8", "--bn_groups=1"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder whose own name is not text, with 12 and 6 images of two classes in it."""
    folder = tmp_path_factory.mktemp("names") / os.fsdecode(b"\xe4")
    rng = np.random.default_rng(0)
    for split, count in (("train", 12), ("test", 6)):
        for number in range(count):
            path = folder / "photos" / split / CLASSES[number % 2] / os.fsdecode(b"%d\xdf.png" % number)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(tf.io.encode_png(rng.integers(0, 255, (32, 40, 3), np.uint8)).numpy())
    return folder


@pytest.fixture(scope="module")
def run(place):
    folder = place / os.fsdecode(b"r\xfcn")
    assert train.main([*SMALL, "--epochs=1", f"--dataset={place / 'photos'}", f"--run_dir={folder}"]) == 0
    return folder


@pytest.fixture(autouse=True, scope="module")
def _nothing_fails_to_be_shown():
    """Streams here are strict as a terminal's; logging would print its own failures on stderr and go on."""

    def fail(handler, record):
        raise  # what `emit` has caught

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(logging.Handler, "handleError", fail)
        yield


def assert_text(folder):
    """All files that are to be text are; those that repeat a path keep its bytes."""
    for file in folder.rglob("*"):
        kept = file.name.endswith("_images.csv") or file.name == "config.flags"
        if file.suffix in (".json", ".csv", ".txt", ".log", ".html", ".tsv", ".md", ".pbtxt") and not kept:
            text = file.read_text(encoding="utf-8")
            if file.suffix == ".json":
                json.dumps(json.loads(text), ensure_ascii=False).encode()


def test_training_writes_a_run_and_goes_on(place, run, capsys):
    assert run_folder.recorded(run).dataset == str(place / "photos")
    arguments = [f"--flagfile={run / 'config.flags'}", f"--run_dir={run}", "--epochs=2"]
    assert train.main(arguments) == 0
    output = capsys.readouterr().out
    assert "Going on from step 3 of 6" in output and "\\udce4/r\\udcfcn/checkpoints/step-000000006" in output
    assert len(run_folder.rows(run)) == 2 and list((run / "tensorboard").glob("events*"))
    assert (run / "views.png").exists() and "\\udce4/photos" in (run / "train.log").read_text(encoding="utf-8")
    assert_text(run)


def test_a_data_set_is_looked_at(place, capsys):
    photos, folder = place / "photos", place / os.fsdecode(b"l\xf6ok")
    (photos / "train" / CLASSES[0] / os.fsdecode(b"b\xe4d.png")).write_bytes(b"")
    arguments = [*SMALL, f"--dataset={photos}", f"--run_dir={folder}", "--max_bad_fraction=0.1"]
    assert data.main(arguments) == 0
    output = capsys.readouterr().out
    assert "Classes: 2 (k\\udcf6ln 7, m\\udcfcnchen 6)" in output and "k\\udcf6ln/b\\udce4d.png (empty)" in output
    assert (folder / "data.png").exists()
    (photos / "train" / CLASSES[0] / os.fsdecode(b"b\xe4d.png")).unlink()


@pytest.mark.parametrize(
    "main, arguments",
    [
        (knn.main, []),
        (linear_probe.main, ["--lr=1", "--epochs=1"]),
        (finetune.main, ["--epochs=1", "--labels=50"]),
    ],
    ids=["knn", "linear_probe", "finetune"],
)
def test_an_encoder_is_judged_and_its_classes_have_names_that_are_text(place, run, capsys, main, arguments):
    output = place / os.fsdecode(b"r\xe9sultat")
    assert main([f"--encoder={run}", f"--output={output}", *arguments]) == 0
    assert "\\udce4/r\\udce9sultat" in capsys.readouterr().out
    summary = json.loads((output / "summary.json").read_bytes())
    assert summary["class_names"] == SHOWN and summary["settings"]["dataset"].endswith("\\udce4/photos")
    with open(output / "per_class.csv", newline="", encoding="utf-8") as file:
        assert [row["class"] for row in csv.DictReader(file)] == SHOWN
    assert_text(output)
    shutil.rmtree(output)


def test_features_go_on_and_keep_the_paths_that_the_system_knows(place, run):
    for format in ("npz", "parquet"):
        assert features.main([f"--encoder={run}", f"--format={format}"]) == 0
    paths = np.load(run / "features/features-00000.npz")["paths"]
    assert len(paths) == 12 and all(os.path.exists(path) for path in paths.tolist())
    assert_text(run / "features")


def test_a_look_shows_them(run):
    assert look.main([f"--encoder={run}", "--queries=2", "--neighbours=2"]) == 0
    assert SHOWN[0] in (run / "look/report.html").read_text(encoding="utf-8")
    assert_text(run / "look")


@pytest.mark.slow
def test_a_comparison_keeps_its_supervised_network_and_takes_it_again(place, run, monkeypatch):
    monkeypatch.setattr(linear_probe, "RATES", (0.1, 1.0))
    assert compare.main([f"--encoder={run}", "--epochs=1"]) == 0
    supervised = [f"--supervised={run / 'compare/supervised'}", f"--output={place / 'again'}"]
    assert compare.main([f"--encoder={run}", *supervised]) == 0
    assert_text(run / "compare")


@pytest.mark.slow
def test_an_encoder_is_exported_and_read_back(place, run):
    probe, output = place / os.fsdecode(b"pr\xf6be"), place / os.fsdecode(b"exp\xf6rt")
    assert linear_probe.main([f"--encoder={run}", f"--output={probe}", "--lr=1", "--epochs=1"]) == 0
    assert encoder.main([f"--run_dir={run}", f"--output={output / 'encoder'}"]) == 0
    assert classifier.main([f"--run_dir={run}", f"--probe={probe}", f"--output={output / 'classifier'}"]) == 0
    assert json.loads((output / "classifier/1/encoder.json").read_bytes())["class_names"] == SHOWN
    onnx = output / os.fsdecode(b"\xfc.onnx")
    assert encoder.main([f"--run_dir={run}", f"--output={onnx}", "--format=onnx"]) == 0 and onnx.exists()
    assert_text(output)
    shutil.copytree(output / "encoder/1", output / os.fsdecode(b"\xfc"))
    for exported in (output / "encoder", output / os.fsdecode(b"\xfc")):
        judged = [f"--encoder={exported}", f"--dataset={place / 'photos'}", f"--output={output / 'knn'}"]
        assert knn.main(judged) == 0


def test_weights_go_out_to_pytorchs_names_and_back(place, run):
    file, folder = place / os.fsdecode(b"w\xfc.safetensors"), place / os.fsdecode(b"c\xfc")
    photos = [*SMALL, f"--dataset={place / 'photos'}"]
    assert torch_weights.main([f"--encoder={run}", f"--output={file}", "--part=whole"]) == 0
    assert torch_weights.main([f"--checkpoint={file}", f"--output={folder}", *photos]) == 0
    assert run_folder.recorded(folder).dataset == str(place / "photos")
    alone = place / os.fsdecode(b"e\xfc")
    assert torch_weights.main([f"--checkpoint={file}", f"--output={alone}", "--part=encoder"]) == 0
    shutil.copy(alone / "encoder.keras", place / os.fsdecode(b"\xfc.keras"))
    for number, source in enumerate((folder, alone, place / os.fsdecode(b"\xfc.keras"))):
        assert torch_weights.main([f"--encoder={source}", f"--output={place / f'{number}.safetensors'}"]) == 0
    assert_text(folder)


def test_a_client_keeps_the_names_of_the_files_that_it_sent(place, monkeypatch):
    monkeypatch.setattr(serving_client, "rest", lambda *_: lambda images: {"x": np.zeros((len(images), 2))})
    output = place / os.fsdecode(b"\xfc.npz")
    assert client.main([f"--images={place / 'photos'}", f"--output={output}"]) == 0
    assert all(Path(file).exists() for file in np.load(output)["files"].tolist())


def test_an_image_that_goes_while_it_is_trained_on_is_named_in_one_line(place, tmp_path, capsys, monkeypatch):
    from moco_tf.data import dataset

    photos, open_split = tmp_path / os.fsdecode(b"\xfc"), dataset.Split.open
    shutil.copytree(place / "photos", photos)

    def open_and_lose(*arguments, **names):
        source = open_split(*arguments, **names)
        shutil.rmtree(photos / "train" / CLASSES[0])
        return source

    monkeypatch.setattr(dataset.Split, "open", open_and_lose)
    arguments = [*SMALL, "--epochs=1", "--knn_every=0", f"--dataset={photos}", f"--run_dir={tmp_path / 'run'}"]
    assert train.main(arguments) == 1
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith("Stopped at step 0: ") and "k\\xf6ln/" in last and "No such file" in last
