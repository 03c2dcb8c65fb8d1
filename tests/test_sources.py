"""A source gives records by number, and their order is a function of (seed, position)."""

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image

from moco_tf.data import sources


@pytest.fixture
def small_source():
    return sources.Source("seven", tf.constant([str(i) for i in range(7)]), tf.range(7, dtype=tf.int64))


@pytest.fixture
def write(tmp_path):
    def write(*paths):
        for path in paths:
            file = tmp_path / path
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.zeros((4, 5, 3), np.uint8)).save(file)
        return tmp_path

    return write


def order(source, count, **where):
    return [(int(epoch), int(record["id"])) for epoch, record in source.shuffled(**where).take(count)]


def test_every_epoch_is_a_permutation_and_no_two_are_equal(small_source):
    places = order(small_source, 21, seed=3)
    epochs = [[i for epoch, i in places if epoch == wanted] for wanted in range(3)]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3


def test_the_order_repeats_for_a_seed_and_differs_for_another(small_source):
    assert order(small_source, 14, seed=3) == order(small_source, 14, seed=3)
    assert order(small_source, 14, seed=3) != order(small_source, 14, seed=4)


@pytest.mark.parametrize("start", [0, 4, 5, 13])
def test_starting_at_a_position_is_skipping_up_to_it(small_source, start):
    whole = order(small_source, 20, seed=3, per_epoch=5)
    assert order(small_source, 20 - start, seed=3, per_epoch=5, start=start) == whole[start:]


def test_an_epoch_that_drops_records_repeats_none_and_drops_others_each_time(small_source):
    places = order(small_source, 50, seed=0, per_epoch=5)
    epochs = [{i for epoch, i in places if epoch == wanted} for wanted in range(10)]
    assert all(len(epoch) == 5 for epoch in epochs)
    assert set.union(*epochs) == set(range(7))


def test_an_epoch_longer_than_the_source_is_refused(small_source):
    with pytest.raises(ValueError, match=r"1 to 7 records .* not 8"):
        small_source.shuffled(seed=0, per_epoch=8)


@pytest.mark.parametrize(("split", "per_class"), [("train", 1000), ("test", 200)])
def test_the_embedded_images_are_balanced_and_decodable(split, per_class):
    source = sources.embedded(split)
    np.testing.assert_array_equal(np.bincount(source.labels), [per_class] * 10)
    assert source.size == 10 * per_class
    assert len(source.class_names) == 10
    for record in source.in_order().take(20):
        assert tf.io.decode_jpeg(record["image"]).shape == (32, 32, 3)


def test_in_order_gives_each_record_by_its_number(small_source):
    records = list(small_source.in_order())
    assert [int(record["id"]) for record in records] == list(range(7))
    assert [record["image"].numpy() for record in records] == [str(i).encode() for i in range(7)]


def test_class_folders_label_images_at_any_depth_by_path(write):
    root = write("cat/2.png", "cat/deep/er/1.PNG", "Dog/3.jpeg", ".hidden/4.png", "cat/.5.png")
    (root / "cat/notes.txt").write_text("no image")
    source = sources.folder(root)
    assert source.class_names == ("Dog", "cat")
    names = [path.decode().removeprefix(f"{root}/") for path in source.contents.numpy()]
    assert names == ["Dog/3.jpeg", "cat/2.png", "cat/deep/er/1.PNG"]
    assert source.labels.numpy().tolist() == [0, 1, 1]
    assert source.record(1)["image"].numpy() == (root / "cat/2.png").read_bytes()


def test_a_flat_folder_has_no_labels(write):
    source = sources.folder(write("b.gif", "a.bmp", "c.jpg"))
    assert source.class_names == ()
    assert source.labels.numpy().tolist() == [-1, -1, -1]


def test_folders_called_train_and_val_are_splits_with_the_same_class_numbers(write):
    root = write("train/a/1.png", "train/b/2.png", "val/b/3.png")
    assert sources.folder(root).size == 2
    held_out = sources.folder(root, "val")
    assert held_out.class_names == ("a", "b")
    assert held_out.labels.numpy().tolist() == [1]
    assert sources.folder(root, "test").name == held_out.name


def test_a_folder_without_splits_is_its_own_training_split(write):
    assert sources.folder(write("a/1.png"), "train").size == 1


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
            sources.folder(path, split)
        assert "\n" not in str(error.value)


def test_an_unknown_embedded_split_is_refused():
    with pytest.raises(ValueError, match="train and test, not 'val'"):
        sources.embedded("val")
