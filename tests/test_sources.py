"""A source gives records by number, and their order is a function of (seed, position)."""

import numpy as np
import pytest
import tensorflow as tf

from moco_tf.data import sources


@pytest.fixture
def small_source():
    return sources.Source("seven", tf.constant([str(i) for i in range(7)]), tf.range(7, dtype=tf.int64))


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


def test_an_unknown_embedded_split_is_refused():
    with pytest.raises(ValueError, match="train and test, not 'val'"):
        sources.embedded("val")
