"""`python -m moco_tf.data.convert`: what becomes of images in any format, and what happens on the way."""

import contextlib
import csv
import errno
import hashlib
import io
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image

from moco_tf.data import any_image, convert, dataset, encoded, folder

tifffile = pytest.importorskip("tifffile", reason="tifffile is not installed: pip install 'moco_tf[convert]'")
pillow_heif = pytest.importorskip("pillow_heif", reason="pillow-heif is not installed: pip install 'moco_tf[convert]'")

SMOOTH = np.stack(np.meshgrid(np.arange(64) * 3, np.arange(48) * 4), -1).astype(np.uint8)
SMOOTH = np.concatenate([SMOOTH, 255 - SMOOTH[..., :1]], -1)  # (48, 64, 3)
# What a viewer does with an image as it is stored, by EXIF's number.
TURNS = {
    1: lambda image: image,
    2: lambda image: image[:, ::-1],
    3: lambda image: image[::-1, ::-1],
    4: lambda image: image[::-1],
    5: lambda image: image.transpose(1, 0, 2),
    6: lambda image: image.transpose(1, 0, 2)[:, ::-1],
    7: lambda image: image.transpose(1, 0, 2)[::-1, ::-1],
    8: lambda image: image.transpose(1, 0, 2)[::-1],
}


def saved(pixels, format, **settings):
    pillow_heif.register_heif_opener()
    file = io.BytesIO()
    (pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)).save(file, format, **settings)
    return file.getvalue()


def tiff(values, **settings):
    file = io.BytesIO()
    tifffile.imwrite(file, values, **settings)
    return file.getvalue()


def read(data, **settings):
    return np.asarray(any_image.read(io.BytesIO(data), **settings)[0])


def put(root, contents):
    for name, data in contents.items():
        path = os.path.join(os.fsencode(root), os.fsencode(name))
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "wb") as file:
            file.write(data)
    return root


def run(root, *arguments):
    return convert.main([f"--images={root / 'in'}", f"--output={root / 'out'}", "--processes=1", *arguments])


def bytes_of(root):
    """{path: bytes} of the files below a folder."""
    return {os.fsencode(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


@pytest.mark.parametrize("format", ["PNG", "TIFF", "BMP", "JPEG2000", "PPM", "TGA", "HEIF", "AVIF", "WebP", "JPEG"])
def test_a_picture_of_each_format_is_read(format):
    lossless = format in ("PNG", "TIFF", "BMP", "JPEG2000", "PPM", "TGA")
    difference = np.abs(read(saved(SMOOTH, format)).astype(int) - SMOOTH)
    assert difference.max() == 0 if lossless else difference.mean() < 4


@pytest.mark.parametrize("orientation", TURNS)
@pytest.mark.parametrize("format", ["PNG", "TIFF", "AVIF", "WebP", "JPEG", "16 bits"])
def test_an_image_that_exif_turns_is_turned_once(format, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    if format == "16 bits":
        data = tiff(SMOOTH * np.uint16(257), photometric="rgb", extratags=[(274, 3, 1, orientation, True)])
    else:
        data = saved(SMOOTH, format, exif=exif)
    picture, wanted = read(data), TURNS[orientation](SMOOTH)
    assert picture.shape == wanted.shape and np.abs(picture.astype(int) - wanted).mean() < 4


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "YCbCr"])
def test_every_mode_becomes_grey_or_rgb_and_alpha_is_dropped(mode):
    image = Image.fromarray(SMOOTH).convert(mode)
    if mode in ("LA", "RGBA"):
        image.putalpha(7)
    picture, _ = any_image.read(io.BytesIO(saved(image, "TIFF")))
    assert picture.mode == ("L" if mode in ("1", "L", "LA") else "RGB")
    wanted = np.asarray(image)[..., :-1] if mode in ("LA", "RGBA") else np.asarray(image.convert(picture.mode))
    assert np.array_equal(np.squeeze(wanted), np.asarray(picture))


def scaled_one_by_one(values, smallest, largest):
    """`eight_bits` as a loop."""
    result = np.zeros(values.shape, np.uint8)
    for place, value in np.ndenumerate(values):
        if np.isfinite(value) and largest > smallest:
            result[place] = round(255 * (float(value) - float(smallest)) / (float(largest) - float(smallest)))
    return result


@pytest.mark.parametrize("channels", [1, 3])
def test_sixteen_bits_become_255_of_65535_and_twelve_bits_255_of_4095(channels):
    values = np.random.default_rng(0).integers(0, 65536, (9, 11, channels), dtype=np.uint16)
    values[0, 0], values[0, 1] = 0, 65535
    values = values[..., 0] if channels == 1 else values
    kind = "minisblack" if channels == 1 else "rgb"
    assert np.array_equal(read(tiff(values, photometric=kind)), scaled_one_by_one(values, 0, 65535))
    if channels == 1:
        assert np.array_equal(read(saved(values, "PNG")), scaled_one_by_one(values, 0, 65535))
        assert np.array_equal(255 - read(tiff(values, photometric="miniswhite")), read(tiff(values)))
        packed = tiff(values >> 4, photometric=kind, bitspersample=12)
        assert np.array_equal(read(packed), scaled_one_by_one(values >> 4, 0, 4095))
    else:
        apart = tiff(np.moveaxis(values, -1, 0), photometric=kind, planarconfig="separate")
        assert np.array_equal(read(apart), scaled_one_by_one(values, 0, 65535))


@pytest.mark.parametrize("type", [np.uint16, np.int16, np.uint32, np.float32])
def test_stretching_brings_the_smallest_value_to_0_and_the_largest_to_255(type):
    values = (np.random.default_rng(0).random((9, 11)) * 1000 + 100).astype(type)
    assert np.array_equal(read(tiff(values), stretch=True), scaled_one_by_one(values, values.min(), values.max()))
    assert not read(tiff(np.full((3, 4), 700, type)), stretch=True).any()  # one value
    if type == np.float32:
        values[0, :3] = np.nan, np.inf, -np.inf
        finite = values[np.isfinite(values)]
        assert np.array_equal(read(tiff(values), stretch=True), scaled_one_by_one(values, finite.min(), finite.max()))


@pytest.mark.parametrize(
    "data, problem",
    [
        (lambda: b"", "empty"),
        (lambda: b"no image", "no image that Pillow knows"),
        (lambda: saved(SMOOTH, "JPEG")[:-300], "(?i)truncated"),
        (lambda: tiff(SMOOTH[..., 0].astype(np.float32)), "give --stretch"),
        (lambda: tiff(np.zeros((5, 6, 7), np.uint16), planarconfig="contig", photometric="minisblack"), "7 channels"),
        (lambda: saved(Image.new("1", (10_000, 9_000)), "PNG"), "more than 89478485 pixels"),
        (lambda: saved(SMOOTH, "HEIF")[:100], "."),
    ],
)
def test_what_no_picture_can_be_made_of_has_a_reason_in_a_line(data, problem):
    with pytest.raises(any_image.Unreadable, match=problem) as error:
        read(data())
    assert str(error.value) and "\n" not in str(error.value)


def test_the_limit_of_pixels_is_that_of_training():
    assert any_image.MAX_PIXELS == encoded.MAX_PIXELS


def test_the_shorter_side_shrinks_antialiased_and_nothing_is_enlarged(tmp_path):
    stripes = np.zeros((64, 128, 3), np.uint8)
    stripes[:, ::2] = 255  # as fine as can be: without antialiasing black or white remains
    put(tmp_path / "in", {"fine.png": saved(stripes, "PNG"), "small.tif": saved(SMOOTH[:10], "TIFF")})
    assert run(tmp_path, "--size=16", "--format=png") == 0
    fine, small = (np.asarray(Image.open(tmp_path / "out" / name)) for name in ("fine.png", "small.png"))
    assert fine.shape == (16, 32, 3) and np.abs(fine[:, 2:-2].astype(int) - 127).max() < 3
    assert np.array_equal(small, SMOOTH[:10])


def test_a_jpeg_that_needs_no_change_keeps_its_bytes_and_one_that_is_turned_does_not(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 3
    contents = {"kept.jpg": saved(SMOOTH, "JPEG"), "turned.jpg": saved(SMOOTH, "JPEG", exif=exif)}
    put(tmp_path / "in", contents)
    assert run(tmp_path, "--size=48") == 0
    written = bytes_of(tmp_path / "out")
    assert written[b"kept.jpg"] == contents["kept.jpg"]
    assert b"Exif" not in written[b"turned.jpg"] and read(written[b"turned.jpg"])[0, 0, 0] > 150


def test_class_folders_stay_and_images_of_one_name_do_not_overwrite_each_other(tmp_path):
    one, other = (saved(np.full((4, 4, 3), value, np.uint8), "PNG") for value in (0, 255))
    names = {"cat/a.png": one, "cat/a.tif": other, "cat/a.png.jpg": one, "dog/a.png": other, "b.png": one}
    put(tmp_path / "in", names | {"b.jpg/c.png": other})
    assert run(tmp_path) == 0
    written = {name: read(data)[0, 0, 0] for name, data in bytes_of(tmp_path / "out").items() if b".csv" not in name}
    assert written == {
        b"cat/a.png.jpg": 0,
        b"cat/a.tif.jpg": 255,
        b"cat/a.png.jpg.jpg": 0,
        b"dog/a.jpg": 255,
        b"b.png.jpg": 0,  # beside a folder called b.jpg
        b"b.jpg/c.jpg": 255,
    }


def test_the_names_of_any_files_are_as_many_as_the_files():
    rng, parts = np.random.default_rng(0), ("a", "b", ".png", ".jpg", ".tif", "/")
    for _ in range(300):
        names = {"".join(rng.choice(parts, rng.integers(1, 6))).strip("/.").replace("//", "/") for _ in range(8)}
        names = sorted(name for name in names if name)
        folders = {str(parent) for name in names for parent in convert.Path(name).parents}
        names = [name for name in names if name not in folders]
        named = convert.targets(names, ".jpg")
        assert len(set(named.values())) == len(names), named


def test_what_was_written_keeps_its_name_when_another_image_comes():
    assert convert.targets(["a.png", "a.tif"], ".jpg", {"a.png": "a.jpg"}) == {"a.png": "a.jpg", "a.tif": "a.tif.jpg"}


def test_the_second_start_converts_what_has_changed_and_nothing_else(tmp_path, capsys):
    put(tmp_path / "in", {f"{number}.png": saved(SMOOTH, "PNG") for number in range(5)})
    assert run(tmp_path) == 0
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*.jpg")}
    put(tmp_path / "in", {"1.png": saved(255 - SMOOTH, "PNG"), "9.png": saved(SMOOTH, "PNG")})
    (tmp_path / "out/2.jpg").unlink()
    (tmp_path / "out/3.jpg").write_bytes(b"")  # as after a loss of power
    with open(tmp_path / "out/converted.csv", "a") as file:
        file.write('"7.png",12')  # as after a kill
    assert run(tmp_path) == 0
    assert "6 images, 4 written, 2 there before; " in capsys.readouterr().out
    after = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*.jpg")}
    assert {name for name in after if before.get(name) == after[name]} == {"0.jpg", "4.jpg"}
    assert read((tmp_path / "out/1.jpg").read_bytes())[0, 0, 0] > 200 and run(tmp_path) == 0


def test_a_killed_start_goes_on_and_ends_with_the_files_of_one_that_was_not(tmp_path):
    noise = np.random.default_rng(0).integers(0, 255, (300, 400, 3), dtype=np.uint8)
    put(tmp_path / "in", {f"{number % 3}/{number}.png": saved(noise, "PNG") for number in range(120)})
    words = [
        sys.executable,
        "-m",
        "moco_tf.data.convert",
        f"--images={tmp_path / 'in'}",
        f"--output={tmp_path / 'out'}",
    ]
    process = subprocess.Popen([*words, "--size=32"], start_new_session=True)
    while not list((tmp_path / "out").glob("*/*.jpg")):
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert len(list((tmp_path / "out").glob("*/*.jpg"))) < 120
    assert run(tmp_path, "--size=32") == 0
    whole = [f"--images={tmp_path / 'in'}", f"--output={tmp_path / 'whole'}", "--size=32"]
    assert convert.main(whole) == 0
    visible = [
        {name: data for name, data in bytes_of(tmp_path / place).items() if name.endswith(b".jpg")}
        for place in ("out", "whole")
    ]
    for found in visible:
        for name in [name for name in found if b"/.writing-" in name]:
            del found[name]
    assert len(visible[1]) == 120 and visible[0] == visible[1]


def test_unreadable_files_are_named_and_counted_and_the_source_stays_as_it_is(tmp_path, capsys):
    good = saved(SMOOTH, "PNG")
    names = [b"caf\xe9/cr\xe8me.png", "猫/ü.tif", "a\nb.png", "-rf.png", "a,\"b'.png", "x" * 251 + ".png"]
    put(
        tmp_path / "in", dict.fromkeys(names, good) | {b"br\xf6ken.png": b"", "no.heic": b"ftypheic", "notes.txt": b""}
    )
    before = {name: hashlib.sha256(data).digest() for name, data in bytes_of(tmp_path / "in").items()}
    assert run(tmp_path) == 0
    output = capsys.readouterr().out.splitlines()
    assert "Not read: .txt 1" in output and r"Unreadable: br\udcf6ken.png (empty)" in output
    assert "8 images, 6 written, 2 unreadable (unreadable.csv names them); " in output[-1]
    assert {name: hashlib.sha256(data).digest() for name, data in bytes_of(tmp_path / "in").items()} == before
    with open(tmp_path / "out/unreadable.csv", newline="", encoding="utf-8", errors="surrogateescape") as file:
        assert [os.fsencode(row["path"]) for row in csv.DictReader(file)] == [b"br\xf6ken.png", b"no.heic"]
    listing = folder.scan(tmp_path / "out")
    assert sorted(map(os.fsencode, listing.files)) == sorted(
        os.path.splitext(os.fsencode(name))[0] + b".jpg" for name in names
    )
    assert run(tmp_path) == 0 and "0 written, 6 there before, 2 unreadable" in capsys.readouterr().out


def test_a_link_in_the_output_does_not_lead_into_the_source(tmp_path, capsys):
    put(tmp_path / "in", {"cat/a.png": saved(SMOOTH, "PNG"), "b.png": saved(SMOOTH, "PNG")})
    assert run(tmp_path) == 0
    for file in (tmp_path / "out/cat").iterdir():
        file.unlink()
    (tmp_path / "out/cat").rmdir()
    (tmp_path / "out/cat").symlink_to(tmp_path / "in/cat")
    assert run(tmp_path) == 0
    assert "Unreadable: cat/a.png (cannot be written: a link leads out of --output)" in capsys.readouterr().out
    assert [path.name for path in (tmp_path / "in/cat").iterdir()] == ["a.png"]


def test_a_file_that_ends_its_process_is_unreadable_and_the_others_are_converted(tmp_path, monkeypatch, capsys):
    (tmp_path / "pillow_heif.py").write_text(
        "import os\nfrom PIL import Image\n"
        "def register_heif_opener():\n"
        "    Image.register_open('HEIF', lambda *_: os._exit(1), lambda head: head.startswith(b'BOOM'))\n"
    )
    monkeypatch.syspath_prepend(tmp_path)  # of the processes, too
    contents = {f"{number}.png": saved(SMOOTH, "PNG") for number in range(30)}
    put(tmp_path / "in", contents | {"7.png": b"BOOM"})
    assert run(tmp_path) == 0
    assert "Unreadable: 7.png (ends the process that decodes it)" in capsys.readouterr().out
    assert len(list((tmp_path / "out").glob("*.jpg"))) == 29


def test_shards_hold_the_splits_and_labels_of_the_folder_and_dataset_reads_them(tmp_path, capsys):
    shades = {"train/cat/1.png": 10, "train/dog/2.tif": 80, "train/dog/3.png": 150, "val/dog/4.png": 220}
    contents = {name: saved(np.full((6, 8, 3), shade, np.uint8), "PNG") for name, shade in shades.items()}
    put(tmp_path / "in", contents | {"train/cat/bad.png": b""})
    words = [f"--images={tmp_path / 'in'}", f"--output={tmp_path / 'photos'}", "--format=array_record"]
    assert convert.main(words) == 0
    assert f"Splits: train 3, val 1; read them with --dataset={tmp_path / 'photos'}" in capsys.readouterr().out
    for name, place in ((str(tmp_path / "photos"), ""), ("photos", str(tmp_path))):
        for split, wanted in (("train", [(10, 0), (80, 1), (150, 1)]), ("test", [(220, 1)])):
            source = dataset.find(name, place, split, 0.0).open()
            assert source.class_names == ("cat", "dog") and source.seekable
            records = [(read(r["image"])[0, 0, 0], r["label"]) for r in source.in_order().as_numpy_iterator()]
            assert records == wanted
    assert sorted(path.name for path in (tmp_path / "photos").iterdir()) == ["1.0.0", "unreadable.csv"]
    assert convert.main(words) == 2 and "holds shards already" in capsys.readouterr().err


def test_shards_of_images_without_classes_have_no_labels(tmp_path):
    put(tmp_path / "in", {f"{number}.png": saved(SMOOTH, "PNG") for number in range(3)})
    assert convert.main([f"--images={tmp_path / 'in'}", f"--output={tmp_path / 'p'}", "--format=array_record"]) == 0
    source = dataset.find(str(tmp_path / "p"), "", "train", 0.0).open()
    assert (source.size, source.class_names, source.labelled) == (3, (), False)


def test_what_cannot_be_meant_is_refused_in_one_line_before_any_work(tmp_path, capsys):
    put(tmp_path, {"in/a.png": saved(SMOOTH, "PNG"), "full/letter.txt": b"", "none/notes.txt": b""})
    for words, rule in [
        ([], "give --images=DIR and --output=DIR"),
        (["--images=/no/such", "--output=x"], "is not there"),
        ([f"--images={tmp_path / 'in'}", f"--output={tmp_path / 'in/out'}"], "lie apart"),
        ([f"--images={tmp_path / 'in'}", f"--output={tmp_path}"], "lie apart"),
        ([f"--images={tmp_path / 'in'}", f"--output={tmp_path / 'full'}"], "holds letter.txt: give another"),
        ([f"--images={tmp_path / 'in'}", f"--output={tmp_path / 'full/letter.txt'}"], "is none: give another"),
        ([f"--images={tmp_path / 'none'}", f"--output={tmp_path / 'out'}"], "has none, but .txt 1"),
        ([f"--images={tmp_path / 'in'}", f"--output={tmp_path / 'out'}", "--quality=0"], "1 to 100"),
        ([f"--images={tmp_path / 'in'}", f"--output={tmp_path / 'A b'}", "--format=array_record"], "small letters"),
    ]:
        assert convert.main(words) == 2
        error = capsys.readouterr().err
        assert rule in error and error.count("\n") == 1
    assert run(tmp_path) == 0 and run(tmp_path, "--size=64") == 2
    assert "was begun with size 256" in capsys.readouterr().err


def test_it_does_not_load_tensorflow():
    code = "import sys, moco_tf.data.convert, moco_tf.data.any_image; sys.exit('tensorflow' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_full_disk_stops_it_with_a_line_and_the_same_command_goes_on(tmp_path, monkeypatch, capsys):
    put(tmp_path / "in", {f"{number}.png": saved(SMOOTH, "PNG") for number in range(9)})
    outcomes = convert._outcomes

    def full_after_four(*arguments):
        for number, (job, outcome) in enumerate(outcomes(*arguments)):
            yield job, convert.Outcome(problem="cannot be written", error=28) if number == 4 else outcome

    with monkeypatch.context() as patch:
        patch.setattr(convert, "_outcomes", full_after_four)
        assert run(tmp_path) == 1
    assert (
        "Mend that (if the disk is full, make room), and run the command again: it goes on here."
        in capsys.readouterr().out.splitlines()
    )
    assert run(tmp_path) == 0 and "9 images, 5 written, 4 there before; " in capsys.readouterr().out


def test_the_name_of_an_image_that_is_gone_is_free_and_its_own_again_when_it_is_back(tmp_path):
    black, white = (saved(np.full((4, 4, 3), value, np.uint8), "PNG") for value in (0, 255))
    put(tmp_path / "in", {"a.png": black})
    assert run(tmp_path) == 0
    (tmp_path / "in/a.png").unlink()
    put(tmp_path / "in", {"a.tif": white})
    assert run(tmp_path) == 0
    put(tmp_path / "in", {"a.png": black})
    assert run(tmp_path) == 0
    written = {path.name: read(path.read_bytes())[0, 0, 0] for path in (tmp_path / "out").glob("*.jpg")}
    assert written == {"a.jpg": 255, "a.png.jpg": 0}


def test_a_program_for_postscript_is_never_started():
    with pytest.raises(any_image.Unreadable, match="no image that Pillow knows"):
        any_image.read(io.BytesIO(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n"))


@pytest.mark.parametrize("number, stops", [(errno.EIO, True), (errno.EROFS, True), (errno.ENAMETOOLONG, False)])
def test_a_disk_that_fails_stops_the_command_and_a_name_that_fails_is_unreadable(tmp_path, monkeypatch, number, stops):
    @contextlib.contextmanager
    def failing(path, **_):
        raise OSError(number, os.strerror(number), str(path))
        yield

    put(tmp_path / "in", {"a.png": saved(SMOOTH, "PNG")})
    monkeypatch.setattr(convert.files, "aside", failing)
    job = convert.Job("a.png", 0, 0, str(tmp_path / "in/a.png"), str(tmp_path / "out/a.jpg"))
    settings = convert.Settings(images=str(tmp_path / "in"), output=str(tmp_path / "out"))
    outcome = convert._convert(job, settings, str(tmp_path / "out"))
    assert outcome.problem == f"cannot be written: {os.strerror(number)}" and (outcome.error == number) == stops
