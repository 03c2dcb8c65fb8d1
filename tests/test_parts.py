"""Queries of parts of an image, small crops or combined patches, and views that grow: naive loops, exact resumes."""

import itertools

import keras
import numpy as np
import pytest
import tensorflow as tf
from every_task import write
from exactness import assert_goes_on
from keras import layers
from test_train import assert_a_run_goes_on
from test_views_on import FLAGS

import moco_tf
from moco_tf import build, encoders, replicas
from moco_tf import config as config_lib
from moco_tf.data.inputs.image import Preprocessing
from moco_tf.encoders import BatchNorm, patch_grid
from moco_tf.methods import batch_norms
from moco_tf.methods.combined_patches import CombinedPatches
from moco_tf.methods.losses import info_nce
from moco_tf.pretext import crops
from moco_tf.train import main

SIZE, SMALL, BATCH, K, T = 8, 4, 8, 24, 0.2


def of(kind, **settings):
    keras.utils.set_random_seed(1)
    inputs = keras.Input((None, None, 3))
    x = layers.ReLU()(BatchNorm()(layers.Conv2D(6, 3, padding="same", use_bias=False)(inputs)))
    backbone = keras.Model(inputs, layers.GlobalAveragePooling2D()(x))
    model = kind(backbone, dim=4, queue_size=K, momentum=0.9, temperature=T, bn_groups=2, seed=3, **settings)
    model.compile(moco_tf.SGD(0.1, momentum=0.9, weight_decay=1e-3))
    return model


def with_small_views():
    return of(moco_tf.MoCo, small_views=2)


def with_small_views_and_symmetric():
    return of(moco_tf.MoCo, small_views=2, symmetric=True, mask_siblings=True)


def with_patches():
    return of(CombinedPatches)


def batches(model, steps, seed=0):
    def images(size):
        return np.random.default_rng(seed + size).normal(size=(steps * BATCH, size, size, 3)).astype("float32")

    views = (images(SIZE), images(SIZE) + 1, *(images(SMALL) for _ in range(model.small_views)))
    data = {"views": views, "id": np.arange(steps * BATCH, dtype="int64") % 5}
    return tf.data.Dataset.from_tensor_slices(data).batch(BATCH, drop_remainder=True)


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


@pytest.mark.parametrize("symmetric", [False, True])
def test_small_views_are_queries_only_and_the_loss_is_the_mean_over_the_queries(symmetric):
    model = of(moco_tf.MoCo, small_views=2, symmetric=symmetric)
    batch = next(iter(batches(model, 1)))
    context = model.prepare(batch)
    assert set(context) == ({0, 1} if symmetric else {1})
    queue = model.queue.keys.numpy().copy()
    found = model.objective(batch, context)
    losses = []
    for place in (0, 1, 2, 3) if symmetric else (0, 2, 3):
        queries = unit(model.query_encoder(batch["views"][place], training=True)["projection"].numpy())
        keys = [key.numpy() for other, key in context.items() if other != place]
        losses.append(
            np.mean([[-np.log(softmax_of_key(q, k[i], queue)) for k in keys] for i, q in enumerate(queries)])
        )
    assert np.mean(found.loss) == pytest.approx((2 if symmetric else 1) * np.mean(losses), rel=1e-5)
    model.finish(batch, context, found)
    assert int(model.queue.pointer) == len(context) * BATCH


def softmax_of_key(query, key, queue):
    weights = np.exp(np.array([query @ key, *(query @ row for row in queue)]) / T)
    return weights[0] / weights.sum()


def test_a_query_is_the_head_of_the_mean_features_of_two_quarters():
    model = with_patches()
    batch = next(iter(batches(model, 1)))
    context = model.prepare(batch)
    found = model.objective(batch, context)
    view = batch["views"][0].numpy()
    halves = (slice(0, 4), slice(4, 8))
    parts = np.stack([view[:, rows, columns] for rows in halves for columns in halves], axis=1)  # n x 4 x 4 x 4 x 3
    np.testing.assert_array_equal(patch_grid.apart(tf.constant(view), 2), parts.reshape(-1, 4, 4, 3))
    features = model.query_encoder(parts.reshape(-1, 4, 4, 3), training=True)["features"].numpy().reshape(BATCH, 4, -1)
    losses = []
    for one, other in itertools.combinations(range(4), 2):
        x = (features[:, one] + features[:, other]) / 2
        for name in ("fc.0", "fc.relu", "fc.2"):
            x = model.query_encoder.get_layer(name)(x)
        losses.append(info_nce(unit(x.numpy()), context[1], model.queue.keys, T).loss)
    assert np.mean(found.loss) == pytest.approx(np.mean(losses), rel=1e-5)


@pytest.mark.parametrize("make", [with_small_views, with_patches])
def test_running_statistics_are_those_of_whole_views(make):
    """Of the query encoder's own, or, where it sees none, of the key encoder's."""
    model = make()
    batch = next(iter(batches(model, 1)))
    whole = make()
    whole.query_encoder(batch["views"][0], training=True)
    model.train_step(batch)
    of_keys = model.key_encoder if make is with_patches else whole.query_encoder
    for found, expected in zip(*map(batch_norms.running_statistics, (model.query_encoder, of_keys)), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-5)
        assert np.abs(expected.numpy() - 1.0).max() > 0.01  # not as they begin


KINDS = [with_small_views_and_symmetric, with_patches, pytest.param(with_small_views, marks=pytest.mark.slow)]


@pytest.mark.parametrize("make", KINDS)
def test_replicas_do_what_one_device_does_and_hold_the_same_bits(make):
    alone = make()
    alone.fit(batches(alone, 3), verbose=0)
    with replicas.on_one_cpu(2).scope():
        model = make()
    model.fit(batches(model, 3), verbose=0)
    for a, b in zip(alone.variables, model.variables, strict=True):
        if a is not alone.totals:
            np.testing.assert_allclose(a, b.numpy(), rtol=2e-4, atol=2e-5, err_msg=a.path)
        first, other = (copy.numpy() for copy in b.value.values)
        assert np.array_equal(first, other), b.path


@pytest.mark.parametrize("make", KINDS)
def test_a_checkpoint_and_a_keras_file_go_on_as_if_nothing_had_happened(make, tmp_path):
    assert_goes_on(make, batches, tmp_path)


@pytest.mark.parametrize("views_on", ["host", "device"])
def test_small_crops_are_of_their_own_size_and_area(views_on):
    inputs = Preprocessing(image_size=16)
    options = crops.Options(augment="cifar", small_views=3, small_size=6, small_crop_max=0.1, views_on=views_on)
    picture = tf.cast(tf.random.stateless_uniform((40, 40, 3), (0, 0), 0, 256, tf.int32), tf.uint8)
    seeds = [tf.constant((5, number), tf.int64) for number in range(8)]
    made = [crops.views({"image": tf.io.encode_png(picture)}, seed, inputs, options) for seed in seeds]
    views = tf.nest.map_structure(lambda *each: tf.stack(each), *made)
    views = views if views_on == "host" else crops.on_device(inputs, options)(views)
    assert [view.shape[1:] for view in views] == [(16, 16, 3)] * 2 + [(6, 6, 3)] * 3
    assert len({view.numpy().tobytes() for view in views}) == 5
    kinds = crops.kinds(inputs, options)
    assert [kind.crop_scale for kind in kinds] == [(0.08, 1.0)] * 2 + [(0.05, 0.1)] * 3


@pytest.mark.parametrize(
    "more",
    [("--small_views=2", "--views_on=host"), ("--growing_sizes=4,6",)],
    ids=lambda more: more[0],
)
@pytest.mark.slow
def test_a_run_goes_on_bit_for_bit(tmp_path, more):
    write(tmp_path / "data/train", 24)
    flags = [f"--dataset={tmp_path / 'data'}", *FLAGS, "--epochs=3", *more]
    assert_a_run_goes_on(tmp_path, flags, at=8, steps=9)


def test_an_encoder_takes_any_size_only_where_its_views_are_of_several():
    small = ["--arch=resnet10", "--width=4", "--image_size=16"]
    for more, sides in (([], 16), (["--small_views=1"], None), (["--growing_sizes=8"], None)):
        config = config_lib.parse([*small, *more])
        assert encoders.of_config(config).input_shape == (None, sides, sides, 3)
        assert build.backbone(config).input_shape == (None, 16, 16, 3)  # of a classifier


def test_views_grow_in_stages_of_as_many_epochs():
    config = config_lib.parse(["--growing_sizes=96,128", "--epochs=7", "--image_size=160", "--warmup_epochs=0"])
    assert [config.size_at(epoch) for epoch in range(7)] == [96, 96, 96, 128, 128, 160, 160]
    assert {config_lib.parse([]).size_at(epoch) for epoch in range(200)} == {224}


def test_a_step_sees_the_size_of_its_stage(tmp_path, monkeypatch):
    seen = []
    whole = moco_tf.MoCo._queries
    monkeypatch.setattr(moco_tf.MoCo, "_queries", lambda self, x, t: seen.append(x.shape[1]) or whole(self, x, t))
    write(tmp_path / "data/train", 8)
    flags = [f"--dataset={tmp_path / 'data'}", *FLAGS, "--epochs=2", "--growing_sizes=6"]
    assert main([*flags, f"--run_dir={tmp_path / 'run'}"]) == 0
    assert list(dict.fromkeys(seen)) == [6, 8]
