"""A folder of images: what is found, which files are bad, and what the manifest remembers."""

import os

import numpy as np
import pytest
from PIL import Image

from moco_tf.data import check, folder


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
    source = folder.check(folder.scan(root)).source()
    assert source.class_names == ("Dog", "cat")
    names = [path.decode().removeprefix(f"{root}/") for path in source.contents.numpy()]
    assert names == ["Dog/3.jpeg", "cat/2.png", "cat/deep/er/1.PNG"]
    assert source.labels.numpy().tolist() == [0, 1, 1]
    assert source.record(1)["image"].numpy() == (root / "cat/2.png").read_bytes()


def test_a_flat_folder_has_no_labels(write):
    source = folder.check(folder.scan(write("b.gif", "a.bmp", "c.jpg"))).source()
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
        (root / "split", "validation", "has the splits train, val, test, not 'validation'"),
        (root / "split", "tset", "not 'tset'"),
    ]:
        with pytest.raises(ValueError, match=message) as error:
            folder.scan(path, split)
        assert "\n" not in str(error.value)


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
    checked = folder.check(folder.scan(root), manifest)
    assert checked.bad == [] and len(checked.listing.files) == 5
    assert len(list(checked.source().in_order())) == 5
    again = folder.check(folder.scan(root), manifest, begun=True)
    assert again.listing.files == checked.listing.files and again.verdicts == checked.verdicts
    assert folder.printable("line\nbreak\udcff猫") == "line\\nbreak\\udcff猫"


def test_a_class_whose_name_is_no_text_has_a_name_that_is_and_keeps_its_images(write):
    root = write("train/a/1.png", "test/a/3.png")
    for split in ("train", "test"):
        os.rename(root / split / "a", os.path.join(os.fsencode(root / split), b"m\xfcnchen"))
    write("train/zoo/2.png")
    for split, labels in (("train", [0, 1]), ("test", [0])):
        source = folder.check(folder.scan(root, split)).source()
        assert source.class_names == ("m\\udcfcnchen", "zoo")
        assert source.labels.numpy().tolist() == labels


def test_what_is_no_regular_file_is_no_image_and_a_link_to_nothing_is_a_bad_one(write):
    root = write("1.png")
    (root / "folder.png").mkdir()
    (root / "folder.png/2.png").write_bytes((root / "1.png").read_bytes())
    os.mkfifo(root / "pipe.png")
    (root / "broken.png").symlink_to(root / "nowhere.png")
    checked = folder.check(folder.scan(root))
    assert checked.listing.files == ["1.png", "broken.png", "folder.png/2.png"]
    assert checked.bad == [("broken.png", "no such file")]


def spoil(path):
    path.write_bytes(b"no image")


def test_the_next_good_file_stands_in_for_a_bad_one_and_the_first_after_the_last(write):
    root = write("a/0.png", "a/1.png", "b/2.png", "b/3.png")
    for name in ("a/1.png", "b/3.png"):
        spoil(root / name)
    checked = folder.check(folder.scan(root))
    source = checked.source()
    assert checked.bad == [(name, "none of JPEG, PNG, BMP, GIF, WebP") for name in ("a/1.png", "b/3.png")]
    assert source.size == 4
    records = [source.record(i) for i in range(4)]
    assert [(int(r["id"]), int(r["label"])) for r in records] == [(0, 0), (2, 1), (2, 1), (0, 0)]
    assert records[1]["image"].numpy() == (root / "b/2.png").read_bytes()
    assert [int(record["id"]) for record in source.in_order()] == [0, 2]


def test_a_second_check_reads_only_what_has_changed(write, monkeypatch):
    root = write("0.png", "1.png", "2.png")
    spoil(root / "1.png")
    manifest = root / "manifest.csv"
    first = folder.check(folder.scan(root), manifest)
    read = []
    verdicts = check.verdicts

    def counted(items, read_item, total):
        read.extend(os.path.basename(item.decode()) for item in items.as_numpy_iterator())
        return verdicts(items, read_item, total)

    monkeypatch.setattr(check, "verdicts", counted)
    assert folder.check(folder.scan(root), manifest).verdicts == first.verdicts
    assert read == []
    spoil(root / "2.png")
    assert [name for name, _ in folder.check(folder.scan(root), manifest).bad] == ["1.png", "2.png"]
    assert read == ["2.png"]


@pytest.mark.parametrize("text", ["", "path,size", "nonsense\n1,2,3\n", None])
def test_a_manifest_that_is_not_as_it_should_be_is_not_believed(write, text):
    root = write("0.png")
    manifest = root / "manifest.csv"
    folder.check(folder.scan(root), manifest)
    whole = manifest.read_text()
    manifest.write_text(whole.replace(",PNG,4,5", ",PNG,4") if text is None else text)
    assert folder.check(folder.scan(root), manifest).bad == []
    assert manifest.read_text() == whole


def test_a_run_under_way_keeps_its_images_and_their_order(write):
    root = write("1.png", "2.png", "3.png")
    manifest = root / "manifest.csv"
    folder.check(folder.scan(root), manifest)
    write("0.png")
    (root / "2.png").unlink()
    checked = folder.check(folder.scan(root), manifest, begun=True)
    assert (checked.listing.files, checked.added) == (["1.png", "2.png", "3.png"], 1)
    assert checked.bad == [("2.png", "no such file")]
    assert folder.check(folder.scan(root), manifest).listing.files == ["0.png", "1.png", "3.png"]


def test_too_many_bad_files_are_refused_with_the_first_ten_named():
    bad = [(f"{i:02d}.jpg", "empty") for i in range(12)]
    assert folder.too_many_bad(bad, 240, 0.05) is None
    line = folder.too_many_bad(bad, 239, 0.05)
    assert "12 of 239" in line and "09.jpg (empty), ..." in line and "10.jpg" not in line and "\n" not in line


def test_a_folder_without_a_good_image_is_refused(write):
    root = write("0.png")
    spoil(root / "0.png")
    with pytest.raises(ValueError, match=r"None of the 1 images .* 0\.png \(none of"):
        folder.check(folder.scan(root)).source()


@pytest.mark.skipif(os.geteuid() == 0, reason="nothing is unreadable for the superuser")
def test_a_folder_that_cannot_be_opened_is_named(write):
    root = write("a/1.png", "b/2.png")
    (root / "b").chmod(0)
    listing = folder.scan(root)
    (root / "b").chmod(0o700)
    assert (listing.files, listing.unread) == (["a/1.png"], ("b",))
