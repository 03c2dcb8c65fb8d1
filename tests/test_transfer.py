"""Detectors and segmenters on a trained encoder: the commands, as a user calls them."""

import csv
import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf
from PIL import Image
from test_saved_model import c_api

from moco_tf import build, run_folder
from moco_tf.checkpoint import Checkpoints
from moco_tf.methods.keras_internals import layers_of
from moco_tf.transfer import detect, export, learning, segment
from moco_tf.transfer import settings as common

pytest.importorskip("pycocotools")
SIDE = 64


def shapes(folder, count, seed=0, side=SIDE, split="train"):
    """Red squares and blue discs on grey noise: COCO's boxes, and masks."""
    rng = np.random.default_rng(seed)
    for name in ("images", "masks"):
        (folder / name / split).mkdir(parents=True, exist_ok=True)
    (folder / "annotations").mkdir(exist_ok=True)
    images, annotations = [], []
    for number in range(count):
        image, mask = rng.integers(60, 120, (side, side, 3), np.uint8), np.zeros((side, side), np.uint8)
        for _ in range(rng.integers(1, 3)):
            extent, one = int(rng.integers(side // 4, side // 2.4)), int(rng.integers(2))
            left, top = map(int, rng.integers(0, side - extent, 2))
            rows, columns = np.mgrid[:extent, :extent] - extent / 2
            inside = (rows**2 + columns**2 < extent**2 / 4) if one else np.ones((extent, extent), bool)
            place = slice(top, top + extent), slice(left, left + extent)
            image[place][inside], mask[place][inside] = (40, 60, 220) if one else (220, 40, 40), one + 1
            annotations.append({"id": len(annotations), "image_id": number, "category_id": one,
                                "bbox": [left, top, extent, extent]})  # fmt: skip
        Image.fromarray(image).save(folder / f"images/{split}/{number}.png")
        Image.fromarray(mask).save(folder / f"masks/{split}/{number}.png")
        images.append({"id": number, "file_name": f"{number}.png"})
    categories = [{"id": 0, "name": "square"}, {"id": 1, "name": "disc"}]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (folder / f"annotations/instances_{split}.json").write_text(json.dumps(content))
    return folder


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a run of a step and images."""
    from moco_tf import train

    folder = tmp_path_factory.mktemp("transfer")
    flags = [
        "--dataset=embedded",
        "--arch=resnet10",
        "--width=8",
        f"--image_size={SIDE}",
        "--batch_size=8",
        "--dim=16",
    ]
    flags += ["--queue_size=32", "--max_steps=1", "--knn_every=0", f"--run_dir={folder}/run"]
    assert train.main(flags) == 0
    shapes(folder / "images", 12)
    shapes(folder / "images", 4, seed=1, split="test")
    return folder


def flags_of(place, output, *more):
    flags = [f"--encoder={place}/run", f"--dataset={place}/images", f"--image_size={SIDE}", "--batch_size=4"]
    return [*flags, "--steps=6", "--record_every=2", f"--output={output}", *more]


def settings_of(kind, place, output, *more):
    return common.command.parse(kind, "a test", flags_of(place, output, *more)).resolved()


def state(folder, step=6):
    reader = tf.train.load_checkpoint(str(folder / f"checkpoints/step-{step:09d}/state"))
    names = [name for name in reader.get_variable_to_shape_map() if name.endswith("VARIABLE_VALUE")]
    return {name: reader.get_tensor(name) for name in names if "save_counter" not in name}


def equal(a, b):
    return a.keys() == b.keys() and len(a) > 50 and all(np.array_equal(a[name], b[name]) for name in a)


def rows(folder):
    with open(folder / "metrics.csv", newline="") as file:
        return [
            {name: value for name, value in row.items() if name != "images_per_second"} for row in csv.DictReader(file)
        ]


def test_an_interrupted_segmenter_goes_on_bit_for_bit_and_is_exported(place, tmp_path, capsys):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert segment.main(flags_of(place, whole, "--init=random", "--scale_max=1")) == 0
    for flags in (["--max_steps=3"], []):
        assert segment.main(flags_of(place, parts, "--init=random", "--scale_max=1", *flags)) == 0
    assert equal(state(whole), state(parts)) and rows(whole) == rows(parts) and len(rows(whole)) == 3
    assert "Going on from step 3 of 6" in capsys.readouterr().out
    summary = json.loads((whole / "summary.json").read_text())
    assert summary["miou"] == float(rows(whole)[-1]["miou"]) and summary["eval_images"] == 4
    (whole / "summary.json").unlink()  # as if it had been killed before
    assert segment.main(flags_of(place, whole, "--init=random", "--scale_max=1")) == 0
    assert json.loads((whole / "summary.json").read_text())["miou"] == summary["miou"]
    assert (whole / "predictions.png").stat().st_size > 1000 and (whole / "training.png").exists()

    assert export.main([f"--run_dir={whole}", f"--output={tmp_path}/served"]) == 0
    images = np.stack([np.asarray(Image.open(place / f"images/images/test/{n}.png")) for n in range(2)])
    files = np.array([(place / f"images/images/test/{n}.png").read_bytes() for n in range(2)], object)
    model = tf.saved_model.load(str(tmp_path / "served/1"))
    pixels, encoded = (model.signatures[name](images=tf.constant(given.tolist() if given.dtype == object else given))
                       for name, given in (("serving_default", images), ("encoded_images", files)))  # fmt: skip
    assert np.array_equal(pixels["classes"], encoded["classes"]) and pixels["classes"].shape == (2, SIDE, SIDE)
    assert encoded["size"].numpy().tolist() == [[SIDE, SIDE]] * 2
    (served,) = c_api(tmp_path / "served/1", None, [("serving_default", images, None)], tmp_path)
    assert np.array_equal(served["classes"], pixels["classes"])
    with pytest.raises(tf.errors.InvalidArgumentError):
        model.signatures["encoded_images"](images=tf.constant(["no image"]))
    file = io.BytesIO()
    Image.new("RGB", (40, 20)).save(file, "JPEG")
    assert model.signatures["encoded_images"](images=tf.constant([file.getvalue()]))["size"].numpy().tolist() == [
        [20, 40]
    ]


def test_a_frozen_encoder_stays_as_it_is_and_a_head_learns(place, tmp_path):
    from moco_tf.transfer import annotated_views, segmenters, trunk

    settings = settings_of(segment.Settings, place, tmp_path / "out", "--freeze")
    maps, inputs = trunk.of_run(settings, dilated=True)
    network = segmenters.fcn(maps, 3, SIDE)
    start = {layer.name: layer for layer in build.trained(place / "run").backbone.layers}
    learner = learning.Learner(network, segmenters.loss, settings)
    head = network.get_layer("fcn.conv1").get_weights()[0]
    canvas = annotated_views.Canvas(inputs, SIDE, enlarge=False)
    image = np.random.default_rng(0).integers(0, 255, (4, SIDE, SIDE, 3))
    batch = {"image": canvas.preprocessing.normalize(image), "mask": tf.ones((4, SIDE, SIDE, 1), tf.uint8)}
    learner.learn(batch)  # the rate begins at 0
    learner.learn(batch)
    for layer in maps.layers:
        if layer.weights:
            assert all(map(np.array_equal, layer.get_weights(), start[layer.name].get_weights())), layer.name
    assert not np.array_equal(head, network.get_layer("fcn.conv1").get_weights()[0])


def test_heads_are_alike_wherever_the_encoder_starts_and_others_with_another_seed(place, tmp_path):
    def head(*flags):
        settings = settings_of(segment.Settings, place, tmp_path / "out", *flags)
        return segment.network(settings, 3)[0].get_layer("fcn.conv1").get_weights()[0]

    assert np.array_equal(head("--init=encoder"), head("--init=random"))
    assert not np.array_equal(head("--init=encoder"), head("--init=encoder", "--seed=1"))


def test_a_finished_run_keeps_its_rows_and_its_classes(place, tmp_path, capsys):
    out, odd = tmp_path / "out", ["--steps=5", "--record_every=2", "--init=random"]
    assert segment.main(flags_of(place, out, *odd)) == 0
    before = (out / "metrics.csv").read_text()
    assert segment.main(flags_of(place, out, *odd)) == 0
    assert (out / "metrics.csv").read_text() == before and before.count("\n") == 4
    (out / "classes.json").write_text('["0", "2", "1"]')
    assert segment.main(flags_of(place, out, *odd)) == 2
    assert "goes on with the classes that it began with" in capsys.readouterr().err
    assert detect.main(flags_of(place, out, *odd)) == 2
    assert "does not hold flags of moco_tf.transfer.detect" in capsys.readouterr().err


def test_a_detectors_loss_is_keras_cvs_over_a_moving_mean_of_anchors_on_objects_which_is_saved(place, tmp_path):
    from moco_tf.checkpoint import Checkpoints
    from moco_tf.transfer import learning, retinanet

    settings = settings_of(detect.Settings, place, tmp_path / "out", "--head_layers=1", "--pyramid_channels=8")
    model, _ = detect.network(settings, 2)
    loss = retinanet.Loss()
    rng = np.random.default_rng(0)
    images = tf.constant(rng.normal(size=(2, SIDE, SIDE, 3)), tf.float32)
    boxes = tf.constant([[[4.0, 4.0, 40.0, 36.0], [30.0, 20.0, 60.0, 50.0]], [[10.0, 10.0, 50.0, 50.0], [0.0] * 4]])
    some = {"image": images, "boxes": boxes, "classes": tf.constant([[0, 1], [1, -1]], tf.int64)}
    none = {"image": images, "boxes": tf.zeros((2, 2, 4)), "classes": -tf.ones((2, 2), tf.int64)}
    model.compile(box_loss="smoothl1", classification_loss="focal")
    truth = {"boxes": boxes, "classes": tf.cast(some["classes"], tf.float32)}
    _, classes = model.label_encoder(images, truth)
    on_objects = float(tf.reduce_sum(tf.cast(classes >= 0, tf.float32)))
    assert on_objects > 2
    answer = model({"images": images}, training=True)
    theirs = model.compute_loss(x=images, y=truth, y_pred=answer, sample_weight=None)
    mean = 0.9 * 100 + 0.1 * on_objects
    np.testing.assert_allclose(loss(model, some), theirs * on_objects / mean, rtol=1e-5)
    with tf.GradientTape() as tape:
        of_background = loss(model, none)
    assert float(loss.on_objects) == pytest.approx(0.9 * mean + 0.1)
    head = model.classification_head.prediction_layer
    assert np.abs(tape.gradient(of_background, head.bias)).max() > 0  # what is no object is learnt as well

    learner = learning.Learner(model, loss, settings)
    Checkpoints(tmp_path / "checkpoints", learner).save()
    saved = float(loss.on_objects)
    loss.on_objects.assign(7.0)
    Checkpoints(tmp_path / "checkpoints", learner).restore_last()
    assert float(loss.on_objects) == saved


def test_a_detectors_answers_are_those_of_the_canvas_in_pixels_of_the_image(place, tmp_path):
    from moco_tf.data.inputs.image import IMAGENET
    from moco_tf.transfer import annotated_views, judges, retinanet

    settings = settings_of(detect.Settings, place, tmp_path / "out", "--head_layers=1", "--pyramid_channels=64")
    model, _ = detect.network(settings, 2)
    assert {maps.shape[-1] for maps in model.get_layer("fpn").outputs} == {64}
    model.classification_head.prediction_layer.bias.assign_add(4 * tf.ones(18))  # it finds something
    canvas = annotated_views.Canvas(IMAGENET, SIDE, True)
    image = np.random.default_rng(0).integers(0, 255, (96, 48, 3), np.uint8)  # twice as high as wide: scale 2 / 3
    of_canvas = retinanet.detect(model, canvas.image(image, canvas.place(96, 48))[tf.newaxis])
    found = of_canvas[2][0].numpy() >= 0
    assert found.sum() > 10
    by_hand = np.clip(of_canvas[0][0].numpy() * 1.5, 0, [48, 96, 48, 96])[found]
    signatures = export._detector(model, canvas, 500)
    png = tf.io.encode_png(image)
    for name, given in (("serving_default", tf.constant(image[np.newaxis])), ("encoded_images", png[tf.newaxis])):
        answer = signatures[name][0](given)
        np.testing.assert_allclose(answer["boxes"][0].numpy()[found], by_hand, atol=1e-2)
        assert not answer["boxes"][0].numpy()[~found].any()
    nothing = {"boxes": tf.zeros((0, 4)), "classes": tf.zeros(0, tf.int64), "crowds": tf.zeros(0, tf.bool)}
    record = {"image": png, "id": tf.constant(0, tf.int64)} | nothing
    judge = judges.OfBoxes(settings, model, None, canvas)
    judge.begin()
    judge.add({name: value.numpy() for name, value in annotated_views.boxed(canvas, record).items()},
              [part[0].numpy() for part in of_canvas])  # fmt: skip
    np.testing.assert_allclose(judge.found[0][0], by_hand, atol=1e-2)


def test_the_export_reads_a_detectors_checkpoint(place, tmp_path):
    """It holds the loss's state, too."""
    settings = settings_of(detect.Settings, place, tmp_path / "out", "--head_layers=1", "--pyramid_channels=64")
    model, _ = detect.network(settings, 2)
    model.classification_head.prediction_layer.bias.assign_add(tf.ones(18))
    Checkpoints(tmp_path / "out/checkpoints", learning.Learner(model, detect.loss(), settings)).save()
    restored, _, step = export._trained(detect, settings, 2)
    assert step == 0 and all(map(np.array_equal, restored.get_weights(), model.get_weights()))


def test_init_takes_a_files_layers_by_their_names_and_refuses_others(place, tmp_path):
    from moco_tf.transfer import trunk

    backbone = build.trained(place / "run").backbone
    spread = [weight + 0.5 for weight in backbone.get_weights()]
    backbone.set_weights(spread)
    keras.Model(backbone.input, keras.layers.Dense(3, name="fc")(backbone.output)).save(tmp_path / "model.keras")
    parse = lambda file: settings_of(detect.Settings, place, tmp_path / "out", f"--init={file}")  # noqa: E731
    maps, _ = trunk.of_run(parse(tmp_path / "model.keras"))
    assert all(map(np.array_equal, maps.get_weights(), spread))
    keras.Sequential([keras.Input((2,)), keras.layers.Dense(2)]).save(tmp_path / "other.keras")
    with pytest.raises(common.ConfigError, match="must have all layers of the encoder; conv1 is not there"):
        trunk.of_run(parse(tmp_path / "other.keras"))
    (tmp_path / "broken.keras").write_bytes(b"")
    with pytest.raises(common.ConfigError, match="cannot be read"):
        trunk.of_run(parse(tmp_path / "broken.keras"))


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--encoder="], "--encoder has no default"),
        (["--image_size=100"], "--image_size is a multiple of 32"),
        (["--scale_min=2"], "--scale_max is at least --scale_min=2"),
        (["--eval_every=3"], "--eval_every is a multiple of --record_every=2"),
        (["--lr_drops=3"], "--lr_drops needs --lr_schedule=step"),
        (["--init=weights.h5"], "--init is encoder, random or a .keras file"),
        (["--labels=0"], "--labels is a percentage"),
        (["--encoder=nowhere"], "is to be a run folder"),
    ],
)
def test_flags_that_do_not_fit_end_in_a_line(place, tmp_path, capsys, flags, said):
    assert detect.main([*flags_of(place, tmp_path / "out"), *flags]) == 2
    assert said in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_data_and_outputs_that_do_not_fit_end_in_a_line(place, tmp_path, capsys, monkeypatch):
    assert detect.main(flags_of(place, tmp_path / "out", "--batch_size=13")) == 2
    assert "--batch_size=13 needs as many images, but 12 are used" in capsys.readouterr().err
    assert detect.main(flags_of(place, tmp_path / "out", "--eval_split=val")) == 2
    assert "boxes come from COCO's annotation file of the split 'val'" in capsys.readouterr().err
    assert export.main([f"--run_dir={place}/run", f"--output={tmp_path}/served"]) == 2
    assert "must be a folder of moco_tf.transfer.detect or segment" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "pycocotools.cocoeval", None)
    assert detect.main(flags_of(place, tmp_path / "out")) == 2
    assert "pip install 'moco_tf[transfer]'" in capsys.readouterr().err


def test_a_smaller_share_of_labels_is_a_part_of_a_larger_one():
    tenth, third = (set(learning.subset(100, percent, seed=3).tolist()) for percent in (10, 30))
    assert len(tenth) == 10 and len(third) == 30 and tenth < third
    assert learning.subset(3, 1, 0).tolist() and len(learning.subset(3, 1, 0)) == 1


def test_the_learning_rate_warms_up_and_falls(place, tmp_path):
    schedule = ["--warmup_steps=10", "--lr=1", "--lr_schedule=step", "--lr_drops=60,80"]
    settings = settings_of(detect.Settings, place, "out", "--steps=100", *schedule)
    rates = [float(learning.learning_rate(settings, step)) for step in (0, 5, 10, 59, 60, 99)]
    np.testing.assert_allclose(rates, [0, 0.5, 1, 1, 0.1, 0.01])


@pytest.mark.slow
def test_a_killed_detector_goes_on_bit_for_bit_and_is_exported(place, tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    command = [sys.executable, "-m", "moco_tf.transfer.detect"]
    flags = ["--init=random", "--smallest_anchor=16", "--checkpoint_every=2", "--steps=12"]
    subprocess.run([*command, *flags_of(place, whole, *flags)], check=True)
    process = subprocess.Popen([*command, *flags_of(place, parts, *flags)])
    while not (parts / "checkpoints/step-000000004").exists():
        assert process.poll() is None
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    subprocess.run([*command, *flags_of(place, parts, *flags)], check=True)
    assert equal(state(whole, 12), state(parts, 12)) and rows(whole) == rows(parts)
    assert run_folder.recorded(whole, detect.Settings.read).steps == 12

    assert export.main([f"--run_dir={whole}", f"--output={tmp_path}/served"]) == 0
    images = np.stack([np.asarray(Image.open(place / f"images/images/test/{n}.png")) for n in range(2)])
    wide = np.pad(images, ((0, 0), (0, 0), (0, SIDE), (0, 0)))  # twice as wide: half the scale
    model = tf.saved_model.load(str(tmp_path / "served/1")).signatures["serving_default"]
    for given in (images, wide):
        answer = model(images=tf.constant(given))
        assert answer["boxes"].shape == (2, 100, 4) and answer["scores"].shape == answer["classes"].shape == (2, 100)
        (served,) = c_api(tmp_path / "served/1", None, [("serving_default", given, None)], tmp_path)
        for name in served:
            np.testing.assert_allclose(served[name], answer[name], atol=1e-3)


@pytest.mark.slow
def test_a_detector_and_a_segmenter_overfit_twenty_images(place, tmp_path):
    """So the way from images to losses is right: AP50 and mean IoU on what was learnt are above 90."""
    images = shapes(tmp_path / "images", 20, side=96)
    shapes(tmp_path / "images", 20, side=96, split="test")  # the same ones
    flags = [f"--encoder={place}/run", f"--dataset={images}", "--image_size=96", "--scale_min=1", "--scale_max=1"]
    flags += ["--batch_size=5", "--checkpoint_every=1000"]
    detector = [*flags, "--steps=400", "--smallest_anchor=16", f"--output={tmp_path}/detect"]
    assert detect.main(detector) == 0
    assert json.loads((tmp_path / "detect/summary.json").read_text())["ap50"] > 90
    assert segment.main([*flags, "--steps=500", "--lr=0.05", f"--output={tmp_path}/segment"]) == 0
    assert json.loads((tmp_path / "segment/summary.json").read_text())["miou"] > 90


@pytest.mark.parametrize("head", ["fcn", "deeplab"])
def test_segmenters_give_logits_of_every_pixel_and_what_is_confidently_wrong_learns(place, tmp_path, head):
    from moco_tf.transfer import segmenters

    settings = settings_of(segment.Settings, place, tmp_path / "out", f"--head={head}")
    model, _ = segment.network(settings, 4)
    assert model(np.zeros((2, SIDE, SIDE, 3), np.float32)).shape == (2, SIDE, SIDE, 4)
    classifier = next(layer for layer in layers_of(model) if layer.name == f"{head}.classifier")
    classifier.bias.assign([50.0, 0, 0, 0])
    batch = {"image": tf.zeros((2, SIDE, SIDE, 3)), "mask": tf.ones((2, SIDE, SIDE, 1), tf.uint8)}
    with tf.GradientTape() as tape:
        loss = segmenters.loss(model, batch)
    assert float(loss) == pytest.approx(50, abs=5)
    np.testing.assert_allclose(tape.gradient(loss, classifier.bias.value), [1, -1, 0, 0], atol=1e-3)


def test_anchors_are_as_many_as_predictions(place, tmp_path):
    from moco_tf.transfer import retinanet

    settings = settings_of(detect.Settings, place, tmp_path / "out", "--image_size=96", "--smallest_anchor=20")
    model, _ = detect.network(settings, 3)
    predictions = model({"images": np.zeros((1, 96, 96, 3), np.float32)})
    anchors = retinanet.anchors(model, 96)
    assert predictions["box"].shape == (1, len(anchors), 4)
    assert predictions["classification"].shape == (1, len(anchors), 3)
    sides = np.sqrt((anchors[:, 2] - anchors[:, 0]) * (anchors[:, 3] - anchors[:, 1]))
    middle = 9 * (12 * 6 + 6)  # of P3, which has 12 x 12 places: far from any edge
    np.testing.assert_allclose(sides[middle : middle + 9 : 3], 20 * 2 ** (np.arange(3) / 3), rtol=0.1)


@pytest.mark.slow
def test_the_documented_lines_run(place, monkeypatch):
    pytest.importorskip("keras_hub", reason="keras-hub is not installed")
    monkeypatch.chdir(place)
    text = (Path(__file__).parent.parent / "docs/transfer.md").read_text()
    blocks = [block.partition("```")[0] for block in text.split("```python\n")[1:]]
    assert len(blocks) == 2
    names = {}
    for block in blocks:
        exec(block.replace("runs/v2", "run").replace("512, 512", f"{2 * SIDE}, {2 * SIDE}"), names)
    assert names["model"](np.zeros((1, 96, 64, 3), np.float32)).shape == (1, 12, 8, 1)
    outputs = names["detector"](np.zeros((1, 2 * SIDE, 2 * SIDE, 3), np.float32))
    assert {value.shape[0] for value in tf.nest.flatten(outputs)} == {1}
