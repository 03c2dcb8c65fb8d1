"""--exif: images are turned and mirrored where files are read, so that all that comes after sees them upright."""

import io

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image, ImageOps

from moco_tf import train
from moco_tf.command import ConfigError
from moco_tf.data import __main__ as data
from moco_tf.data import augment, dataset, encoded, things
from moco_tf.evaluate import knn

SMALL = ["--arch=resnet10", "--width=4", "--stem=cifar", "--image_size=32", "--augment=cifar", "--dim=8"]
SMALL += ["--batch_size=4", "--queue_size=8", "--bn_groups=1", "--epochs=1"]


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """A JPEG of each orientation in two classes and two splits, one that breaks off, and an upright PNG."""
    folder, noise = tmp_path_factory.mktemp("exif") / "photos", np.random.default_rng(0)
    for split in ("train", "test"):
        for number in range(1, 9):
            exif, file = Image.Exif(), folder / split / "ab"[number % 2] / f"{number}.jpg"
            exif[0x0112] = number
            file.parent.mkdir(parents=True, exist_ok=True)
            pixels = noise.integers(0, 255, (32, 40, 3), np.uint8)
            Image.fromarray(pixels).save(file, quality=95, exif=exif)
        Image.fromarray(pixels).save(folder / split / "a/9.png")
    (folder / "train/b/0.jpg").write_bytes(b"")  # 1.jpg stands in for it
    return folder


def opened(photos, exif, split="train"):
    return dataset.find(str(photos), "", split, 0.2, exif=exif).open()


def upright(path):
    """What a viewer shows: the pixels that TensorFlow decodes, turned by Pillow."""
    with open(path, "rb") as file:
        content = file.read()
    image = Image.fromarray(encoded.decode(content).numpy())
    image.getexif()[0x0112] = Image.open(io.BytesIO(content)).getexif().get(0x0112, 1)
    return np.asarray(ImageOps.exif_transpose(image))


def test_records_are_upright_with_exif_and_as_stored_without(photos):
    turned, stored = opened(photos, True), opened(photos, False)
    assert turned.size == 10 and not np.array_equal(turned.stand_ins, np.arange(10))
    for number, path in enumerate(turned.contents.numpy()[turned.stand_ins]):
        assert np.array_equal(encoded.decode(turned.record(number)["image"]), upright(path))
        assert stored.record(number)["image"].numpy() == tf.io.read_file(path).numpy()
    some = turned.only(np.array([7, 2]))
    for number, path in enumerate(some.contents.numpy()):
        assert np.array_equal(encoded.decode(some.record(number)["image"]), upright(path))


def test_views_are_those_of_the_upright_pixels(photos):
    source, recipe = opened(photos, True), augment.cifar()
    for number, path in enumerate(source.contents.numpy()[source.stand_ins]):
        seed = tf.constant([3, number], tf.int64)
        views = recipe(source.record(number), seed)
        expected = recipe({"image": tf.io.encode_png(upright(path))}, seed)
        # a JPEG that is not turned is cut while it is decoded, as without the flag
        tolerance = 0 if source.orientations[source.stand_ins[number]] > 1 else 0.1
        for view, wanted in zip(views, expected, strict=True):
            np.testing.assert_allclose(view, wanted, atol=tolerance)


@pytest.mark.slow
def test_a_run_with_exif_says_so_and_is_judged_and_gone_on_with_so(photos, capsys):
    folder = photos.parent / "run"
    words = [*SMALL, f"--dataset={photos}", f"--run_dir={folder}", "--max_bad_fraction=0.2"]
    assert train.main([*words, "--exif"]) == 0
    assert "Turned or mirrored by EXIF: 7 JPEGs; so they are read." in capsys.readouterr().out
    assert train.main([*words, "--epochs=2"]) == 2 and "exif" in capsys.readouterr().err
    assert knn.main([f"--encoder={folder}", "--max_bad_fraction=0.2"]) == 0
    assert "Turned or mirrored by EXIF: 7 JPEGs; so they are read." in capsys.readouterr().out
    assert data.main([*words, "--exif"]) == 0
    assert "Turned or mirrored by EXIF: 7 JPEGs; so they are read." in capsys.readouterr().out
    assert data.main(words) == 0
    assert "that is not applied, they are read as stored." in capsys.readouterr().out


def test_what_cannot_be_turned_is_refused_in_a_line(photos):
    with pytest.raises(ConfigError, match="--exif turns images that are files; embedded train holds none: leave it"):
        dataset.find("embedded", "", "train", 0.05, exif=True)
    with pytest.raises(ValueError, match="--exif does not turn pictures of things"):
        things.of_images(opened(photos, True))
