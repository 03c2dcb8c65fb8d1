"""The memory bank: what is drawn, what an update writes."""

import numpy as np
import pytest
import tensorflow as tf

from moco_tf.data import sources
from moco_tf.methods.bank import Bank


def test_an_update_moves_keys_as_a_naive_loop_does_and_a_records_first_feature_counts():
    bank = Bank(7, 3)
    expected = bank.keys.numpy()
    features = np.random.default_rng(0).normal(size=(4, 3)).astype("float32")
    tf.function(bank.update)(tf.constant([5, 0, 5, 3], tf.int64), tf.constant(features), 0.25)
    for number, feature in ((5, features[0]), (0, features[1]), (3, features[3])):
        moved = 0.25 * expected[number] + 0.75 * feature
        expected[number] = moved / np.linalg.norm(moved)
    np.testing.assert_allclose(bank.keys.numpy(), expected, rtol=1e-6, atol=1e-7)


def test_others_are_different_records_outside_the_batch_drawn_alike_and_anew_in_each_step():
    bank, batch = Bank(20, 2), tf.constant([4, 11, 19], tf.int64)
    draw = tf.function(lambda step: bank.draw_others(9, batch, (1, step)))
    drawn = [draw(tf.constant(step, tf.int64)).numpy() for step in range(2000)]
    assert all(len(set(numbers)) == 9 and not set(numbers) & {4, 11, 19} for numbers in drawn)
    counts = np.bincount(np.concatenate(drawn), minlength=20)
    rest = np.delete(counts, [4, 11, 19])
    expected = 2000 * 9 / 17
    assert np.abs(rest - expected).max() < 5 * np.sqrt(expected)
    np.testing.assert_array_equal(drawn[0], draw(tf.constant(0, tf.int64)))
    assert (drawn[0] != drawn[1]).any()


def test_all_others_can_be_drawn():
    drawn = Bank(8, 2).draw_others(5, tf.constant([1, 2, 6], tf.int64), (0, tf.constant(3, tf.int64)))
    assert sorted(drawn.numpy()) == [0, 3, 4, 5, 7]


def test_noise_is_drawn_from_all_records_alike():
    drawn = Bank(10, 2).draw(20_000, (0, tf.constant(5, tf.int64))).numpy()
    assert np.abs(np.bincount(drawn, minlength=10) - 2000).max() < 5 * np.sqrt(2000)


def test_it_starts_with_unit_vectors_that_the_seed_determines_never_coarser_than_float32():
    a, b, c = (Bank(16, 8, seed=seed, dtype="bfloat16").keys for seed in (0, 0, 1))
    assert a.dtype == "float32" and not a.trainable
    np.testing.assert_allclose(np.linalg.norm(a.numpy(), axis=1), 1.0, rtol=1e-6)
    np.testing.assert_array_equal(a.numpy(), b.numpy())
    assert (a.numpy() != c.numpy()).all()


@pytest.mark.parametrize("records", [1, 5])
def test_a_batch_may_repeat_a_record_in_a_graph(records):
    bank = Bank(records, 2)
    numbers = tf.constant([0, 0, records - 1], tf.int64)
    tf.function(bank.update)(numbers, tf.constant([[3.0, 4.0], [0.0, 1.0], [3.0, 4.0]]), 0.0)
    np.testing.assert_allclose(bank.look_up(tf.constant([0], tf.int64)), [[0.6, 0.8]], rtol=1e-6)


def test_others_come_in_another_order_than_the_images_of_any_epoch():
    order, nobody = sources.Permutation(50, 3), tf.zeros((0,), tf.int64)
    drawn = Bank(50, 2).draw_others(50, nobody, (3, tf.constant(2, tf.int64))).numpy()
    for epoch in range(4):
        of_epoch = [int(order(tf.constant(epoch * 50 + place, tf.int64))[1]) for place in range(50)]
        assert sorted(of_epoch) == sorted(drawn) and of_epoch != list(drawn)
