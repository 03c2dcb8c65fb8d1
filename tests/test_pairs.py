"""Images with depth maps: which belong together, what a depth of a file becomes, and runs that learn from them."""

import json

import numpy as np
import pytest
import tensorflow as tf
from test_train import assert_a_run_goes_on

from moco_tf import build
from moco_tf.config import parse
from moco_tf.data import dataset, pairs
from moco_tf.data.encoded import decode_depth
from moco_tf.data.inputs.image_and_depth import ImageAndDepth
from moco_tf.evaluate import finetune, knn, look
from moco_tf.serving import export
from moco_tf.train import main

FLAGS = [
    *("--pretext=cmc", "--modalities=rgb,depth", "--depth_max=1000", "--arch=resnet10", "--width=4", "--stem=cifar"),
    *("--image_size=8", "--batch_size=8", "--queue_size=16", "--knn_every=1", "--epochs=2", "--lr=0.01"),
    "--lr_scaling=none",
]


def write(folder, name, depth, seed=0):
    """An image and its depth map (H, W), uint8 or uint16; none if that is None."""
    folder.mkdir(parents=True, exist_ok=True)
    shape = (12, 10) if depth is None else depth.shape
    pixels = np.random.default_rng(seed).integers(0, 256, (*shape, 3), np.uint8)
    (folder / f"{name}.png").write_bytes(tf.io.encode_png(pixels).numpy())
    if depth is not None:
        (folder / f"{name}.depth.png").write_bytes(tf.io.encode_png(depth[..., None]).numpy())
    return pixels


@pytest.fixture
def photos(tmp_path):
    for split in ("train", "test"):
        for number in range(16):
            depth = np.random.default_rng(number).integers(0, 1200, (12, 10), np.uint16)
            write(tmp_path / "photos" / split / f"class-{number % 2}", f"{number}", depth, number)
    return tmp_path / "photos"


def opened(folder):
    return dataset.find(str(folder), "", "train", 0.05).open()


@pytest.mark.parametrize(
    ("dtype", "values", "depth_max", "expected"),
    [
        (np.uint8, [0, 100, 255], 0, [0, 100, 255]),
        (np.uint16, [0, 25700, 65535], 0, [0, 100, 255]),
        (np.uint8, [0, 20, 41, 255], 40, [0, 128, 255, 255]),  # 127.5: halves to the even number
        (np.uint16, [0, 2000, 4001, 65535], 4000, [0, 128, 255, 255]),
    ],
)
def test_a_depth_becomes_its_share_of_the_farthest_and_all_bits_are_read(dtype, values, depth_max, expected):
    encoded = tf.io.encode_png(np.array(values, dtype)[None, :, None])
    assert decode_depth(encoded, depth_max).numpy().ravel().tolist() == expected


def test_a_record_is_an_image_and_the_depth_map_beside_it(tmp_path, caplog):
    depth = np.arange(120, dtype=np.uint8).reshape(12, 10)
    pixels = write(tmp_path / "a", "one", depth)
    write(tmp_path / "b", "one", depth[::-1], seed=1)  # another of this name, elsewhere
    write(tmp_path / "a", "alone", None)
    found = pairs.of_images(opened(tmp_path), 0.0)
    assert found.size == 2
    record = found.record(0)
    np.testing.assert_array_equal(record["image"], np.concatenate([pixels, depth[..., None]], axis=-1))
    np.testing.assert_array_equal(found.only([1]).record(0)["image"][..., 3], depth[::-1])
    assert found.class_names == ("a", "b")
    assert found.labels.numpy().tolist() == [0, 1]
    assert "Left out: 1 images without a readable depth map" in caplog.text


@pytest.mark.parametrize(
    ("depth", "said"),
    [
        (None, "the depth map of name.png is name.depth.png, beside it, a PNG; {folder}/0.png has none"),
        (np.zeros((6, 5), np.uint8), "a depth map is a PNG of its image's size; image and {folder}/0.depth.png have"),
    ],
)
def test_no_depth_map_and_one_of_another_size_are_refused_in_a_line(tmp_path, capsys, depth, said):
    folder = tmp_path / "photos/a"
    for number in range(8):
        write(folder, number, None)
        if depth is not None:
            (folder / f"{number}.depth.png").write_bytes(tf.io.encode_png(depth[..., None]).numpy())
    assert main([*FLAGS, f"--dataset={tmp_path / 'photos'}", f"--run_dir={tmp_path / 'run'}"]) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert said.format(folder=folder) in last


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--dataset=embedded"], "depth maps stand beside images in a folder"),
        (["--augment=v2"], "crops and flips image and depth alike"),
        (["--views_on=device"], "crops and flips image and depth alike"),
        (["--modalities=luminance,color"], "--depth_max=1000 is of depth maps"),
        (["--depth_max=-1"], "depth_max"),
    ],
)
def test_flags_that_do_not_fit_are_refused(tmp_path, capsys, more, said):
    assert main([*FLAGS, "--dataset=embedded", *more, f"--run_dir={tmp_path / 'run'}"]) == 2
    assert said in capsys.readouterr().err.splitlines()[-1]


def test_depths_that_are_hardly_told_apart_are_warned_of(tmp_path, caplog):
    write(tmp_path / "a", "one", np.arange(120, dtype=np.uint16).reshape(12, 10))
    pairs.of_images(opened(tmp_path), 0.0)
    assert "--depth_max says which counts as farthest" in caplog.text


def test_depth_is_a_channel_of_its_own_of_inputs_and_of_their_picture():
    inputs = ImageAndDepth(image_size=96, crop_ratio=1.0)
    images = tf.random.stateless_uniform((2, 96, 96, 4), (0, 0), 0, 256, tf.int32)
    views = inputs(images)
    np.testing.assert_allclose(views[..., 3], (images[..., 3] / 255 - 0.5) / 0.25, atol=1e-5)
    colors, depth = np.split(inputs.picture((views,)).numpy(), 2)
    np.testing.assert_array_equal(colors, np.concatenate(images[..., :3], axis=1))
    np.testing.assert_array_equal(depth[..., 1], np.concatenate(images[..., 3], axis=1))
    with pytest.raises(ValueError, match="4 channels"):
        inputs(images[..., :3])


@pytest.mark.slow
@pytest.mark.parametrize("frame", ["in_batch", "queue"])
def test_a_run_on_pairs_goes_on_bit_for_bit_and_its_encoder_is_judged_and_served(frame, photos, tmp_path):
    flags = [*FLAGS, f"--dataset={photos}", f"--frame={frame}"]
    assert_a_run_goes_on(tmp_path, flags, at=3, steps=4)
    judged = [f"--encoder={tmp_path / 'whole'}", f"--dataset={photos}"]
    assert knn.main([*judged, "--k=3", f"--output={tmp_path / 'knn'}"]) == 0
    if frame == "queue":
        assert finetune.main([*judged, "--labels=100", "--epochs=1", f"--output={tmp_path / 'tuned'}"]) == 0
        assert look.main([*judged, f"--output={tmp_path / 'look'}"]) == 0
    assert export.main(["encoder", f"--run_dir={tmp_path / 'whole'}", f"--output={tmp_path / 'served'}"]) == 0
    again = [f"--encoder={tmp_path / 'served'}", f"--dataset={photos}", "--k=3", f"--output={tmp_path / 'again'}"]
    assert knn.main(again) == 0
    first, second = (json.loads((tmp_path / name / "summary.json").read_text())["top1"] for name in ("knn", "again"))
    assert first == second
    served = tf.saved_model.load(str(tmp_path / "served/1")).signatures
    assert set(served) == {"serving_default", "preprocessed"}
    assert served["serving_default"](tf.zeros((2, 9, 7, 4), tf.uint8))["features"].shape == (2, 32)
    model = build.trained(tmp_path / "whole")
    assert model.predict(np.zeros((2, 9, 7, 4), np.uint8), verbose=0).shape == (2, 32)
    with pytest.raises(ValueError, match="H, W, 4"):
        model.predict(np.zeros((2, 9, 7, 3), np.uint8), verbose=0)


def test_an_image_and_its_depth_map_are_cropped_and_flipped_alike(tmp_path):
    depth = np.random.default_rng(0).integers(0, 256, (12, 10), np.uint8)
    write(tmp_path / "a", "one", depth)
    grey = tf.io.encode_png(np.repeat(depth[..., None], 3, axis=2)).numpy()  # the image shows its own depth
    (tmp_path / "a/one.png").write_bytes(grey)
    config = parse([*FLAGS, f"--dataset={tmp_path}", "--depth_max=0"])
    record = build.read(config, opened(tmp_path)).record(0)
    inputs, flipped = build.inputs(config), set()
    for seed in range(8):
        (view,) = build.task(config)(record, tf.constant([0, seed], tf.int64))
        shown = inputs.denormalize(view).numpy()
        np.testing.assert_allclose(shown[..., 3], shown[..., 0], atol=0.01)
        flipped.add(shown.tobytes())
    assert len(flipped) == 8
