"""Several pictures of one thing: which are drawn, what a run makes of them, and what is refused before it."""

import collections
import types

import numpy as np
import pytest
import tensorflow as tf

from moco_tf.data import dataset, things
from moco_tf.data.pipeline import fixed, parallel_map
from moco_tf.data.sources import Source
from moco_tf.pretext import siblings
from moco_tf.train import main

DRAWS = 4000


def options(**kwargs):
    return siblings.Options(**kwargs)


def drawn(count, **kwargs):
    """Places (DRAWS, 1 + P) that as many seeds give."""
    chosen = options(**kwargs)
    seeds = tf.stack([tf.range(DRAWS, dtype=tf.int64), tf.zeros(DRAWS, tf.int64)], axis=1)
    places = parallel_map(tf.data.Dataset.from_tensor_slices(seeds), lambda s: siblings.pictures(count, s, chosen))
    return fixed(places.batch(DRAWS)).get_single_element().numpy()


def assert_shares(found, expected):
    """found: a list of values; expected: {value: probability}. Within five standard deviations of each count."""
    counts = collections.Counter(found)
    assert set(counts) == {value for value, p in expected.items() if p > 0}
    for value, p in expected.items():
        assert abs(counts[value] - DRAWS * p) <= 5 * np.sqrt(DRAWS * p * (1 - p)) + 1e-9, value


@pytest.mark.parametrize("longest, limit", [(5, 0), (3, 3)])
def test_uniform_distances_make_all_pairs_that_are_near_enough_alike(longest, limit):
    pairs = [(i, j) for i in range(6) for j in range(6) if 0 < abs(i - j) <= longest]
    assert_shares(list(map(tuple, drawn(6, max_distance=limit).tolist())), {pair: 1 / len(pairs) for pair in pairs})


@pytest.mark.parametrize("longest, limit", [(5, 0), (3, 3), (1, 1)])
def test_linear_distances_fall_as_cvrls_density_does(longest, limit):
    def cdf(t):
        return 2 * t / longest - (t / longest) ** 2

    places = drawn(6, max_distance=limit, distance="linear")
    distances = np.abs(places[:, 0] - places[:, 1]).tolist()
    assert_shares(distances, {t: cdf(t) - cdf(t - 1) for t in range(1, longest + 1)})
    of_one = places[np.abs(places[:, 0] - places[:, 1]) == 1]
    assert (of_one[:, 0] < of_one[:, 1]).any() and (of_one[:, 0] > of_one[:, 1]).any()  # either may be the query


@pytest.mark.parametrize("distance", ["uniform", "linear"])
def test_several_keys_are_different_pictures_and_each_is_as_likely_as_the_first(distance):
    places = drawn(6, positives=3, distance=distance)
    assert all(len(set(row)) == 4 for row in places.tolist())
    again = drawn(6, positives=1, distance=distance)
    np.testing.assert_array_equal(places[:, :2], again)  # more keys change nothing about the first


def test_where_others_are_too_few_they_come_again_and_the_query_never_does():
    places = drawn(3, positives=4)
    for query, *keys in places.tolist():
        assert query not in keys and len(set(keys)) == 2
    assert (drawn(1, positives=2) == 0).all()  # its only picture


def write(folder, pictures, shade=0):
    """A thing: `pictures` files whose red tells their place."""
    folder.mkdir(parents=True)
    for place in range(pictures):
        image = np.zeros((16, 16, 3), np.uint8) + np.array([10 * place, shade, 0], np.uint8)
        (folder / f"{place}.png").write_bytes(tf.io.encode_png(image).numpy())


def source(folder):
    return dataset.find(str(folder), "", "train", max_bad_fraction=0.5).open()


def test_a_folder_of_pictures_is_a_thing_and_its_pictures_are_in_the_order_of_their_numbers(tmp_path):
    write(tmp_path / "cup/1", 12)
    write(tmp_path / "cup/2", 2)
    write(tmp_path / "pen/1", 3)
    (tmp_path / "cup/1/3.png").write_bytes(b"broken")
    (tmp_path / "alone.png").write_bytes((tmp_path / "pen/1/0.png").read_bytes())
    found = things.of_images(source(tmp_path))
    assert found.contents.numpy().tolist() == [b"cup/1", b"cup/2", b"pen/1"]
    assert found.counts.tolist() == [11, 2, 3] and found.labels.numpy().tolist() == [0, 0, 1]
    record = found.record(tf.constant(0))
    names = [path.rsplit(b"/", 1)[1] for path in record["files"].numpy()]
    assert names == [b"%d.png" % place for place in range(12) if place != 3]
    assert (int(record["id"]), int(record["label"])) == (0, 0)
    last = found.only([2, 1])
    assert last.contents.numpy().tolist() == [b"pen/1", b"cup/2"] and last.counts.tolist() == [3, 2]
    assert all(b"cup/2/" in path for path in last.record(tf.constant(1))["files"].numpy())


def test_views_are_crops_of_the_pictures_that_were_drawn(tmp_path):
    write(tmp_path / "one/thing", 9)
    found = things.of_images(source(tmp_path))
    plain = types.SimpleNamespace(image_size=8, channels=3, normalize=lambda image: image)
    chosen = options(augment="cifar", positives=3, distance="linear")
    for number in range(5):
        seed = tf.constant([number, 7], tf.int64)
        places = siblings.pictures(tf.constant(9), tf.random.experimental.stateless_fold_in(seed, 4), chosen)
        record = found.record(tf.constant(0))
        alone = [  # each picture as a thing of its own
            siblings.views({"files": record["files"][place : place + 1]}, seed, plain, chosen)[view]
            for view, place in enumerate(places.numpy())
        ]
        for a, b in zip(siblings.views(record, seed, plain, chosen), alone, strict=True):
            np.testing.assert_array_equal(a, b)


FLAGS = [
    *("--pretext=siblings", "--arch=resnet10", "--width=4", "--image_size=16", "--augment=cifar", "--batch_size=4"),
    *("--queue_size=8", "--dim=8", "--head=linear", "--knn_every=0", "--lr_per=step", "--epochs=2", "--bn_groups=2"),
]


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clips") / "clips"
    for number in range(8):
        write(folder / f"{number}", 2 + number, shade=30 * number)
    return folder


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--positives=9"], "--positives=9 and a query are drawn from 10 different pictures of a thing"),
        (["--positives=0"], "--positives is at least 1 key view; got 0"),
        (
            ["--positives=2", "--method=moco_v3"],
            "moco_v3 trains on 2 views of each record; --pretext=siblings",
        ),
        (["--views_on=device"], "--views_on is host or both, since pictures are read one by one; got device"),
        (["--dataset=embedded"], "--pretext=siblings: things are the sub-folders of a folder of images"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line_before_training(clips, tmp_path, capsys, arguments, message):
    assert main([f"--dataset={clips}", *FLAGS, f"--run_dir={tmp_path / 'run'}", *arguments]) == 2
    error = capsys.readouterr().err.splitlines()
    assert len(error) == 1 and message in error[0]
    assert not (tmp_path / "run/checkpoints").exists()


def test_pictures_without_a_sub_folder_and_things_of_one_picture_are_said(tmp_path, capsys):
    write(tmp_path / "data/a", 3)
    write(tmp_path / "data/b", 1)
    write(tmp_path / "more", 1)
    (tmp_path / "more/0.png").rename(tmp_path / "data/0.png")
    flags = [*FLAGS, "--batch_size=2", "--bn_groups=1", "--max_steps=1"]
    assert main([f"--dataset={tmp_path / 'data'}", *flags, f"--run_dir={tmp_path / 'run'}"]) == 0
    output = capsys.readouterr().out
    assert "Things: 2, of 1 to 3 pictures, 4 in all" in output
    assert "Left out: 1 pictures that lie in no sub-folder" in output
    assert "Things with a single picture: 1" in output
    assert "2 things (" in output


def test_a_source_without_files_has_no_things():
    images = Source("two", tf.constant(["a", "b"]), tf.constant([0, 1], tf.int64))
    with pytest.raises(ValueError, match="two has none"):
        things.of_images(images)
