"""Batches of views repeat for (seed, epoch, record), go on where they stopped, and take any dataset of images."""

import dataclasses
import itertools

import keras
import numpy as np
import pytest
import tensorflow as tf
from PIL import Image
from test_preprocessing import photograph

from moco_tf.data import augment, sources, views

TASK = augment.cifar(size=16)
FLIPS = dataclasses.replace(TASK, query=augment.View(steps=("flip",)), key=augment.View(steps=("flip",)))  # quick


@pytest.fixture(scope="module")
def source():
    """Eleven JPEGs: epochs of two batches of four, three images left out."""
    images = [tf.io.encode_jpeg(photograph(24, 20, seed=i)).numpy() for i in range(11)]
    return sources.Source("eleven", tf.constant(images), tf.fill((11,), tf.constant(-1, tf.int64)))


@pytest.fixture(scope="module")
def images():
    return np.stack([photograph(24, 20, seed=i) for i in range(6)])


def first(dataset, count):
    """The views of the first batches, be those dicts, as the trainer's, or pairs."""
    found = [batch["views"] if isinstance(batch, dict) else batch for batch in itertools.islice(iter(dataset), count)]
    return [tuple(view.numpy() for view in batch) for batch in found]


def assert_equal(some, others):
    assert len(some) == len(others) > 0
    for one, other in zip(some, others, strict=True):
        np.testing.assert_array_equal(one, other)


def test_going_on_at_a_step_gives_the_batches_of_an_uninterrupted_run(source):
    whole = first(views.batches(source, TASK, batch_size=4, seed=7), 5)
    for step in (1, 2, 3):  # the second is an epoch's first
        assert_equal(first(views.batches(source, TASK, batch_size=4, seed=7, step=step), 5 - step), whole[step:])


def test_a_view_is_a_function_of_seed_epoch_and_record(source):
    (batch,) = first(views.batches(source, TASK, batch_size=4, seed=7, step=5), 1)  # the second batch of epoch 2
    places = source.shuffled(seed=7, start=5 * 4, per_epoch=8).take(4)
    for place, (epoch, record) in enumerate(places):
        assert int(epoch) == 2
        expected = TASK(record, tf.stack([7 * 2**32 + epoch, record["id"]]))
        np.testing.assert_allclose(batch[0][place], expected[0], atol=1e-4)
        np.testing.assert_allclose(batch[1][place], expected[1], atol=1e-4)


def test_other_seeds_and_epochs_give_other_views(source):
    (one,) = first(views.batches(source, FLIPS, batch_size=11, seed=0), 1)
    (other_seed,) = first(views.batches(source, FLIPS, batch_size=11, seed=1), 1)
    (other_epoch,) = first(views.batches(source, FLIPS, batch_size=11, seed=0, step=1), 1)
    for other in (other_seed, other_epoch):
        assert not set(map(bytes, one[0])) & set(map(bytes, other[0]))
    assert not set(map(bytes, one[0])) & set(map(bytes, one[1]))


def test_the_first_views_are_those_of_the_first_batch(source):
    (batch,) = first(views.batches(source, TASK, 4, seed=2), 1)
    assert_equal([batch], [tuple(view.numpy() for view in views.first(source, TASK, 4, seed=2))])


def test_a_batch_larger_than_the_source_is_refused(source):
    with pytest.raises(ValueError, match=r"batch of 12 .* eleven has 11"):
        views.batches(source, FLIPS, batch_size=12, seed=0)
    with pytest.raises(ValueError, match=r"batch of 12 .* dataset has 11"):
        views.views(tf.data.Dataset.from_tensor_slices(source.contents), FLIPS, batch_size=12)


def test_views_are_new_in_every_iteration_and_repeat_in_a_fresh_dataset(images):
    def dataset(seed):
        return views.views(tf.data.Dataset.from_tensor_slices(images), FLIPS, batch_size=3, seed=seed)

    one = dataset(seed=5)
    epochs = [first(one, 9), first(one, 9)]
    assert [len(epoch) for epoch in epochs] == [2, 2]
    assert not np.array_equal(epochs[0][0][0], epochs[1][0][0])
    again = dataset(seed=5)
    assert_equal(first(again, 9), epochs[0])
    assert_equal(first(again, 9), epochs[1])
    assert not np.array_equal(first(dataset(seed=6), 1)[0][0], epochs[0][0][0])


def test_every_form_of_dataset_gives_the_same_views(images):
    slices = tf.data.Dataset.from_tensor_slices
    labels = np.arange(len(images))
    forms = [
        slices(images),
        slices(images.astype(np.float32)),
        slices({"image": images, "label": labels}),
        slices((images, labels)),
        slices(images).batch(4),
        slices((images, labels)).batch(4),
        slices({"image": images}).batch(3, drop_remainder=True),
        slices([tf.io.encode_png(image).numpy() for image in images]),
        slices([tf.io.encode_png(image).numpy() for image in images]).batch(4),
    ]
    expected = first(views.views(forms[0], FLIPS, batch_size=2), 9)
    assert len(expected) == 3
    assert expected[0][0].shape == (2, 16, 16, 3)
    for form in forms[1:]:
        assert_equal(first(views.views(form, FLIPS, batch_size=2), 9), expected)


def test_the_number_of_batches_is_known_where_it_can_be(images):
    slices = tf.data.Dataset.from_tensor_slices(images)
    assert views.views(slices, FLIPS, batch_size=4).cardinality() == 1
    assert views.views(slices.batch(3, drop_remainder=True), FLIPS, batch_size=2).cardinality() == 3


def test_image_dataset_from_directory_is_taken_as_it_is(tmp_path, images):
    for number, image in enumerate(images):
        folder = tmp_path / "ab"[number % 2]
        folder.mkdir(exist_ok=True)
        Image.fromarray(image).save(folder / f"{number}.png")
    dataset = keras.utils.image_dataset_from_directory(tmp_path, image_size=(20, 22), batch_size=4, verbose=False)
    batches = first(views.views(dataset, FLIPS, batch_size=3), 9)
    assert [batch[0].shape for batch in batches] == [(3, 16, 16, 3)] * 2


def test_grey_images_are_given_three_channels(images):
    dataset = tf.data.Dataset.from_tensor_slices(images[..., :1])
    assert first(views.views(dataset, FLIPS, batch_size=2), 1)[0][0].shape == (2, 16, 16, 3)


@pytest.mark.parametrize(
    ("elements", "message"),
    [
        ({"pixels": np.zeros((2, 4, 4, 3))}, r"under \"image\".*pixels"),
        (np.zeros((2, 4)), r"not \(4,\)"),
        (np.zeros((2, 4, 4, 4)), r"not \(4, 4, 4\)"),
    ],
)
def test_what_is_no_image_is_refused(elements, message):
    with pytest.raises(ValueError, match=message):
        views.views(tf.data.Dataset.from_tensor_slices(elements), FLIPS, batch_size=1)
