"""The commands of evaluation, on a tiny run and a folder of a few images."""

import contextlib
import csv
import io
import json
import logging
import shutil
import subprocess
import sys
import types
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf

import moco_tf
from moco_tf import build, command, files, frozen, run_folder, train
from moco_tf.checkpoint import Checkpoints
from moco_tf.data.inputs.image import IMAGENET, Preprocessing
from moco_tf.evaluate import compare, features, finetune, knn, linear_probe, look, planar_map, sts, subject
from moco_tf.serving import saved_model

REPOSITORY = Path(__file__).parent.parent
CLASSES = ("blue & <white>", "green", "red")


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """24 and 12 images of three classes, each a colour in noise."""
    folder = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    for split, count in (("train", 24), ("test", 12)):
        for number in range(count):
            image = rng.integers(0, 160, (32, 40, 3))
            image[..., 2 - number % 3] += 90
            path = folder / split / CLASSES[number % 3] / f"{number:02d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(tf.io.encode_png(image.astype(np.uint8)).numpy())
    return folder


@pytest.fixture(scope="module")
def run(photos, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    arguments = ["--arch=resnet10", "--width=4", "--stem=imagenet", "--image_size=32", "--augment=cifar", "--dim=8"]
    arguments += ["--batch_size=8", "--queue_size=16", "--bn_groups=1", "--epochs=1", f"--dataset={photos}"]
    assert train.main([*arguments, f"--run_dir={folder}"]) == 0
    return folder


def summary(folder):
    return json.loads((Path(folder) / "summary.json").read_text())


def rows(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_training_monitors_knn_where_there_are_labels_and_says_where_it_began(run):
    before = json.loads((run / "baselines.json").read_text())
    after = float(rows(run / "metrics.csv")[-1]["knn_top1"])
    said = f"untrained {before['untrained']:.1f} %, raw pixels {before['raw pixels']:.1f} %"
    log = (run / "train.log").read_text()
    assert f"kNN top-1 before training: {said}\n" in log and f"kNN top-1: {said}, epoch 1 {after:.1f} %\n" in log
    assert before["raw pixels"] > 90  # each class is a colour


@pytest.fixture(scope="module")
def judged(run):
    """Where kNN has judged the run: its summary, and what it printed."""
    with contextlib.redirect_stdout(io.StringIO()) as output:
        assert knn.main([f"--encoder={run}"]) == 0
    return summary(run / "knn"), output.getvalue()


def test_knn_gives_the_accuracy_of_the_monitor(run, judged):
    monitored = float(rows(run / "metrics.csv")[-1]["knn_top1"])
    found, output = judged
    assert found["top1"] == pytest.approx(monitored, abs=1e-3) and found["class_names"] == list(CLASSES)
    assert found["eval_images"] == 12 and found["train_images"] == 24
    assert [row["k"] for row in rows(run / "knn/metrics.csv")] == ["1", "5", "10", "20", "50", "100", "200"]
    assert sum(int(row["images"]) for row in rows(run / "knn/per_class.csv")) == 12
    assert {"metrics.png", "confusion.png", "confusions.csv"} <= {p.name for p in (run / "knn").iterdir()}
    assert f"top-1 {monitored:.1f} %" in output


def test_a_command_called_again_keeps_each_log_to_its_own_folder(run, tmp_path):
    for name, status, more in (("a", 0, []), ("b", 2, ["--eval_split=nothing"]), ("c", 0, [])):
        assert knn.main([f"--encoder={run}", f"--output={tmp_path / name}", *more]) == status
        assert not [h for h in logging.getLogger("moco_tf").handlers if isinstance(h, logging.FileHandler)]
    for name in ("a", "c"):
        text = (tmp_path / name / "log.txt").read_text()
        assert text.count("kNN, k 200") == 1 and f"{tmp_path}/{name}" in text


def test_a_saved_model_is_judged_as_its_run_and_nothing_is_written_into_its_folder(run, judged, photos, tmp_path):
    saved_model.export_encoder(build.trained(run), tmp_path / "encoder/1")
    before = sorted(tmp_path.rglob("*"))
    assert knn.main([f"--encoder={tmp_path / 'encoder'}", f"--dataset={photos}"]) == 0
    (folder,) = (p for p in tmp_path.iterdir() if p.name.startswith("encoder-knn"))
    assert summary(folder)["top1"] == judged[0]["top1"]
    assert [p for p in sorted(tmp_path.rglob("*")) if "encoder" in p.parts[-2:]] == [
        p for p in before if "encoder" in p.parts[-2:]
    ]


@pytest.mark.parametrize(
    "arguments", [["--lr=auto", "--epochs=20"], ["--lr=3", "--epochs=2", "--batch_size=7", "--batch_norm"]]
)
def test_a_probe_leaves_the_encoder_alone_and_a_classifier_that_scores_what_it_says(run, tmp_path, capsys, arguments):
    assert linear_probe.main([f"--encoder={run}", f"--output={tmp_path}", *arguments]) == 0
    assert "tensors of the encoder, BatchNorm's statistics included, are bit-equal" in capsys.readouterr().out
    model = build.trained(run)
    settings = knn.Settings(encoder=str(run), output=str(tmp_path)).resolved()
    encoder = frozen.of_model(model)
    test = subject.source(settings, "test", encoder.preprocessing)
    of_test, labels = subject.features(settings, encoder, test)
    probe = np.load(tmp_path / "probe.npz")
    assert probe["kernel"].shape == (32, 3) and probe["kernel"].dtype == probe["bias"].dtype == np.float32
    found = 100 * ((of_test @ probe["kernel"] + probe["bias"]).argmax(axis=1) == labels).mean()
    assert summary(tmp_path)["top1"] == pytest.approx(found, abs=1e-3)
    assert rows(tmp_path / "metrics.csv")[-1]["top1"] == str(round(summary(tmp_path)["top1"], 4))
    assert (tmp_path / "rates.csv").exists() == ("--lr=auto" in arguments)


def test_a_probe_that_changed_its_encoder_would_be_found_out(run, tmp_path, capsys, monkeypatch):
    def meddle(settings, encoder, train, test):
        models[0].backbone.get_layer("bn1").moving_mean.assign_add(tf.fill([4], 1e-6))

    models, trained = [], build.trained
    monkeypatch.setattr(build, "trained", lambda path: models.append(trained(path)) or models[0])
    monkeypatch.setattr(linear_probe, "probe", meddle)
    assert linear_probe.main([f"--encoder={run}", f"--output={tmp_path}"]) == 2
    assert "bn1/moving_mean changed" in capsys.readouterr().err


def test_fine_tuning_starts_from_the_encoder_or_from_fresh_weights(run):
    settings = finetune.Settings(encoder=str(run), seed=3)
    tuned, _ = finetune.network(settings, 3)
    fresh, _ = finetune.network(finetune.Settings(encoder=str(run), seed=3, init="random"), 3)
    trained = build.trained(run).backbone.get_weights()
    assert all(np.array_equal(a, b) for a, b in zip(tuned.get_weights(), trained, strict=False))
    kernel = "conv1"
    assert not np.array_equal(tuned.get_layer(kernel).kernel.numpy(), fresh.get_layer(kernel).kernel.numpy())
    assert not np.array_equal(trained[0], fresh.get_weights()[0])


def test_fine_tuning_takes_the_steps_that_it_says_and_keeps_a_network_that_scores_so(run, tmp_path, capsys):
    arguments = [f"--encoder={run}", f"--output={tmp_path}", "--labels=50", "--epochs=2", "--batch_size=8", "--lr=0.1"]
    assert finetune.main(arguments) == 0
    found = summary(tmp_path)
    assert found["train_images"] == 12 and found["steps"] == 4  # 8 + 4 images, twice
    assert "(50 %: 4 of each class)" in capsys.readouterr().out
    model = keras.models.load_model(tmp_path / "model.keras")
    settings = knn.Settings(encoder=str(run), output=str(tmp_path)).resolved()
    classifier = frozen.Encoder(build.trained(run).preprocessing, lambda x: {"logits": model(x)}, "classifier")
    logits, labels = subject.features(
        settings, classifier, subject.source(settings, "test", classifier.preprocessing), "logits"
    )
    assert found["top1"] == pytest.approx(100 * (logits.argmax(axis=1) == labels).mean(), abs=1e-3)


def naive_subset(labels, percent, seed):
    """The rule one image at a time: in turns the next image of each class, within a turn in shuffled order."""
    order = np.random.default_rng(seed).permutation(len(labels)).tolist()
    number = max(round(percent / 100 * len(labels)), len(set(labels.tolist())))
    taken = []
    while len(taken) < number:
        of_turn = []
        for place in order:
            if labels[place] not in {labels[other] for other in of_turn}:
                of_turn.append(place)
        order = [place for place in order if place not in of_turn]
        taken += of_turn
    return sorted(taken[:number])


@pytest.mark.parametrize("sizes", [[100, 100, 3], [40, 7, 1, 1], [10, 10, 10], [1, 1], [5, 90]])
def test_subsets_have_the_size_that_they_say_are_balanced_as_far_as_classes_reach_and_parts_of_one_another(sizes):
    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(len(sizes)) * 3, sizes))
    smaller = np.array([], np.int64)
    for percent in (0.5, 3, 10, 30, 50, 87.5, 100):
        subset = finetune.balanced_subset(labels, percent, seed=1)
        assert subset.tolist() == naive_subset(labels, percent, seed=1) == sorted(set(subset.tolist()))
        assert len(subset) == max(round(percent / 100 * len(labels)), len(sizes))
        counts = np.unique(labels[subset], return_counts=True)[1]
        level = counts.max()  # a class that has fewer has given all, or is a last turn's one behind
        assert all(count in (level, size) or count == level - 1 for count, size in zip(counts, sizes, strict=True))
        assert set(smaller) <= set(subset)
        smaller = subset
    assert subset.tolist() == list(range(len(labels)))


def test_subsets_are_fixed_by_the_seed():
    labels = np.repeat([0, 1], [50, 50])
    one, same, other = (finetune.balanced_subset(labels, 10, seed).tolist() for seed in (1, 1, 2))
    assert one == same != other


def test_fine_tuning_says_what_it_took_of_each_class(run, photos, tmp_path, capsys):
    shutil.copytree(photos, tmp_path / "photos")
    for number in (5, 8, 11, 14, 17, 20, 23):  # of 8 red ones
        (tmp_path / f"photos/train/red/{number:02d}.png").unlink()
    arguments = [f"--encoder={run}", f"--dataset={tmp_path / 'photos'}", f"--output={tmp_path / 'out'}", "--epochs=1"]
    assert finetune.main([*arguments, "--labels=50"]) == 0
    output = capsys.readouterr().out
    assert "8 of the 17 labelled images" in output and "(47.1 %: blue & <white> 4, green 3, red 1)" in output
    found = summary(tmp_path / "out")
    assert (found["train_images"], found["train_images_of_class"]) == (8, [4, 3, 1])
    assert found["train_percent"] == pytest.approx(100 * 8 / 17, abs=1e-4)


def test_interrupted_features_go_on_and_equal_those_of_one_go(run, photos, tmp_path, monkeypatch):
    arguments = [f"--encoder={run}", "--shard_size=5"]
    assert features.main([*arguments, f"--output={tmp_path / 'whole'}"]) == 0
    save, written = files.write_arrays, []

    def save_two(path, arrays):
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(path)
        save(path, arrays)

    monkeypatch.setattr(files, "write_arrays", save_two)
    assert features.main([*arguments, f"--output={tmp_path / 'parts'}"]) == 130
    monkeypatch.undo()
    assert features.main([*arguments, f"--output={tmp_path / 'parts'}"]) == 0
    names = [f"features-{number:05d}.npz" for number in range(5)]
    for folder in ("whole", "parts"):
        assert sorted(p.name for p in (tmp_path / folder).glob("*.npz")) == names
    for name in names:
        a, b = (np.load(tmp_path / folder / name) for folder in ("whole", "parts"))
        np.testing.assert_allclose(a["features"], b["features"], atol=1e-5)
        for key in ("ids", "labels", "paths"):
            np.testing.assert_array_equal(a[key], b[key])
    assert a["features"].shape == (4, 32) and Path(a["paths"][-1]).is_relative_to(photos / "train")
    assert Path(a["paths"][-1]).parent.name == CLASSES[a["labels"][-1]]


def test_shards_of_features_have_each_image_once_and_lie_side_by_side(run, photos, tmp_path, capsys):
    arguments = [f"--encoder={run}", "--shard_size=5"]
    assert features.main([*arguments, f"--output={tmp_path / 'whole'}"]) == 0
    for number in (1, 3):
        assert features.main([*arguments, f"--output={tmp_path / 'parts'}", f"--shard={number}/3"]) == 0
    assert features.main([*arguments, f"--output={tmp_path / 'parts'}", "--shard=3/3"]) == 0
    assert "0 images of" in capsys.readouterr().out.splitlines()[-1]
    assert features.main([*arguments, f"--output={tmp_path / 'parts'}"]) == 0  # what no shard has
    names = [f"features-0000{n}.npz" for n in (0, 1)] + [
        f"features-{s}-of-3-0000{n}.npz" for s in (1, 3) for n in (0, 1)
    ]
    assert sorted(path.name for path in (tmp_path / "parts").glob("*.npz")) == names
    whole, parts = (
        [np.load(path) for path in sorted((tmp_path / folder).glob("*.npz"))] for folder in ("whole", "parts")
    )
    ids = np.concatenate([part["ids"] for part in parts])
    assert sorted(ids.tolist()) == list(range(24))
    together = np.concatenate([part["features"] for part in parts])[np.argsort(ids)]
    np.testing.assert_allclose(together, np.concatenate([part["features"] for part in whole]), atol=1e-5)


def test_features_become_one_parquet_file_with_a_map(run, photos, tmp_path):
    from pyarrow import parquet

    arguments = [f"--encoder={run}", "--shard_size=10", f"--output={tmp_path}"]
    assert features.main([*arguments, "--format=parquet"]) == 0
    table = parquet.read_table(tmp_path / "features.parquet")
    assert table.column_names == ["path", "id", "label", "class", "vector", "x", "y"]
    assert [str(field.type) for field in table.schema] == [
        "string", "int64", "int64", "string", "fixed_size_list<element: float>[32]", "float", "float"
    ]  # fmt: skip
    shards = [np.load(path) for path in sorted(tmp_path.glob("*.npz"))]
    for column, name in (("path", "paths"), ("id", "ids"), ("label", "labels"), ("vector", "features")):
        assert table[column].to_pylist() == np.concatenate([shard[name] for shard in shards]).tolist()
    assert table["class"].to_pylist() == [CLASSES[label] for label in table["label"].to_pylist()]
    places = np.stack([table["x"].to_numpy(), table["y"].to_numpy()], axis=1)
    assert np.isfinite(places).all() and len(np.unique(places, axis=0)) == 24


def test_a_map_of_many_images_shows_their_principal_components(monkeypatch):
    monkeypatch.setattr(planar_map, "TSNE_UP_TO", 50)
    rng = np.random.default_rng(0)
    features = rng.normal(size=(90, 2)) @ rng.normal(size=(2, 12)) + 0.01 * rng.normal(size=(90, 12))
    places = planar_map.places([lambda n=n: features[n : n + 30] for n in (0, 30, 60)], seed=0)
    directions = features / np.linalg.norm(features, axis=1, keepdims=True)
    centred = directions - directions.mean(axis=0)
    exact = centred @ np.linalg.svd(centred)[2][:2].T
    assert places.shape == (90, 2)
    for axis in range(2):
        assert abs(np.corrcoef(places[:, axis], exact[:, axis])[0, 1]) > 0.99


def test_what_shards_and_tables_need_is_said_in_a_line(run, tmp_path, capsys, monkeypatch):
    arguments = [f"--encoder={run}", f"--output={tmp_path}"]
    assert features.main([*arguments, "--shard=4/3"]) == 2
    assert "--shard=3/16 is the third of 16 parts" in capsys.readouterr().err
    assert features.main([*arguments, "--shard=1/3", "--format=parquet"]) == 2
    assert "into one folder" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    assert features.main([*arguments, "--format=parquet"]) == 2
    assert "pip install 'moco_tf[search]'" in capsys.readouterr().err and not list(tmp_path.glob("*.npz"))


def test_features_of_another_encoder_or_data_set_are_not_mixed(run, tmp_path, capsys):
    arguments = [f"--encoder={run}", f"--output={tmp_path}"]
    assert features.main(arguments) == 0
    assert features.main([*arguments, "--split=test"]) == 2
    assert "another split (there 'train', here 'test')" in capsys.readouterr().err
    assert features.main([*arguments, f"--data_dir={tmp_path}"]) == 2
    assert f"another data_dir (there '', here '{tmp_path}')" in capsys.readouterr().err


def test_features_of_a_folder_that_has_gained_an_image_are_not_mixed(run, photos, tmp_path, capsys):
    images, output = shutil.copytree(photos, tmp_path / "images"), tmp_path / "features"
    arguments = [f"--encoder={run}", f"--dataset={images}", f"--output={output}", "--shard_size=5"]
    assert features.main(arguments) == 0
    added = next((images / "train").rglob("*.png"))
    shutil.copy(added, added.with_name("0first.png"))  # all numbers move by one
    assert features.main(arguments) == 2
    assert "has gained or lost some since features-" in capsys.readouterr().err
    added.with_name("0first.png").unlink()
    added.unlink()
    assert features.main(arguments) == 2


def test_features_of_an_encoder_that_was_exported_anew_are_not_mixed(photos, tmp_path, capsys):
    def export(version, seed):
        keras.utils.set_random_seed(seed)
        network = keras.Sequential([keras.Input((4, 4, 3)), keras.layers.Flatten(), keras.layers.Dense(2)])
        moco_tf.export_encoder(network, tmp_path / f"encoder/{version}", preprocessing=Preprocessing(4))

    arguments = [f"--encoder={tmp_path / 'encoder'}", f"--dataset={photos}", f"--output={tmp_path / 'features'}"]
    export(1, seed=0)
    assert features.main(arguments) == 0
    export(2, seed=1)
    assert features.main(arguments) == 2
    assert "features of another identity" in capsys.readouterr().err


def test_a_lost_or_damaged_file_of_features_is_made_anew_and_no_other_is_overwritten(run, tmp_path, capsys):
    arguments = [f"--encoder={run}", f"--output={tmp_path}", "--shard_size=5"]
    assert features.main(arguments) == 0
    contents = {path: path.read_bytes() for path in tmp_path.glob("*.npz")}
    (tmp_path / "features-00001.npz").write_bytes(b"PK")
    assert features.main(arguments) == 2
    assert "features-00001.npz cannot be read" in capsys.readouterr().err
    (tmp_path / "features-00001.npz").unlink()
    assert features.main([*arguments, "--shard=1/2"]) == 0  # another division takes what is missing alone
    assert features.main(arguments) == 0
    ids = np.concatenate([np.load(path)["ids"] for path in tmp_path.glob("*.npz")])
    assert sorted(ids.tolist()) == list(range(24))
    assert all(path.read_bytes() == content for path, content in contents.items() if path.exists())


def test_features_that_are_not_finite_are_not_written(photos, tmp_path, capsys):
    network = keras.Sequential([keras.Input((4, 4, 3)), keras.layers.Flatten(), keras.layers.Dense(2)])
    network.layers[-1].bias.assign([np.nan, 0])
    moco_tf.export_encoder(network, tmp_path / "encoder/1", preprocessing=Preprocessing(4))
    output = tmp_path / "features"
    arguments = [f"--encoder={tmp_path / 'encoder'}", f"--dataset={photos}", f"--output={output}"]
    assert features.main(arguments) == 2
    assert "not finite for 24 of 24 images" in capsys.readouterr().err and not list(output.glob("*.npz"))


@pytest.mark.slow
def test_compare_prints_an_encoder_between_its_floor_and_its_ceiling(run, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(linear_probe, "RATES", (0.1, 1.0))
    assert compare.main([f"--encoder={run}", f"--output={tmp_path}", "--epochs=1"]) == 0
    table = rows(tmp_path / "metrics.csv")
    assert [r["encoder"] for r in table] == [
        "untrained",
        "pre-trained",
        "supervised",
        "supervised, its own classifier",
    ]
    monitored, before = rows(run / "metrics.csv")[-1]["knn_top1"], json.loads((run / "baselines.json").read_text())
    assert float(table[1]["knn_top1"]) == pytest.approx(float(monitored), abs=1e-3)
    assert float(table[0]["knn_top1"]) == pytest.approx(before["untrained"], abs=1e-3)
    assert "untrained" in capsys.readouterr().out and (tmp_path / "compare.png").exists()


@pytest.mark.usefixtures("judged")
def test_a_report_holds_its_pictures_and_asks_nothing_of_a_network(run, tmp_path):
    assert look.main([f"--encoder={run}", f"--output={tmp_path}", "--queries=2", "--neighbours=3"]) == 0
    text = (tmp_path / "report.html").read_text()
    assert text.count("<figure") == 2 * 4 and text.count("data:image/png;base64,") == 2 * 4 + 3  # map, loss, kNN
    assert "http" not in text and 'src="data:' in text and "blue &amp; &lt;white&gt;" in text
    assert "<td>knn</td><td>12</td>" in text
    assert np.loadtxt(tmp_path / "features.tsv").shape == (12, 32)
    assert len((tmp_path / "metadata.tsv").read_text().splitlines()) == 12
    assert tf.io.decode_png((tmp_path / "sprite.png").read_bytes()).shape == (4 * 48, 4 * 48, 3)
    from google.protobuf import text_format
    from tensorboard.plugins.projector import ProjectorConfig

    config = text_format.Parse((tmp_path / "projector_config.pbtxt").read_text(), ProjectorConfig())
    assert (tmp_path / config.embeddings[0].tensor_path).exists()


def test_neighbours_without_labels_are_not_shown_as_of_one_class(run, photos, tmp_path):
    (tmp_path / "flat").mkdir()
    for number, file in enumerate(sorted(file for file in photos.rglob("*") if file.is_file())[:6]):
        shutil.copy(file, tmp_path / "flat" / f"{number}{file.suffix}")
    flags = [f"--encoder={run}", f"--dataset={tmp_path}/flat", "--queries=2", "--neighbours=2", "--perplexity=2"]
    assert look.main([*flags, f"--output={tmp_path}/out"]) == 0
    text = (tmp_path / "out/report.html").read_text()
    assert text.count("<figure") == 6 and 'class="same"' not in text and "Green" not in text


def test_a_class_without_images_to_learn_from_is_named_and_its_images_count_as_wrong(run, photos, tmp_path, capsys):
    shutil.copytree(photos, tmp_path / "photos")
    shutil.rmtree(tmp_path / "photos/train/red")
    for main in (knn.main, linear_probe.main):
        arguments = [f"--encoder={run}", f"--dataset={tmp_path / 'photos'}", f"--output={tmp_path / 'out'}"]
        assert main(arguments) == 0
        text = capsys.readouterr().out
        assert "1 classes have no image to learn from: red. Their 4 images of the evaluation count as wrong." in text
        assert rows(tmp_path / "out/per_class.csv")[2] == {"class": "red", "images": "4", "top1": "0.0"}


def test_a_split_that_lacks_a_class_is_judged_by_the_names_of_its_classes(run, photos, tmp_path, capsys):
    shutil.copytree(photos, tmp_path / "photos")
    flags = [f"--encoder={run}", f"--dataset={tmp_path / 'photos'}", "--k=1"]
    shutil.copytree(photos / "test", tmp_path / "photos/sketches")  # no split: its classes are listed alone
    assert knn.main([*flags, "--eval_split=sketches", f"--output={tmp_path / 'whole'}"]) == 0
    shutil.rmtree(tmp_path / "photos/sketches" / CLASSES[0])
    assert knn.main([*flags, "--eval_split=sketches", f"--output={tmp_path / 'part'}"]) == 0
    whole, part = (
        {row["class"]: row for row in rows(tmp_path / name / "per_class.csv")} for name in ("whole", "part")
    )
    assert part[CLASSES[0]]["images"] == "0" and all(part[name] == whole[name] for name in CLASSES[1:])


def test_images_that_are_learnt_from_and_judged_are_counted(run, photos, tmp_path, capsys):
    files = sorted((photos / "train").rglob("*.png"))
    (tmp_path / "all.csv").write_text("path,label\n" + "".join(f"{file},{file.parent.name}\n" for file in files))
    assert knn.main([f"--encoder={run}", f"--dataset={tmp_path}/all.csv", f"--output={tmp_path}/out"]) == 0
    assert "24 of the 24 images of" in (text := capsys.readouterr().out) and "this is accuracy on what was" in text


@pytest.mark.parametrize(
    "main, folder, flags",
    [
        (knn.main, "knn-caf\udce9", []),
        pytest.param(*(finetune.main, "finetune-caf\udce9-encoder-100", ["--epochs=1"]), marks=pytest.mark.slow),
        (look.main, "look-caf\udce9", ["--queries=1", "--neighbours=1"]),
    ],
)
def test_results_of_another_folder_of_the_same_name_are_not_overwritten(
    main, folder, flags, run, photos, tmp_path, capsys
):
    for place in ("a", "b"):
        shutil.copytree(photos, tmp_path / place / "caf\udce9")
    first, second = (f"--dataset={tmp_path}/{place}/caf\udce9" for place in ("a", "b"))
    flags = [f"--encoder={run}", *flags]
    assert main([*flags, first]) == main([*flags, first]) == 0
    before = (run / folder / "summary.json").read_bytes()
    capsys.readouterr()
    assert main([*flags, second]) == 2
    error = capsys.readouterr().err
    assert f"holds the results of {tmp_path}/a/caf\\udce9; got {tmp_path}/b/caf" in error and error.count("\n") == 1
    assert (run / folder / "summary.json").read_bytes() == before
    assert main([*flags, second, f"--output={tmp_path}/out"]) == 0
    shutil.rmtree(run / folder)


def test_several_folders_with_long_names_have_their_own_results():
    names = ",".join(100 * letter for letter in "abc")
    assert knn.Settings(encoder="x", dataset=names).images == names  # is no path: names have at most 255 bytes


def test_results_lie_beside_a_saved_model_that_is_named_from_inside(tmp_path, monkeypatch):
    (tmp_path / "encoder/1").mkdir(parents=True)
    (tmp_path / "encoder/1/saved_model.pb").touch()
    for inside, name in (("encoder/1", "."), ("encoder", "1"), ("encoder", "."), ("encoder/1", "..")):
        monkeypatch.chdir(tmp_path / inside)
        assert knn.Settings(encoder=name).resolved().output == str(tmp_path / "encoder-knn")


def test_the_papers_probe_names_classes_without_an_image_to_learn_from(run, photos, tmp_path, capsys):
    shutil.copytree(photos, tmp_path / "photos")
    shutil.rmtree(tmp_path / "photos/train/red")
    flags = [f"--encoder={run}", f"--dataset={tmp_path}/photos", f"--output={tmp_path}/out", "--lr=1", "--epochs=1"]
    assert linear_probe.main(flags) == 0
    assert "1 classes have no image to learn from: red. Their 4 images" in capsys.readouterr().out


def test_a_look_at_an_undivided_folder_shows_its_images_whatever_the_runs_split(run, photos, tmp_path, capsys):
    shutil.copytree(run, tmp_path / "run", ignore=shutil.ignore_patterns("look*", "knn*", "finetune*"))
    flags = tmp_path / "run/config.flags"
    flags.write_text(flags.read_text().replace("--eval_split=test", "--eval_split=val"))
    shutil.copytree(photos / "train", tmp_path / "flat")
    given = [f"--encoder={tmp_path}/run", f"--dataset={tmp_path}/flat", "--queries=1", f"--output={tmp_path}/out"]
    assert look.main([*given, "--eval_split=test"]) == 2
    capsys.readouterr()
    assert look.main(given) == 0
    assert "There is no split 'test': the images of 'train' are shown." in capsys.readouterr().out


def test_a_ceiling_of_other_images_or_labels_is_refused(run, tmp_path, capsys):
    ceiling = tmp_path / "ceiling"
    assert (
        finetune.main([f"--encoder={run}", "--init=random", "--epochs=1", "--labels=50", f"--output={ceiling}"]) == 0
    )
    capsys.readouterr()
    assert compare.main([f"--encoder={run}", f"--supervised={ceiling}", f"--output={tmp_path / 'out'}"]) == 2
    error = capsys.readouterr().err
    assert "was trained with --labels = 50.0, and this comparison wants 100.0" in error and error.count("\n") == 1


def test_files_of_features_keep_their_order_beyond_five_digits(tmp_path):
    for number in (99_999, 100_000, 7):
        (tmp_path / f"features-{number:05d}.npz").touch()
    found = features._files(tmp_path)
    assert [place for _, place in found.values()] == [7, 99_999, 100_000]


def test_scores_of_sentences_lie_beside_a_versioned_saved_model(tmp_path):
    (tmp_path / "encoder/1").mkdir(parents=True)
    (tmp_path / "encoder/1/saved_model.pb").touch()
    settings = sts.Settings(encoder=str(tmp_path / "encoder/1"), pairs="pairs.tsv").resolved()
    assert settings.output == str(tmp_path / "encoder-sts")  # a server polls the folder encoder


def _spoil(run, folder, layers, weight, value):
    """A copy of a run in which a weight of these layers has this value everywhere."""
    shutil.copytree(run, folder)
    model = build.trained(folder)
    for layer in layers:
        variable = getattr(model.backbone.get_layer(layer), weight)
        variable.assign(np.full(variable.shape, value))
    shutil.rmtree(folder / "checkpoints")
    Checkpoints(folder / "checkpoints", model).save()


def test_what_cannot_be_judged_ends_in_one_line(run, photos, tmp_path, capsys):
    shutil.copytree(photos / "train/green", tmp_path / "flat/train")
    shutil.copytree(photos / "test/green", tmp_path / "flat/test")
    shutil.copytree(photos / "train/green", tmp_path / "one/train/green")
    shutil.copytree(photos / "test/green", tmp_path / "one/test/green")
    _spoil(run, tmp_path / "spoilt", ["conv1"], "kernel", np.nan)
    _spoil(run, tmp_path / "overflows", ["layer4.0.bn2", "layer4.0.downsample.1"], "beta", 3e38)
    capsys.readouterr()
    for main, arguments, message in (
        (knn.main, [f"--encoder={run}", f"--dataset={tmp_path}/flat"], "judging needs labels"),
        (linear_probe.main, [f"--encoder={run}", f"--dataset={tmp_path}/flat"], "judging needs labels"),
        (finetune.main, [f"--encoder={run}", f"--dataset={tmp_path}/one"], "needs two; there is 'green' only"),
        (
            knn.main,
            [f"--encoder={tmp_path}/spoilt"],
            "not finite in 1 of the encoder's weights, first in conv1/kernel: move it away",
        ),
        (knn.main, [f"--encoder={tmp_path}/overflows"], "not finite for 24 of 24 images"),
        (knn.main, [f"--encoder={run}", "--eval_split=nothing"], "'nothing'"),
        (linear_probe.main, [f"--encoder={run}", "--lr=1e38", "--epochs=3"], "take a lower --lr, or auto"),
    ):
        assert main([*arguments, f"--output={tmp_path / 'out'}"]) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1, error


@pytest.mark.parametrize("command", ["knn", "linear_probe", "finetune", "features", "look", "compare"])
def test_help_and_wrong_flags_are_answered_before_tensorflow_loads(command, tmp_path):
    code = (
        f"import sys; from moco_tf.evaluate import {command} as c; a = sys.argv[1:]; s = c.main(a); "
        "assert 'tensorflow' not in sys.modules; sys.exit(s)"
    )
    for arguments, status, message in (
        (["--help"], 0, "--encoder"),
        ([], 2, "--encoder=DIR names what to judge"),
        ([f"--encoder={tmp_path}"], 2, "run folder"),
        (["--encoder=x", "--limit=-1"], 2, "--limit is "),
    ):
        done = subprocess.run(
            [sys.executable, "-c", code, *arguments], cwd=REPOSITORY, capture_output=True, text=True, check=False
        )
        assert done.returncode == status and message in done.stdout + done.stderr
        assert status == 0 or done.stderr.count("\n") == 1


def test_the_recipes_of_the_papers_are_read(run):
    flags = {name: f"--flagfile={REPOSITORY}/configs/{name}.flags" for name in ("linear_v1", "linear_v3")}
    v1, v3 = (
        command.parse(linear_probe.Settings, "linear_probe", [flags[name], f"--encoder={run}"]) for name in flags
    )
    drops = v1.factors()
    assert (v1.lr, v1.batch_size, v1.epochs, v1.crop_min) == ("30", 256, 100, 0.08)
    assert drops[59] == 1 and drops[60] == pytest.approx(0.1) and drops[80] == pytest.approx(0.01)
    assert (v3.lr, v3.lr_scaling, v3.batch_size, v3.epochs) == ("3", "linear", 1024, 90)
    assert v3.factors()[45] == pytest.approx(0.5)


def test_a_run_judged_on_its_own_data_inherits_its_splits_and_on_others_does_not(run, photos):
    assert run_folder.recorded(run).dataset == str(photos)
    own = knn.Settings(encoder=str(run)).resolved()
    assert (own.dataset, own.eval_split, own.output) == (str(photos), "test", str(run / "knn"))
    other = knn.Settings(encoder=str(run), dataset="embedded").resolved()
    assert (other.dataset, other.train_split, other.output) == ("embedded", "train", str(run / "knn-embedded"))


def test_a_split_of_the_longest_name_has_its_list_of_files(tmp_path):
    name = "é" * 127  # 254 bytes
    (tmp_path / "data" / name / "a").mkdir(parents=True)
    (tmp_path / "data" / name / "a/0.png").write_bytes(tf.io.encode_png(np.zeros((4, 4, 3), np.uint8)).numpy())
    where = {"dataset": str(tmp_path / "data"), "data_dir": "", "output": str(tmp_path)}
    settings = types.SimpleNamespace(**where, max_bad_fraction=0.0, exif=False)
    assert subject.source(settings, name, IMAGENET).size == 1
    assert len(list(tmp_path.glob("*_images.csv"))) == 1
