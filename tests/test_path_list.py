"""--dataset as a file that lists images, and as several folders."""

import csv
import os
import time

import numpy as np
import pytest
from PIL import Image

from moco_tf import train
from moco_tf.command import ConfigError
from moco_tf.data import __main__ as data
from moco_tf.data import dataset, folder, path_list, texts
from moco_tf.data.manifest import check_files

parquet = pytest.importorskip("pyarrow.parquet", reason="pyarrow is not installed: pip install 'moco_tf[search]'")
pa = pytest.importorskip("pyarrow")


@pytest.fixture
def photos(tmp_path):
    """Five images of two classes and one of none, in a folder beside which the lists lie."""
    for number, path in enumerate(("cat/1.png", "cat/2.png", "dog/3.png", "dog/deep/4.png", "5.png")):
        file = tmp_path / "photos" / path
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((32, 32, 3), number, np.uint8)).save(file)
    return tmp_path / "photos"


def listed(photos, name, text):
    (photos.parent / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    return str(photos.parent / name)


def opened(name, split="train", most=0.0):
    return dataset.find(name, "", split, most).open()


def facts(source):
    """[(path, the class's name or None)] of the images of a source, and its classes."""
    names = [*source.class_names, None]
    paths = [os.path.normpath(os.fsdecode(path)) for path in source.contents.numpy()]
    return [(path, names[label]) for path, label in zip(paths, source.labels.numpy(), strict=True)], source.class_names


def test_a_table_of_a_folders_images_is_that_folder(photos):
    expected = facts(opened(str(photos)))
    rows = [(os.path.relpath(path, photos.parent), name) for path, name in expected[0]]
    assert len(rows) == 5
    text = "label,path\n" + "".join(f"{name or ''},{path}\n" for path, name in rows[::-1])
    assert facts(opened(listed(photos, "a.csv", text))) == expected
    table = pa.table({"path": [path for path, _ in rows], "class": [name for _, name in rows]})
    parquet.write_table(table, photos.parent / "a.parquet")
    assert facts(opened(str(photos.parent / "a.parquet"))) == expected
    source = opened(listed(photos, "a.txt", "".join(f"{path}\r\n\n" for path, _ in rows)))
    assert facts(source) == ([(path, None) for path, _ in expected[0]], ())


def test_paths_start_from_the_lists_folder_or_are_absolute(photos, monkeypatch):
    name = listed(photos, "a.txt", f"./photos/5.png\n{photos}/cat/1.png\nphotos/../photos/cat/2.png\n")
    monkeypatch.chdir("/")
    paths = [path for path, _ in facts(opened(name))[0]]
    assert sorted(paths) == [f"{photos}/{file}" for file in ("5.png", "cat/1.png", "cat/2.png")]
    source = opened(name)
    assert source.shared_with(opened(str(photos))) == 2  # what goes round by .. is not known again


def test_a_text_is_a_list_if_its_first_line_ends_as_an_images_name(tmp_path):
    for text, is_list in [
        ("a.jpg\nb.png\n", True),
        ("\n  \n/x/a b.JPEG \r\n", True),
        ("\ufeffa.webp\n", True),
        ("A cat sits.\na.jpg\n", False),
        ("cat\ta.jpg\n", False),  # a sentence with a label
        ("a.tif\n", False),
        ("", False),
    ]:
        (tmp_path / "a.txt").write_text(text, encoding="utf-8")
        assert path_list.is_at(tmp_path / "a.txt") == is_list
        assert texts.are_at(tmp_path / "a.txt")  # is asked after that
    (tmp_path / "a.txt").write_text("A cat sits.\nA dog runs.\n")
    assert opened(str(tmp_path / "a.txt")).unit == "sentences"


@pytest.mark.parametrize("names", ["path,label", "File,CLASS", " filename ,label", "image,class"])
def test_columns_go_by_their_names_in_capitals_or_not(photos, names):
    source = opened(listed(photos, "a.csv", f"{names}\nphotos/5.png,x\n"))
    assert facts(source) == ([(str(photos / "5.png"), "x")], ("x",))
    source = opened(listed(photos, "a.csv", "image,path\nphotos/none.png,photos/5.png\n"))  # path comes first
    assert facts(source)[0] == [(str(photos / "5.png"), None)]


def test_labels_that_are_numbers_are_classes_in_the_order_of_the_numbers(photos):
    text = "path,label\nphotos/cat/1.png,10\nphotos/cat/2.png,9\nphotos/5.png,\n"
    source = opened(listed(photos, "a.csv", text))
    assert source.class_names == ("9", "10") and source.labels.numpy().tolist() == [-1, 1, 0]
    table = pa.table({"path": ["photos/cat/1.png", "photos/cat/2.png", "photos/5.png"], "label": [10, 9, None]})
    parquet.write_table(table, photos.parent / "a.parquet")
    assert facts(opened(str(photos.parent / "a.parquet"))) == facts(source)


def test_a_column_split_divides_and_a_list_without_it_is_the_same_for_every_split(photos):
    text = "path,label,split\nphotos/cat/1.png,cat,training\nphotos/dog/3.png,dog,val\nphotos/5.png,,\n"
    name = listed(photos, "a.csv", text)
    assert facts(opened(name)) == ([(str(photos / "cat/1.png"), "cat")], ("cat", "dog"))
    assert facts(opened(name, "test")) == ([(str(photos / "dog/3.png"), "dog")], ("cat", "dog"))
    assert opened(name).shared_with(opened(name, "test")) == 0
    with pytest.raises(ConfigError, match="has the splits training, val; 'extra' is none of them"):
        opened(name, "extra")
    name = listed(photos, "b.csv", "path\nphotos/5.png\n")
    assert opened(name).shared_with(opened(name, "test")) == 1


def test_names_that_are_not_text_are_found(photos):
    os.link(photos / "5.png", os.fsencode(photos) + b"/caf\xe9.png")
    for name, text in (("a.txt", b"photos/caf\xe9.png\n"), ("a.csv", b"path,label\nphotos/caf\xe9.png,k\xf6ln\n")):
        source = opened(listed(photos, name, text))
        assert source.contents.numpy().tolist() == [os.fsencode(photos) + b"/caf\xe9.png"]
        assert source.record(0)["image"].numpy() == (photos / "5.png").read_bytes()
    assert source.class_names == ("k\\udcf6ln",)


def test_what_is_missing_or_no_file_is_bad_and_what_is_listed_twice_is_taken_once(photos):
    os.mkfifo(photos / "pipe.png")
    lines = ["photos/5.png", "photos/none.png", "photos/pipe.png", "photos/cat", "photos/5.png", "photos/\0.png"]
    listing = path_list.read(listed(photos, "a.txt", "\n".join(lines)), "train")
    checked = check_files(listing)
    assert sorted(file for file, _ in checked.bad) == sorted({*lines} - {"photos/5.png"})
    assert {problem for _, problem in checked.bad} == {"no such file"}
    assert "Listed more than once, and taken once: 1" in folder.remarks(listing)


@pytest.mark.parametrize(
    "name, text, rule",
    [
        (
            "a.csv",
            "name,class\na.png,x\n",
            "a column of paths, called path, file, filename or image; its columns are name",
        ),
        ("a.csv", "", "its columns are none"),
        ("a.csv", "path,label\n", "lists no image"),
        (
            "a.csv",
            "path,label\na,b.png,x\n",
            "line 2 of .* has 3 columns, the first 2: put what has a comma in quotes",
        ),
        ("a.csv", 'path\n"a\n' + "x" * 200_000, "is no CSV"),
        ("a.csv", "path,label\na.png,x\na.png,y\n", "lists a.png as x and as y: an image has one label"),
        ("a.parquet", "no table", "is no Parquet that can be read"),
    ],
)
def test_a_list_that_cannot_be_meant_is_refused_in_one_line(photos, name, text, rule):
    with pytest.raises(ConfigError, match=rule) as error:
        opened(listed(photos, name, text))
    assert "\n" not in str(error.value) and str(error.value).startswith("--dataset=")


def test_a_second_start_reads_no_image_and_a_run_keeps_the_images_that_it_began_with(photos, monkeypatch):
    name = listed(photos, "a.csv", "path,label\nphotos/cat/1.png,x\nphotos/5.png,y\n")
    manifest = photos.parent / "images.csv"
    first = dataset.find(name, "", "train", 0.0).open(manifest)
    monkeypatch.setattr("moco_tf.data.check.verdicts", None)
    assert facts(dataset.find(name, "", "train", 0.0).open(manifest)) == facts(first)
    listed(photos, "a.csv", "path,label\nphotos/cat/1.png,x\nphotos/cat/2.png,y\nphotos/5.png,y\n")
    assert facts(dataset.find(name, "", "train", 0.0, begun=True).open(manifest, begun=True)) == facts(first)


def test_a_recipe_trains_on_a_list_and_the_page_says_what_is_in_it(photos, capsys):
    rows = [(f"photos/{file}", file[:3]) for file in ("cat/1.png", "cat/2.png", "dog/3.png", "dog/deep/4.png")]
    name = str(photos.parent / "a.csv")
    with open(name, "w", newline="") as file:
        csv.writer(file).writerows([("path", "label"), *rows])
    small = [f"--dataset={name}", f"--run_dir={photos.parent / 'run'}", "--arch=resnet10", "--width=4", "--stem=cifar"]
    small += ["--image_size=32", "--augment=cifar", "--dim=8", "--batch_size=4", "--queue_size=8", "--bn_groups=1"]
    assert data.main(small) == 0
    output = capsys.readouterr().out
    assert f"{name}: 4 images, 0 of them undecodable" in output and "Classes: 2 (cat 2, dog 2)" in output
    assert train.main([*small, "--epochs=1"]) == 0
    assert "4 of the 4 images of" in capsys.readouterr().out  # the monitor's reason: all are trained on


def test_several_folders_are_one_with_the_classes_of_all(photos):
    more = photos.parent / "more"
    for path in ("dog/1.png", "ant/2.png"):
        (more / path).parent.mkdir(parents=True)
        Image.fromarray(np.zeros((4, 4, 3), np.uint8)).save(more / path)
    source = opened(f"{photos},{more}")
    assert source.class_names == ("ant", "cat", "dog")
    naive = [fact for one in (more, photos) for fact in facts(opened(str(one)))[0]]
    assert sorted(facts(source)[0]) == sorted(naive) and [path for path, _ in facts(source)[0]] == sorted(
        path for path, _ in naive
    )
    relative = dataset.find("photos,more", str(photos.parent), "train", 0.0)
    assert facts(relative.open()) == facts(source)
    assert f"Folders: {photos} 5, {more} 2" in folder.remarks(relative.listing)


def test_each_of_several_folders_has_its_own_splits(photos):
    for path in ("a/train/x/1.png", "a/val/x/2.png", "b/training/y/3.png", "b/test/y/4.png"):
        file = photos.parent / path
        file.parent.mkdir(parents=True)
        Image.fromarray(np.zeros((4, 4, 3), np.uint8)).save(file)
    name = f"{photos.parent}/a,{photos.parent}/b"
    assert [os.path.basename(path) for path, _ in facts(opened(name))[0]] == ["1.png", "3.png"]
    held_out = opened(name, "test")
    assert [os.path.basename(path) for path, _ in facts(held_out)[0]] == ["2.png", "4.png"]
    assert held_out.class_names == ("x", "y") and opened(name).shared_with(held_out) == 0


def test_a_folder_whose_name_has_a_comma_is_itself_and_folders_within_one_another_are_refused(photos):
    photos.rename(photos.parent / "cats,dogs")
    assert opened(str(photos.parent / "cats,dogs")).size == 5
    for name, rule in [
        (f"{photos.parent},{photos.parent / 'cats,dogs'}/cat", "would be there twice"),
        (f"{photos.parent},{photos.parent}", "would be there twice"),
        (f"{photos.parent},nowhere", "There is no folder .*nowhere"),
    ]:
        with pytest.raises(ConfigError, match=rule) as error:
            opened(name)
        assert "\n" not in str(error.value)


def test_a_hundred_thousand_paths_are_listed_within_six_seconds(photos):
    lines = [f"photos/{number}/{number}.jpg,{number % 1000}" for number in range(100_000)]
    name = listed(photos, "a.csv", "\n".join(["path,label", *lines]))
    begun = time.process_time()
    listing = path_list.read(name, "train")
    assert len(listing.labels) == 100_000 and time.process_time() - begun < 6  # 60 for a million


def test_numbers_of_which_some_are_missing_are_labels_in_parquet_as_in_csv(photos):
    paths = [f"photos/{path}" for path in ("cat/1.png", "cat/2.png", "dog/3.png")]
    for values, names in (([3.0, 10.0, None], ("3", "10")), ([True, False, None], ("false", "true"))):
        parquet.write_table(pa.table({"path": paths, "label": values}), photos.parent / "a.parquet")
        source = opened(str(photos.parent / "a.parquet"))
        assert source.class_names == names and source.labels.numpy()[2] == -1
        assert sorted(source.labels.numpy().tolist()) == [-1, 0, 1]


def test_rows_of_a_split_in_another_spelling_belong_to_it_and_all_are_counted(photos):
    rows = ["cat/1.png,train", "cat/2.png,Train", "dog/3.png,TRAIN", "5.png,val", "dog/deep/4.png,Val"]
    table = listed(photos, "a.csv", "path,split\n" + "".join(f"photos/{row}\n" for row in rows))
    listing = path_list.read(table, "train")
    assert listing.size == 3 and listing.notes == (f"Splits of {table}: TRAIN 1, Train 1, Val 1, train 1, val 1",)
    assert path_list.read(table, "test").size == 2  # val and Val stand for it


def test_a_folder_of_arrays_with_a_text_beside_them_is_no_folder_of_sentences(tmp_path):
    np.save(tmp_path / "1.npy", np.zeros((4, 4, 7), np.uint8))
    (tmp_path / "notes.txt").write_text("seven bands\n")
    assert not texts.are_at(tmp_path)
    (tmp_path / "1.npy").unlink()
    assert texts.are_at(tmp_path)
