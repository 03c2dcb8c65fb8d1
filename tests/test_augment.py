"""The recipes draw what the papers say, as often and in the order they say it."""

import dataclasses
import pathlib
import re

import numpy as np
import pytest
import replay_goldens
import tensorflow as tf
from test_preprocessing import photograph

from moco_tf.data import augment, image_ops
from moco_tf.pretext import crops

GOLDENS = pathlib.Path(__file__).parent / "goldens"
TASKS = [recipe(size=24) for recipe in augment.RECIPES.values()]
IMAGE = tf.constant(photograph(40, 50))


def seed(*numbers):
    return tf.constant(numbers, tf.int64)


def for_seeds(count, function, results):
    """`function` of the draws of one view, for `count` seeds, as a NumPy array. results: its type."""
    seeds = tf.stack([tf.fill((count,), tf.constant(9, tf.int64)), tf.range(count, dtype=tf.int64)], axis=1)

    def of_seed(numbers):
        return function(augment.draws_of(augment.draw(numbers, views=1)[0]))

    return tf.function(lambda: tf.map_fn(of_seed, seeds, fn_output_signature=results))().numpy()


def test_the_authors_views_are_reproduced_within_their_tolerance(capsys):
    assert replay_goldens.report(GOLDENS / "augment_a.npz"), capsys.readouterr().out


def test_a_golden_file_that_differs_fails(tmp_path, capsys):
    with np.load(GOLDENS / "augment_a.npz", allow_pickle=False) as archive:
        arrays = dict(archive)
    arrays["out_11"] = arrays["out_11"][:, ::-1]
    np.savez(tmp_path / "changed.npz", **arrays)
    with pytest.raises(SystemExit) as end:
        replay_goldens.main([GOLDENS / "augment_a.npz", tmp_path / "changed.npz"])
    assert end.value.code == 1
    printed = capsys.readouterr()
    whole, changed = printed.out.splitlines()
    assert whole.startswith("augment_a.npz") and whole.endswith("ok")
    assert changed.startswith("changed.npz") and changed.endswith("FAIL")
    assert "hflip out_11" in printed.err


@pytest.mark.parametrize("task", TASKS)
def test_a_seed_gives_the_same_two_views_each_time_and_another_seed_others(task):
    view = tf.function(lambda numbers: task({"image": IMAGE}, numbers))
    query, key = view(seed(1, 2))
    assert query.shape == key.shape == (24, 24, 3)
    np.testing.assert_array_equal(query, view(seed(1, 2))[0])
    for other in (key, view(seed(1, 3))[0], view(seed(2, 2))[0]):
        assert not np.array_equal(query, other)


@pytest.mark.parametrize("task", TASKS)
def test_views_are_normalised_pixels(task):
    for view in task({"image": IMAGE}, seed(0, 0)):
        pixels = task.preprocessing.denormalize(view).numpy()
        assert view.dtype == tf.float32
        assert pixels.min() > -0.01 and pixels.max() < 255.01


def test_all_that_is_random_comes_from_one_stateless_draw():
    for task in TASKS:
        specs = {"image": tf.TensorSpec((), tf.string)}, tf.TensorSpec((2,), tf.int64)
        graph = tf.function(task).get_concrete_function(*specs).graph.as_graph_def()
        nodes = [*graph.node, *(node for function in graph.library.function for node in function.node_def)]
        random = [node.op for node in nodes if re.search("Random|PyFunc", node.op)]
        assert all(op.startswith("Stateless") for op in random)
        assert random.count("StatelessRandomUniformV2") == 1


def test_each_step_is_drawn_as_often_as_its_probability():
    """1,000 views of an image on which each step leaves its own mark, within four standard errors."""
    image = np.zeros((8, 8, 3), np.float32)
    image[:, :4] = (30, 30, 60)  # dark blue left of black: stays left unless flipped
    image[0, 0] = 255  # one bright pixel spreads when blurred
    alone = {"grayscale": 0.2, "blur": 0.5, "solarize": 0.3, "flip": 0.5}
    marks = {
        "grayscale": lambda view: np.ptp(view, axis=-1).max() < 0.1,
        "blur": lambda view: view[0, 1, 0] > 31,
        "solarize": lambda view: view.max() < 128,
        "flip": lambda view: view[4, 0, 2] < view[4, -1, 2],
    }
    for step, probability in alone.items():
        view = augment.View(steps=(step,), blur_sigma=(1.0, 2.0), **{f"{step}_probability": probability})
        results = for_seeds(1000, lambda draws, view=view: view.distort(tf.constant(image), draws), tf.float32)
        happened = [marks[step](result) for result in results]
        assert abs(np.mean(happened) - probability) < 4 * np.sqrt(probability * (1 - probability) / 1000), step


def test_the_jitter_has_all_24_orders_equally_often():
    orders = for_seeds(2400, lambda draws: tf.argsort(draws.order), tf.int32)
    _, counts = np.unique(orders, axis=0, return_counts=True)
    assert len(counts) == 24
    assert np.sum((counts - 100) ** 2 / 100) < 50  # chi-squared of 23 degrees, p = 0.001


def test_jitter_applies_its_operations_in_the_drawn_order():
    pixels = tf.cast(IMAGE, tf.float32)
    operations = (image_ops.brightness, image_ops.contrast, image_ops.saturation, image_ops.hue)
    uniforms = np.array([0.9, 0.2, 0.95, 0.7], np.float32)
    factors = [0.6 + 0.8 * 0.9, 0.6 + 0.8 * 0.2, 0.8 + 0.4 * 0.95, -0.1 + 0.2 * 0.7]
    for order in [(0, 1, 2, 3), (3, 1, 0, 2), (2, 3, 1, 0)]:
        expected = pixels
        for place in order:
            expected = operations[place](expected, np.float32(factors[place]))
        ranks = np.argsort(order).astype(np.float32) / 4
        actual = augment.color_jitter(pixels, (0.4, 0.4, 0.2, 0.1), uniforms, ranks)
        np.testing.assert_allclose(actual, expected, atol=1e-2)


def test_the_uniform_numbers_of_the_two_views_are_independent():
    draw = tf.function(lambda numbers: augment.draws_of(augment.draw(numbers, views=2)).crop)
    query, key = np.array([draw(seed(4, i)) for i in range(1000)]).transpose(1, 0, 2)
    correlation = [np.corrcoef(query[:, i], key[:, i])[0, 1] for i in range(query.shape[1])]
    assert np.abs(correlation).max() < 5 / np.sqrt(1000)


@pytest.mark.parametrize(("height", "width"), [(375, 500), (32, 32), (200, 1000), (1000, 10), (1, 1)])
def test_a_crop_lies_inside_the_image(height, width):
    uniforms = np.random.default_rng(0).random((2000, 2 * augment.CROP_TRIES + 2), np.float32)
    uniforms[0], uniforms[1] = 0.0, np.nextafter(np.float32(1), np.float32(0))
    top, left, rows, columns = augment.random_resized_crop_box(height, width, (0.08, 1.0), uniforms).numpy().T
    assert top.min() >= 0 and left.min() >= 0 and rows.min() >= 1 and columns.min() >= 1
    assert (top + rows).max() <= height and (left + columns).max() <= width


def torchvisions_crop_box(height, width, scale, uniforms):
    """The rule as a loop, with given uniform numbers."""
    tries = augment.CROP_TRIES
    for area, aspect in zip(uniforms[:tries], uniforms[tries : 2 * tries], strict=True):
        target = height * width * (scale[0] + (scale[1] - scale[0]) * area)
        low, high = np.log(3 / 4), np.log(4 / 3)
        ratio = np.exp(low + (high - low) * aspect)
        columns, rows = round(np.sqrt(target * ratio)), round(np.sqrt(target / ratio))
        if 0 < columns <= width and 0 < rows <= height:
            return int(uniforms[-2] * (height - rows + 1)), int(uniforms[-1] * (width - columns + 1)), rows, columns
    rows, columns = height, width
    if width / height < 3 / 4:
        rows = round(width / (3 / 4))
    elif width / height > 4 / 3:
        columns = round(height * (4 / 3))
    return (height - rows) // 2, (width - columns) // 2, rows, columns


@pytest.mark.parametrize(("height", "width"), [(375, 500), (33, 32), (100, 1001), (901, 120)])
def test_crops_follow_torchvisions_rule_try_by_try(height, width):
    uniforms = np.random.default_rng(1).random((500, 2 * augment.CROP_TRIES + 2))
    actual = augment.random_resized_crop_box(height, width, (0.2, 1.0), uniforms.astype(np.float32)).numpy()
    expected = [torchvisions_crop_box(height, width, (0.2, 1.0), row) for row in uniforms]
    assert np.mean(np.abs(actual - expected).max(axis=1) > 0) < 0.005  # float32 rounds a few halves otherwise
    assert np.abs(actual - expected)[:, 2:].max() <= 1


def test_the_recipes_are_the_papers():
    v1, v2, v3, cifar = (augment.RECIPES[name]() for name in ("v1", "v2", "v3", "cifar"))
    plain = augment.View(
        crop_scale=(0.2, 1.0),
        jitter=(0.4, 0.4, 0.4, 0.1),
        jitter_probability=0.8,
        grayscale_probability=0.2,
        blur_probability=0.5,
        blur_sigma=(0.1, 2.0),
        flip_probability=0.5,
    )
    changed = dataclasses.replace
    one = changed(plain, steps=("grayscale", "jitter", "flip"), jitter=(0.4,) * 4, jitter_probability=1.0)
    two = changed(plain, steps=("jitter", "grayscale", "blur", "flip"))
    three = changed(plain, steps=("jitter", "grayscale", "blur", "solarize", "flip"), jitter=(0.4, 0.4, 0.2, 0.1))
    small = changed(plain, steps=("flip", "jitter", "grayscale"), crop_scale=(0.08, 1.0))
    assert (v1.query, v1.key) == (one, one)
    assert (v2.query, v2.key) == (two, two)
    assert v3.query == changed(three, blur_probability=1.0, solarize_probability=0.0)
    assert v3.key == changed(three, blur_probability=0.1, solarize_probability=0.2)
    assert (cifar.query, cifar.key) == (small, small)


def test_the_smallest_crop_can_be_chosen_and_none_is_the_recipes_own():
    assert augment.v3(crop_min=0.08).key.crop_scale == (0.08, 1.0)
    assert augment.cifar(crop_min=None) == augment.cifar()
    with pytest.raises(ValueError, match="crop_min"):
        augment.v2(crop_min=0)


def test_an_unknown_step_is_refused():
    task = dataclasses.replace(TASKS[0], query=augment.View(steps=("rotate",)))
    with pytest.raises(ValueError, match="rotate"):
        task({"image": IMAGE}, seed(0, 0))


def test_a_tasks_views_of_a_large_jpeg_follow_the_flag_decode():
    encoded = tf.io.encode_jpeg(photograph(300, 400), quality=95)
    inputs, seed = augment.v2(16).preprocessing, tf.constant([0, 3], tf.int64)
    cut = augment.random_crops({"image": encoded}, seed, (augment.View(steps=()),) * 2, 16, "fast")
    for decode in ("exact", "fast"):
        options = crops.Options(decode=decode, augment="flip")
        kinds = (augment.View(steps=()),) * 2
        views = crops.host_part({"image": encoded}, seed, kinds, inputs, options)
        same = [np.array_equal(view, inputs.normalize(crop.image)) for view, crop in zip(views, cut, strict=True)]
        assert same == 2 * [decode == "fast"]
