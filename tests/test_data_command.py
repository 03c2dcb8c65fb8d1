"""`python -m moco_tf.data` says what is there and shows the views; `--dataset` finds what it names."""

import io
import os

import numpy as np
import pytest
from PIL import Image

from moco_tf.command import ConfigError
from moco_tf.data import dataset, sources
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
        f"Views of --pretext=crops, queries above: {photos.parent / 'run/data.png'}",
    ):
        assert line in output.splitlines()
    assert {path.name for path in (photos.parent / "run").iterdir()} == {"data.png"}


def saved(image, format, **settings):
    file = io.BytesIO()
    image.save(file, format, **settings)
    return file.getvalue()


@pytest.fixture
def awkward(tmp_path):
    """A folder of images as people have them, in thirty kinds."""
    root = tmp_path / "awkward"
    noise = np.random.default_rng(0).integers(0, 255, (40, 48, 3), dtype=np.uint8)
    rgb = Image.fromarray(noise)
    rgba = rgb.copy()
    rgba.putalpha(128)
    grey = noise[..., 0].astype(np.uint16)
    turned = Image.Exif()
    turned[0x0112] = 6
    frames = {"save_all": True, "append_images": [rgb.rotate(90)]}
    jpeg, png = saved(rgb, "JPEG"), saved(rgb, "PNG")
    files = {
        "train/a class called train.jpg": jpeg,
        "bus/photo.JPG": jpeg,
        "bus/cmyk.jpg": saved(rgb.convert("CMYK"), "JPEG"),
        "bus/grey.jpg": saved(rgb.convert("L"), "JPEG"),
        "bus/turned.jpg": saved(rgb, "JPEG", exif=turned),
        "bus/a PNG called.jpg": png,
        "bus/no ending": jpeg,
        "bus/another ending.dat": jpeg,
        "bus/deeper/and/deeper.jpg": jpeg,
        "bus/val/held out.jpg": jpeg,
        "car/12 of 16 bits.png": saved(Image.fromarray(grey * 16), "PNG"),
        "car/16 bits.png": saved(Image.fromarray(grey * 257), "PNG"),
        "car/palette.png": saved(rgb.quantize(64), "PNG"),
        "car/alpha.png": saved(rgba, "PNG"),
        "car/1 bit.png": saved(rgb.convert("1"), "PNG"),
        "car/1x1.png": saved(rgb.resize((1, 1)), "PNG"),
        "car/still.gif": saved(rgb, "GIF"),
        "car/moving.gif": saved(rgb, "GIF", **frames),
        "car/still.webp": saved(rgb, "WebP"),
        "car/moving.webp": saved(rgb, "WebP", **frames),
        "car/plain.bmp": saved(rgb, "BMP"),
        "car/1 bit.bmp": saved(rgb.convert("1"), "BMP"),
        "car/scan.tiff": saved(rgb, "TIFF"),
        "car/a TIFF called.png": saved(rgb, "TIFF"),
        "car/phone.heic": b"ftypheic",
        "car/empty.jpg": b"",
        "car/cut.jpg": jpeg[:-100],
        "car/huge.png": png[:16] + b"\0\1\0\0\0\1\0\0" + png[24:],
        "猫/Ünïcode.jpg": jpeg,
        "beside the classes.jpg": jpeg,
        "all.zip": b"PK",
        "notes.txt": b"",
        "Thumbs.db": b"",
        ".DS_Store": b"",
        "bus/._photo.JPG": b"",
        ".thumbnails/photo.jpg": jpeg,
    }
    for name, data in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    folder = os.fsencode(root) + b"/caf\xe9"
    os.mkdir(folder)
    with open(folder + b"/cr\xe8me.jpg", "wb") as file:
        file.write(jpeg)
    (root / "bus/loop").symlink_to(root)
    (root / "bus/again").symlink_to(root / "car")
    (root / "car/broken link.jpg").symlink_to("nowhere.jpg")
    os.mkfifo(root / "car/pipe.jpg")
    closed = root / "closed"
    closed.mkdir(mode=0)
    yield root
    closed.chmod(0o700)


def test_a_page_on_thirty_awkward_kinds_says_what_is_read_what_not_and_what_is_in_doubt(awkward, capsys):
    assert main(flags(awkward, "--max_bad_fraction=0.5")) == 0
    page = [line.replace(str(awkward), "awkward") for line in capsys.readouterr().out.splitlines()]
    if os.geteuid():  # nothing is closed to the superuser
        page.remove("Not read: awkward/closed, a folder that cannot be opened.")
    assert page[:-1] == [
        r"Classes: 6 (bus 7, caf\udce9 1, car 17, closed 0, train 1, 猫 1)",
        "Without a label: 1",
        "The folder train is read as a class, like those beside it; if it is the training split, give "
        "--dataset=awkward/train",
        "Called as if held out, but inside of classes and trained on: bus/val; move them out",
        "Not read: without an ending 1, .dat 1, .db 1, .heic 1, .tiff 1, other endings 2, hidden 1",
        "awkward: 28 images, 7 of them undecodable",
        "Formats: JPEG 10, PNG 7, GIF 2, BMP 1, WebP 1",
        "Width: 1 to 48 pixels, median 48",
        "Height: 1 to 40 pixels, median 40",
        "PNGs of 16 bits: 2, largest value 65278 of 65535; the upper eight bits are read, which leaves 1 of them dark "
        "or black: stretch their values up to 65535.",
        "Turned or mirrored by EXIF: 1 JPEGs; that is not applied, they are read as stored.",
        "Undecodable: car/1 bit.bmp (a BMP of other than 8, 24 or 32 bits, or compressed)",
        "Undecodable: car/a TIFF called.png (none of JPEG, PNG, BMP, GIF, WebP)",
        "Undecodable: car/broken link.jpg (no such file)",
        "Undecodable: car/cut.jpg (jpeg::Uncompress failed. Invalid JPEG data or crop window.)",
        "Undecodable: car/empty.jpg (empty)",
        "Undecodable: car/huge.png (more than 89478485 pixels)",
        "Undecodable: car/moving.webp (an animated WebP)",
    ]


def test_training_says_of_a_folder_what_this_page_says(awkward, capsys, caplog, monkeypatch):
    monkeypatch.setattr(dataset.log, "propagate", True)
    with caplog.at_level("INFO", "moco_tf"):
        dataset.find(str(awkward), "", "train", max_bad_fraction=0.5).open()
    assert main(flags(awkward, "--max_bad_fraction=0.5")) == 0
    page = capsys.readouterr().out.splitlines()
    in_both = ("Classes", "The folder", "Called as", "Not read", "PNGs of 16 bits", "Turned")
    in_both = [f"  {line}" for line in page if line.startswith(in_both)]
    assert len(in_both) >= 6 and set(in_both) <= set(caplog.messages)
    doubts = {record.message for record in caplog.records if record.levelname == "WARNING"}
    assert {line for line in in_both if line.startswith(("  The folder", "  Called as"))} <= doubts


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
            dataset.find(name, str(tmp_path), "train", 0.05)


def test_an_existing_folder_comes_before_a_name_of_tfds(photos):
    folder = photos.rename(photos.parent / "cifar10")
    found = dataset.find("cifar10", str(folder.parent), "train", 0.05)
    assert (found.listing.path, found.size) == (folder, 12)
