"""Data, classes, runs, encoders and results whose names are not text: every command reads and writes them."""

import csv
import json
import logging
import os
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest
import tensorflow as tf

from export import classifier, client, encoder
from moco_tf import command, files, run_folder, torch_weights, train
from moco_tf.data import __main__ as data
from moco_tf.data import boxes, convert, folder
from moco_tf.evaluate import (
    compare,
    features,
    finetune,
    knn,
    linear_probe,
    look,
    parquet,
    plots,
    projector,
    report,
)
from moco_tf.search import duplicates, index, odd, parts, query
from moco_tf.serving import client as serving_client
from moco_tf.transfer import pictures

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


# Names of every kind that a system takes, read by each command that keeps or shows them.

HARD = [
    os.fsdecode(b"k\xf6ln"),
    "two\nlines\r",
    "\x1b[2J\x07",
    "quotes'\"<b>&amp;$x$",
    "-rf",
    "~root",
    "\u202egnp.exe",
    "\u05e9\u05dc\u05d5\u05dd",
    "formula =1+1,;\t|",
    "x" * 251,
]


@pytest.fixture(scope="module")
def hard(tmp_path_factory):
    """A folder whose own name is hard, with an image of a hard name in each of as many classes."""
    folder = tmp_path_factory.mktemp("hard") / "-a\n\x1b[2J'\udce4"
    for number, name in enumerate(HARD):
        path = folder / "photos" / name / f"{name}.png"
        path.parent.mkdir(parents=True)
        path.write_bytes(tf.io.encode_png(np.full((40, 40, 3), 20 * number, np.uint8)).numpy())
    return folder


def shown(capsys):
    """What was printed; each line steers no terminal."""
    captured = capsys.readouterr()
    for line in (captured.out + captured.err).split("\n"):
        assert line == files.printable(line)
    return captured.out + captured.err


def test_refusals_and_the_log_are_one_line_whatever_the_names_in_them(hard, tmp_path, capsys):
    command.log_to_screen()
    assert knn.main([f"--encoder={hard / 'none'}"]) == 2
    with command.log_to_file(tmp_path / "log"):
        logging.getLogger("moco_tf").warning(f"{hard} is a name.")
    assert shown(capsys).count("\n") == 2
    text = (tmp_path / "log").read_text(encoding="utf-8")
    assert text.count("\n") == 1 and text.rstrip("\n") == files.printable(text.rstrip("\n"))


def test_images_are_converted_under_the_names_that_they_have(hard, capsys):
    output = hard / "smaller"
    assert convert.main([f"--images={hard / 'photos'}", f"--output={output}", "--size=16", "--processes=1"]) == 0
    assert {path.parent.name for path in output.rglob("*.jpg")} == set(HARD)
    assert "10 written" in shown(capsys)


def test_a_search_lists_and_shows_files_of_any_names(hard, capsys):
    command.log_to_screen()
    place, photos = hard / "index", hard / "photos"
    paths = sorted(str(path.relative_to(photos)) for path in photos.rglob("*.png"))
    images = [parts.Image(path, 100, 0, 40, 40, 20.0 * number, 0.0) for number, path in enumerate(paths)]
    vectors = np.float16(np.eye(len(paths)) + 1e-2)
    vectors[1] = vectors[0]
    place.mkdir()
    index.save(place, images, [parts.Broken("a\nb", 1, 0, "empty")], vectors)
    about = index.About(hard / "run", "0" * 64, "features", photos)
    index.write(place, about, "flat", index.pieces(place, about))
    for find in (duplicates, odd):
        assert find.main([f"--index={place}", f"--output={hard / 'found'}"]) == 0
    opened = index.read(place)
    settings = query.Settings(index=str(place), image=str(photos), html=str(hard / "query.html"))
    query._write(settings, opened, [(opened.path(n), [(n, 0.5)]) for n in range(len(paths))])
    settings = query.Settings(index=str(place), image=str(opened.path(0)))
    query._write(settings, opened, [(opened.path(0), [(m, 0.5) for m in range(len(paths))])])
    assert "0.5000" in shown(capsys)
    for table, column in (
        ("found/duplicates.csv", "path"),
        ("found/odd.csv", "path"),
        ("index/neighbours.csv", "query"),
    ):
        with open(hard / table, newline="", encoding="utf-8", errors="surrogateescape") as file:
            rows = list(csv.DictReader(file))
        assert rows and all(os.path.exists(photos / row[column]) for row in rows)
    for page in ("found/duplicates.html", "found/odd.html", "query.html"):
        assert_page(hard / page)


def assert_page(path):
    text = path.read_text(encoding="utf-8")
    assert "<b>&amp;$" not in text and "\x1b" not in text and "\u202e" not in text
    return text


def test_a_report_its_map_and_tensorboards_files_show_classes_of_any_names(hard, tmp_path):
    names = folder.scan(hard / "photos", ".").class_names
    assert len(names) == len(HARD) and all(name == files.printable(name) for name in names)
    labels, small = np.arange(len(names)), np.zeros((len(names), 8, 8, 3), np.uint8)
    plots.points(tmp_path / "map.png", np.random.default_rng(0).normal(size=(len(names), 2)), labels, names)
    projector.write(tmp_path, np.zeros((len(names), 4)), list(names), small)
    assert len((tmp_path / "metadata.tsv").read_text(encoding="utf-8").splitlines()) == len(names)
    settings = look.Settings(encoder=str(tmp_path), output=str(tmp_path))
    report.write(tmp_path / "report.html", settings, str(hard), list(names), labels, small, [(0, [(1, 0.5)])])
    assert_page(tmp_path / "report.html")


def test_a_table_of_features_has_the_paths_as_text(hard, tmp_path):
    paths = np.array(sorted(str(path) for path in (hard / "photos").rglob("*.png")))
    labels = np.arange(len(paths))
    arrays = {"features": np.eye(len(paths), dtype="float32"), "labels": labels, "ids": labels, "paths": paths}
    files.write_arrays(tmp_path / "features-00000.npz", arrays)
    names = [files.printable(name) for name in HARD]
    parquet.write(tmp_path / "features.parquet", [tmp_path / "features-00000.npz"], names, seed=0)
    table = pyarrow.parquet.read_table(tmp_path / "features.parquet").to_pydict()
    assert table["path"] == [files.printable(path) for path in paths] and table["class"] == names


def test_a_client_sends_files_of_any_names_and_says_so_in_plain_lines(hard, monkeypatch, capsys):
    answer = lambda images: {"x": np.zeros((len(images), 2)), "valid": np.arange(len(images)) > 2}  # noqa: E731
    monkeypatch.setattr(serving_client, "rest", lambda *_: answer)
    output = hard / "answers.npz"
    assert client.main([f"--images={hard / 'photos'}", f"--output={output}"]) == 0
    assert all(Path(file).exists() for file in np.load(output)["files"].tolist())
    assert "3 of them cannot be decoded" in shown(capsys)


def test_annotated_images_and_classes_of_any_names_are_read_and_drawn(hard, tmp_path, capsys):
    command.log_to_screen()
    text = [name for name in HARD if files.is_text(name)]  # as JSON has it
    annotations = {
        "images": [{"id": n, "file_name": f"photos/{name}/{name}.png"} for n, name in enumerate(text)],
        "categories": [{"id": n, "name": name} for n, name in enumerate(text)],
        "annotations": [{"id": n, "image_id": n, "category_id": n, "bbox": [1, 2, 9, 9]} for n in range(len(text))],
    }
    (hard / "train.json").write_text(json.dumps(annotations))
    found = boxes.find(str(hard), "", "train", 0.0)
    assert found.size == len(text) and all(name == files.printable(name) for name in found.class_names)
    shown(capsys)
    drawn = (np.array([[1, 2, 9, 9.0]] * len(text)), np.arange(len(text)))
    pictures.boxes(tmp_path / "boxes.png", [np.zeros((40, 40, 3), np.uint8)], [drawn], [None], found.class_names)
    assert (tmp_path / "boxes.png").exists()


def test_a_long_name_leaves_a_picture_its_room(tmp_path):
    names, labels = ["x" * 255, "y"], np.arange(2)
    for path, of in ((tmp_path / "long.png", names), (tmp_path / "cut.png", ["x" * 37 + "...", "y"])):
        plots.points(path, np.eye(2), labels, of)
    assert (tmp_path / "long.png").read_bytes() == (tmp_path / "cut.png").read_bytes()
