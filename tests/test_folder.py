"""A folder of images: what is found, which files are bad, and what the manifest remembers."""

import os
import types

import numpy as np
import pytest
from PIL import Image

from moco_tf.data import check, dataset, folder
from moco_tf.data.manifest import check_files, too_many_bad
from moco_tf.data.splits import split_of
from moco_tf.files import printable


@pytest.fixture
def write(tmp_path):
    def write(*paths):
        for path in paths:
            file = tmp_path / path
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.zeros((4, 5, 3), np.uint8)).save(file)
        return tmp_path

    return write


def test_class_folders_label_images_at_any_depth_by_path(write):
    root = write("cat/2.png", "cat/deep/er/1.PNG", "Dog/3.jpeg", ".hidden/4.png", "cat/.5.png")
    (root / "cat/notes.txt").write_text("no image")
    source = check_files(folder.scan(root)).source()
    assert source.class_names == ("Dog", "cat")
    names = [path.decode().removeprefix(f"{root}/") for path in source.contents.numpy()]
    assert names == ["Dog/3.jpeg", "cat/2.png", "cat/deep/er/1.PNG"]
    assert source.labels.numpy().tolist() == [0, 1, 1]
    assert source.record(1)["image"].numpy() == (root / "cat/2.png").read_bytes()


def test_a_flat_folder_has_no_labels(write):
    source = check_files(folder.scan(write("b.gif", "a.bmp", "c.jpg"))).source()
    assert source.class_names == ()
    assert source.labels.numpy().tolist() == [-1, -1, -1]


def test_folders_called_train_and_val_are_splits_with_the_same_class_numbers(write):
    root = write("train/a/1.png", "train/b/2.png", "val/b/3.png")
    assert folder.scan(root).size == 2
    held_out = folder.scan(root, "val")
    assert held_out.class_names == ("a", "b")
    assert held_out.labels == [1]
    assert folder.scan(root, "test").path == held_out.path


def test_a_folder_without_splits_is_its_own_training_split(write):
    assert folder.scan(write("a/1.png"), "train").size == 1


def test_what_is_wrong_with_a_folder_is_said_in_one_line(write):
    root = write("whole/a/1.png", "split/train/1.png", "split/val/1.png", "split/test/1.png")
    (root / "empty").mkdir()
    for path, split, message in [
        (root / "none", None, "There is no folder"),
        (root / "whole/a/1.png", None, "is a file"),
        (root / "empty", None, "no images"),
        (root / "whole", "test", "is not divided, so it has no split 'test'"),
        (root / "split", "tset", "not 'tset'"),
    ]:
        with pytest.raises(ValueError, match=message) as error:
            folder.scan(path, split)
        assert "\n" not in str(error.value)


def files_of(root, split=None):
    return folder.scan(root, split).files


def said(root, split=None):
    return "\n".join(folder.remarks(folder.scan(root, split)))


@pytest.mark.parametrize(
    "kind, names",
    [
        ("train", "train Train TRAINING trn train2017 train_images training_set trainset train-data trainval"),
        ("validation", "val Valid VALIDATION dev eval val2017 val_images ILSVRC2012_img_val holdout hold-out"),
        ("test", "test Test testing tst test1 test_set testset images_test"),
        (None, "trains training_shoes test_tube train_station latest valley device images data set1 2017 . cat"),
    ],
)  # fmt: skip
def test_the_usual_names_of_splits_are_known_in_capitals_and_with_what_people_add(kind, names):
    assert {name: split_of(name) for name in names.split()} == dict.fromkeys(names.split(), kind)


@pytest.mark.parametrize("train, held_out", [("Train", "Test"), ("training", "validation"), ("train2017", "val2017")])
def test_images_in_a_held_out_folder_of_any_usual_name_are_not_trained_on(write, train, held_out):
    root = write(f"{train}/a/1.png", f"{train}/b/2.png", f"{held_out}/b/3.png")
    assert folder.scan(root).path == root / train
    for split in ("test", "val", "validation", held_out):
        listing = folder.scan(root, split)
        assert (listing.path, listing.class_names, listing.labels) == (root / held_out, ("a", "b"), [1])
    assert f"Splits of {root}: " in said(root)


def test_a_class_called_train_is_a_class(write):
    root = write("bus/1.png", "car/2.png", "train/3.png")
    listing = folder.scan(root, "train")
    assert (listing.class_names, listing.labels) == (("bus", "car", "train"), [0, 1, 2])
    assert "Classes: 3 (bus 1, car 1, train 1)" in said(root)
    assert "The folder train is read as a class, like those beside it; " in said(root)
    assert f"if it is the training split, give --dataset={root}/train" in said(root)
    assert files_of(root / "train") == ["3.png"]


def test_classes_called_train_have_a_held_out_folder_beside_them_that_has_their_names(write):
    root = write("bus/1.png", "train/2.png", "val/bus/3.png", "val/train/4.png")
    assert files_of(root) == ["bus/1.png", "train/2.png"]
    assert folder.scan(root).class_names == folder.scan(root, "test").class_names == ("bus", "train")
    assert f"Held out of {root}: val; the rest is trained on" in said(root)


def test_a_folder_called_train_that_alone_has_class_folders_is_a_split_and_the_others_are_named(write):
    root = write("train/a/1.png", "train/b/2.png", "extra/3.png", "extra/4.png", "5.png")
    assert files_of(root) == ["a/1.png", "b/2.png"]
    assert "Left out, images in: extra 2, no folder 1; --train_split=. reads all folders, as classes" in said(root)
    assert len(files_of(root, ".")) == 5


def test_folders_beside_splits_are_left_out_and_named(write):
    root = write("train/a/1.png", "test/a/2.png", "raw/x/3.png", "raw/y/4.png", "Train/5.png")
    (root / "notes").mkdir()
    assert files_of(root) == ["a/1.png"]
    assert f"Splits of {root}: Train, test, train" in said(root)
    assert "Left out, images in: Train 1, raw 2; " in said(root)
    assert "Left out" not in said(root, "test")


def test_of_two_folders_that_a_split_can_mean_that_of_the_name_is_taken_and_else_both_are_named(write):
    root = write("train/a/1.png", "val/a/2.png", "valid/a/3.png", "Train/a/4.png")
    assert folder.scan(root).path == root / "train"
    assert folder.scan(root, "valid").path == root / "valid"
    for path, split, names in [(root, "test", "val and valid"), (root, "validation", "val and valid")]:
        with pytest.raises(ValueError, match=f"{names}, and '{split}' can mean each. Name one of them") as error:
            folder.scan(path, split)
        assert "\n" not in str(error.value)


def test_a_held_out_folder_beside_classes_whose_names_it_has_is_not_trained_on(write):
    root = write("cat/1.png", "dog/2.png", "test/cat/3.png", "test/dog/4.png", "test/eel/5.png")
    assert files_of(root) == ["cat/1.png", "dog/2.png"]
    assert f"Held out of {root}: test; the rest is trained on" in said(root)
    held_out = folder.scan(root, "val")
    assert held_out.class_names == folder.scan(root).class_names == ("cat", "dog", "eel")
    assert held_out.labels == [0, 1, 2]


def test_images_beside_nothing_but_a_held_out_folder_are_what_is_trained_on(write):
    root = write("1.png", "test/2.png")
    assert files_of(root) == ["1.png"]
    assert files_of(root, "test") == ["2.png"]


def test_a_class_called_test_is_trained_on_but_not_in_silence(write):
    root = write("cat/1.png", "dog/2.png", "Test/3.png")
    assert folder.scan(root).class_names == ("Test", "cat", "dog")
    assert "The folder Test is read as a class, like those beside it, and trained on: " in said(root)
    assert f"if it is held out, move the folders beside it into {root}/train" in said(root)


def test_several_folders_called_like_training_and_none_held_out_are_classes(write):
    root = write("train1/1.png", "train2/2.png")
    assert files_of(root) == ["train1/1.png", "train2/2.png"]
    assert "The folder train1 is read as a class" in said(root) and "The folder train2 is read as a class" in said(
        root
    )


def test_held_out_folders_below_classes_are_trained_on_but_not_in_silence(write):
    root = write("photos/train/a/1.png", "photos/val/a/2.png")
    assert "inside of classes and trained on: photos/val; " in said(root)
    assert f"--dataset={root}/photos reads splits" in said(root)
    root = write("each/cat/train/1.png", "each/cat/test/2.png", "each/dog/test/3.png") / "each"
    assert "inside of classes and trained on: cat/test, dog/test; move them out" in said(root)
    assert "trained on" not in said(write("whole/train/test/1.png", "whole/val/test/2.png") / "whole")


def test_a_split_may_be_any_folder_that_is_named(write):
    root = write("train/a/1.png", "val/a/2.png", "unlabelled/3.png", "more/b/4.png")
    assert files_of(root, "unlabelled") == ["3.png"]
    assert folder.scan(root, "more").class_names == ("b",)
    assert "as the split '.' asks: train, val" in said(root, ".")


def test_what_is_not_read_is_counted_by_the_end_of_its_name(write):
    root = write("a/1.png", "a/._1.png", "a/.hidden.png")
    for number in range(4):
        (root / f"a/{number}.TIF").write_bytes(b"II*")
    for name in ("x.txt", "Thumbs.db", "a/README", "a/.DS_Store", "x.zip", "x.heic", "x.csv", "x.tar.gz"):
        (root / name).write_bytes(b"")
    assert (
        said(root).splitlines()[-1]
        == "Not read: .tif 4, without an ending 1, .csv 1, .db 1, .gz 1, other endings 3, hidden 2"
    )
    only = root / "only"
    only.mkdir()
    (only / "1.tiff").write_bytes(b"")
    with pytest.raises(ValueError, match=r"There are no images \(.*\) in .*/only, but .tiff 1. Give"):
        folder.scan(only)


def test_of_a_plain_folder_nothing_is_said_but_its_classes(write):
    assert said(write("cat/1.png", "cat/2.png", "dog/3.png")) == "Classes: 2 (cat 2, dog 1)"


def test_a_link_to_a_folder_above_ends_there_and_a_folder_is_read_once(write):
    root = write("a/1.png", "b/2.png")
    (root / "a/up").symlink_to(root)
    (root / "a/again").symlink_to(root / "b")
    (root / "c").symlink_to(root / "b")
    assert folder.scan(root).files == ["a/1.png", "b/2.png"]


def test_links_to_files_and_folders_elsewhere_are_followed(write, tmp_path_factory):
    root, elsewhere = write("1.png"), tmp_path_factory.mktemp("elsewhere")
    (elsewhere / "2.png").write_bytes((root / "1.png").read_bytes())
    (root / "link.png").symlink_to(root / "1.png")
    (root / "there").symlink_to(elsewhere)
    assert folder.scan(root).files == ["1.png", "link.png", "there/2.png"]


def test_names_in_any_script_and_names_that_are_no_text_are_read(write):
    root = write("äöü/猫.png", "Ελλάδα/με κενό.png", 'quoted "and", comma.png', "line\nbreak.png")
    with open(os.path.join(os.fsencode(root), b"\xff\xfe.png"), "wb") as file:
        file.write((root / "äöü/猫.png").read_bytes())
    manifest = root / "manifest.csv"
    checked = check_files(folder.scan(root), manifest)
    assert checked.bad == [] and len(checked.listing.files) == 5
    assert len(list(checked.source().in_order())) == 5
    again = check_files(folder.scan(root), manifest, begun=True)
    assert again.listing.files == checked.listing.files and again.verdicts == checked.verdicts
    assert printable("line\nbreak\udcff猫") == "line\\nbreak\\udcff猫"


def test_a_class_whose_name_is_no_text_has_a_name_that_is_and_keeps_its_images(write):
    root = write("train/a/1.png", "test/a/3.png")
    for split in ("train", "test"):
        os.rename(root / split / "a", os.path.join(os.fsencode(root / split), b"m\xfcnchen"))
    write("train/zoo/2.png")
    for split, labels in (("train", [0, 1]), ("test", [0])):
        source = check_files(folder.scan(root, split)).source()
        assert source.class_names == ("m\\udcfcnchen", "zoo")
        assert source.labels.numpy().tolist() == labels


def test_what_is_no_regular_file_is_no_image_and_a_link_to_nothing_is_a_bad_one(write):
    root = write("1.png")
    (root / "folder.png").mkdir()
    (root / "folder.png/2.png").write_bytes((root / "1.png").read_bytes())
    os.mkfifo(root / "pipe.png")
    (root / "broken.png").symlink_to(root / "nowhere.png")
    checked = check_files(folder.scan(root))
    assert checked.listing.files == ["1.png", "broken.png", "folder.png/2.png"]
    assert checked.bad == [("broken.png", "no such file")]


def spoil(path):
    path.write_bytes(b"no image")


def test_the_next_good_file_stands_in_for_a_bad_one_and_the_first_after_the_last(write):
    root = write("a/0.png", "a/1.png", "b/2.png", "b/3.png")
    for name in ("a/1.png", "b/3.png"):
        spoil(root / name)
    checked = check_files(folder.scan(root))
    source = checked.source()
    assert checked.bad == [(name, "none of JPEG, PNG, BMP, GIF, WebP") for name in ("a/1.png", "b/3.png")]
    assert source.size == 4
    records = [source.record(i) for i in range(4)]
    assert [(int(r["id"]), int(r["label"])) for r in records] == [(0, 0), (2, 1), (2, 1), (0, 0)]
    assert records[1]["image"].numpy() == (root / "b/2.png").read_bytes()
    assert [int(record["id"]) for record in source.in_order()] == [0, 2]


def test_few_images_are_looked_at_one_by_one_with_the_verdicts_of_many(write, monkeypatch):
    root = write("0.png", "1.png", "2.png")
    spoil(root / "1.png")
    (root / "3.png").write_bytes(b"")
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (5, 4)).save(root / "4.jpg", exif=exif)
    one_by_one = check_files(folder.scan(root)).verdicts
    monkeypatch.setattr(check, "FEW", 0)
    assert check_files(folder.scan(root)).verdicts == one_by_one
    assert [bool(verdict.problem) for verdict in one_by_one] == [False, True, False, True, False]
    assert one_by_one[4].orientation == 6


def test_a_second_check_reads_only_what_has_changed(write, monkeypatch):
    root = write("0.png", "1.png", "2.png")
    spoil(root / "1.png")
    manifest = root / "manifest.csv"
    first = check_files(folder.scan(root), manifest)
    read = []
    verdicts = check.verdicts

    def counted(items, *others):
        read.extend(os.path.basename(item.decode()) for item in items.as_numpy_iterator())
        return verdicts(items, *others)

    monkeypatch.setattr(check, "verdicts", counted)
    assert check_files(folder.scan(root), manifest).verdicts == first.verdicts
    assert read == []
    spoil(root / "2.png")
    assert [name for name, _ in check_files(folder.scan(root), manifest).bad] == ["1.png", "2.png"]
    assert read == ["2.png"]


@pytest.mark.parametrize("text", ["", "path,size", "nonsense\n1,2,3\n", None])
def test_a_manifest_that_is_not_as_it_should_be_is_not_believed(write, text):
    root = write("0.png")
    manifest = root / "manifest.csv"
    check_files(folder.scan(root), manifest)
    whole = manifest.read_text()
    manifest.write_text(whole.replace(",PNG,4,5,,", ",PNG,4,,") if text is None else text)
    assert check_files(folder.scan(root), manifest).bad == []
    assert manifest.read_text() == whole


def test_a_run_under_way_keeps_its_images_and_their_order(write):
    root = write("1.png", "2.png", "3.png")
    manifest = root / "manifest.csv"
    check_files(folder.scan(root), manifest)
    write("0.png")
    (root / "2.png").unlink()
    checked = check_files(folder.scan(root), manifest, begun=True)
    assert (checked.listing.files, checked.added) == (["1.png", "2.png", "3.png"], 1)
    assert checked.bad == [("2.png", "no such file")]
    assert check_files(folder.scan(root), manifest).listing.files == ["0.png", "1.png", "3.png"]


def as_version_1_had_it(path, files):
    """Writes the manifest of `files` of a folder that the first version wrote."""
    rows = ["path,size,mtime_ns,problem,format,height,width,rules 1"]
    for file in files:
        status = os.stat(path / file)
        rows.append(f"{file},{status.st_size},{status.st_mtime_ns},,PNG,4,5")
    (path.parent / "manifest.csv").write_text("\n".join(rows) + "\n")
    return path.parent / "manifest.csv"


@pytest.mark.parametrize(
    "paths, began_in, files",
    [
        (("bus/1.png", "train/2.png", "train/3.png"), "train", ["2.png", "3.png"]),
        (("Train/a/1.png", "Test/a/2.png"), ".", ["Test/a/2.png", "Train/a/1.png"]),
        (("cat/1.png", "test/cat/2.png"), ".", ["cat/1.png", "test/cat/2.png"]),
        (("Train/1.png", "training/2.png", "val/3.png"), ".", ["Train/1.png", "training/2.png", "val/3.png"]),
    ],
)
def test_a_run_that_an_earlier_version_began_goes_on_with_its_images_unchecked(
    write, monkeypatch, paths, began_in, files
):
    root = write(*(f"v/{path}" for path in paths)) / "v"
    manifest = as_version_1_had_it(root / began_in, files).rename(root.parent / "manifest.csv")
    monkeypatch.setattr(check, "verdicts", None)  # nothing is read again
    checked = check_files(folder.scan(root, "train", begun=True), manifest, begun=True)
    assert [checked.listing.path / file for file in checked.listing.files] == [
        root / began_in / file for file in files
    ]
    assert (checked.bad, checked.added) == ([], 0)


def test_another_run_does_not_believe_the_verdicts_of_an_earlier_version(write):
    root = write("v/1.png") / "v"
    manifest = as_version_1_had_it(root, ["1.png"])
    check_files(folder.scan(root), manifest)
    assert manifest.read_text().splitlines()[0].endswith(",peak,orientation,rules 2")


def test_a_run_keeps_its_images_when_folders_that_come_change_what_a_split_means(write):
    root = write("v/bus/1.png", "v/train/2.png") / "v"
    manifest = root.parent / "manifest.csv"
    before = check_files(folder.scan(root), manifest)
    write("v/val/bus/3.png", "v/val/train/4.png", "v/val/x/5.png", "v/train/bus/6.png")
    after = check_files(folder.scan(root), manifest, begun=True)
    assert (after.listing.path, after.listing.files, after.bad) == (root, before.listing.files, [])
    assert f"The run began with {root} and keeps to it" in "".join(after.listing.doubts)


def test_values_of_sixteen_bits_and_turned_photos_are_told_and_remembered(write):
    root = write("1.png", "2.jpg")
    Image.fromarray(np.full((4, 5), 4095, np.uint16)).save(root / "deep.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (5, 4)).save(root / "turned.jpg", exif=exif)
    manifest = root / "manifest.csv"
    checked = check_files(folder.scan(root), manifest)
    assert [(v.peak, v.orientation) for v in checked.verdicts] == [(None, None), (None, None), (4095, None), (None, 6)]
    assert check_files(folder.scan(root), manifest, begun=True).verdicts == checked.verdicts
    deep, turned = check.remarks(checked.verdicts)
    assert (
        deep.startswith("PNGs of 16 bits: 1, largest value 4095 of 65535; ")
        and "leaves 1 of them dark or black" in deep
    )
    assert turned.startswith("Turned or mirrored by EXIF: 1 JPEGs; that is not applied")


def test_sixteen_bits_that_are_used_are_no_reason_to_warn():
    full = check.remarks([check.Verdict("", "PNG", 4, 5, peak=65535), check.Verdict("", "PNG", 4, 5)])
    assert full == ["PNGs of 16 bits: 1, largest value 65535 of 65535; the upper eight bits are read."]
    assert check.remarks([check.Verdict("", "JPEG", 4, 5), check.Verdict("empty")]) == []


def test_too_many_bad_files_are_refused_with_the_first_ten_named():
    bad = [(f"{i:02d}.jpg", "empty") for i in range(12)]
    assert too_many_bad(bad, 240, 0.05) is None
    line = too_many_bad(bad, 239, 0.05)
    assert "12 of 239" in line and "09.jpg (empty), ..." in line and "10.jpg" not in line and "\n" not in line


def test_a_folder_without_a_good_image_is_refused(write):
    root = write("0.png")
    spoil(root / "0.png")
    with pytest.raises(ValueError, match=r"None of the 1 images .* 0\.png \(none of"):
        check_files(folder.scan(root)).source()


@pytest.mark.skipif(os.geteuid() == 0, reason="nothing is unreadable for the superuser")
def test_a_folder_that_cannot_be_opened_is_named(write):
    root = write("a/1.png", "b/2.png")
    (root / "b").chmod(0)
    listing = folder.scan(root)
    (root / "b").chmod(0o700)
    assert (listing.files, listing.besides.unread) == (["a/1.png"], ["b"])
    assert folder.remarks(listing)[-1] == f"Not read: {root}/b, a folder that cannot be opened."


def test_what_the_system_refuses_once_is_asked_anew_at_the_next_start(write, monkeypatch):
    root = write("0.png", "1.png")
    manifest, verdicts = root / "manifest.csv", check.verdicts
    refused = check.Verdict(f"{root / '0.png'}: Permission denied")
    with monkeypatch.context() as patch:
        patch.setattr(check, "verdicts", lambda *args: [refused, *verdicts(*args)[1:]])
        assert check_files(folder.scan(root), manifest).bad == [("0.png", refused.problem)]
    assert check_files(folder.scan(root), manifest, begun=True).bad == []


def test_a_file_from_the_far_future_is_read(write):
    root = write("0.png")
    os.utime(root / "0.png", (10**10, 10**10))
    assert check_files(folder.scan(root), root / "manifest.csv").bad == []
    assert folder.size_and_time(root / "0.png")[1] == 2**62


def test_a_folder_called_by_a_tilde_is_nobodys_home(write, monkeypatch):
    root = write("~root/0.png")
    monkeypatch.chdir(root)
    assert folder.scan("./~root").files == folder.scan(root / "~root").files == ["0.png"]
    assert dataset.find("./~root", "", "train", 0.05).open().size == 1


def test_a_split_that_nobody_may_read_and_a_link_in_a_circle_do_not_refuse_the_others(write, monkeypatch):
    root = write("train/a/1.png", "train/b/2.png", "val/b/3.png", "test/c/4.png")
    (root / "train/a/latest").symlink_to("latest")
    (root / "round").symlink_to("round")
    entries = folder.archive.entries

    def locked(path):
        if os.fsencode(path).rstrip(b"/") == os.fsencode(root / "test"):
            raise PermissionError(13, "Permission denied", path)
        return entries(path)

    monkeypatch.setattr(folder.archive, "entries", locked)
    found = folder.scan(root)
    assert found.class_names == ("a", "b") and found.files == ["a/1.png", "b/2.png"]


def test_folders_whose_entries_have_no_number_as_on_windows_are_all_read(write, monkeypatch):
    root = write("cat/1.png", "dog/2.png", "dog/old/3.png")
    entries = folder.archive.entries

    class Entry:
        def __init__(self, entry):
            self.entry, self.name = entry, entry.name

        def is_file(self):
            return self.entry.is_file()

        def is_dir(self):
            return self.entry.is_dir()

        def stat(self):
            status = self.entry.stat()
            known = {name: getattr(status, name) for name in dir(status) if name.startswith("st_")}
            return types.SimpleNamespace(**known | {"st_ino": 0, "st_dev": 0})

    monkeypatch.setattr(folder.archive, "entries", lambda path: [Entry(entry) for entry in entries(path)])
    assert folder.scan(root).files == ["cat/1.png", "dog/2.png", "dog/old/3.png"]
