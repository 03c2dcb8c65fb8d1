"""Several keys of a query, symmetric losses and masked siblings: held against naive loops, and exact on replicas."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

import moco_tf
from moco_tf import replicas
from moco_tf.checkpoint import Checkpoints
from moco_tf.encoders import BatchNorm
from moco_tf.methods.losses import info_nce

SIZE, BATCH, K = 8, 8, 24


def unit(*shape, seed=0):
    x = np.random.default_rng(seed).normal(size=shape)
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def naive(q, k, d, temperature, own=None):
    """The loss of each query by loops: the mean over its keys of a softmax of that key and the negatives alone."""
    losses = []
    for i, query in enumerate(q):
        negatives = [row for j, row in enumerate(d) if own is None or own[0][i] < 0 or own[0][i] != own[1][j]]
        others = sum(np.exp(query @ row / temperature) for row in negatives)
        of_keys = [np.exp(query @ key / temperature) for key in k[i]]
        losses.append(np.mean([-np.log(e / (e + others)) for e in of_keys]))
    return losses


@pytest.mark.parametrize("masked", [False, True])
def test_several_keys_each_stand_beside_the_negatives_alone_and_siblings_are_left_out(masked):
    q, k, d = unit(5, 3), unit(5, 4, 3, seed=1), unit(K, 3, seed=2)
    own = (np.array([0, 1, 2, -1, 9]), np.array([0, 1, 2, -1] * 6)) if masked else None
    queries = tf.constant(q)
    with tf.GradientTape() as tape:
        tape.watch(queries)
        contrast = info_nce(queries, tf.constant(k), tf.constant(d), 0.2, own and tuple(map(tf.constant, own)))
        value = tf.reduce_sum(contrast.loss)
    np.testing.assert_allclose(contrast.loss, naive(q, k, d, 0.2, own), rtol=1e-9)
    gradient, step = tape.gradient(value, queries).numpy(), 1e-6
    for i, c in ((0, 0), (2, 1), (4, 2)):  # by differences
        moved = q.copy()
        moved[i, c] += step
        slope = (sum(naive(moved, k, d, 0.2, own)) - sum(naive(q, k, d, 0.2, own))) / step
        assert gradient[i, c] == pytest.approx(slope, abs=1e-4)
    cosines = q @ d.T
    if masked:
        cosines = np.where((own[0][:, None] == own[1]) & (own[0][:, None] >= 0), np.nan, cosines)
    np.testing.assert_allclose(contrast.hardest, np.nanmax(cosines, axis=1), rtol=1e-9)
    np.testing.assert_allclose(contrast.negatives, np.nanmean(cosines, axis=1), rtol=1e-9)
    nearer = np.einsum("nc,npc->np", q, k) > np.nanmax(cosines, axis=1)[:, None]
    np.testing.assert_allclose(contrast.top1, nearer.mean(1))


def test_one_key_among_several_places_is_the_pair_bit_for_bit():
    q, k, d = (tf.constant(x, tf.float32) for x in (unit(5, 3), unit(5, 3, seed=1), unit(K, 3, seed=2)))
    pair, several = info_nce(q, k, d, 0.2), info_nce(q, k[:, None], d, 0.2)
    for a, b in zip(pair, several, strict=True):
        np.testing.assert_array_equal(a, b)
    nothing_masked = info_nce(q, k, d, 0.2, (tf.fill((5,), -1), tf.fill((K,), -1)))
    np.testing.assert_array_equal(nothing_masked.loss, pair.loss)


def test_a_query_whose_negatives_are_all_its_own_costs_nothing_and_has_no_gradient():
    q, k, d = (tf.constant(x, tf.float32) for x in (unit(2, 3), unit(2, 3, seed=1), unit(4, 3, seed=2)))
    with tf.GradientTape() as tape:
        tape.watch(q)
        loss = info_nce(q, k, d, 0.2, (tf.constant([7, 8]), tf.fill((4,), 7))).loss
    gradient = tape.gradient(loss, q).numpy()
    assert float(loss[0]) == 0 and float(loss[1]) > 0
    assert not gradient[0].any() and np.isfinite(gradient).all() and gradient[1].any()


def moco(**kwargs):
    keras.utils.set_random_seed(1)
    inputs = keras.Input((SIZE, SIZE, 3))
    x = layers.ReLU()(BatchNorm()(layers.Conv2D(6, 3, use_bias=False)(inputs)))
    backbone = keras.Model(inputs, layers.GlobalAveragePooling2D()(x))
    model = moco_tf.MoCo(backbone, **{"dim": 4, "queue_size": K, "momentum": 0.9, "bn_groups": 4, "seed": 3} | kwargs)
    model.compile(moco_tf.SGD(0.1, momentum=0.9, weight_decay=1e-3))
    return model


def batches(steps, views=4, seed=0):
    """Dicts as the trainer's: a query and its keys, and the ids of five things."""
    images = np.random.default_rng(seed).normal(size=(views, steps * BATCH, SIZE, SIZE, 3)).astype("float32")
    data = {"views": tuple(images), "id": np.arange(steps * BATCH, dtype="int64") % 5}
    return tf.data.Dataset.from_tensor_slices(data).batch(BATCH, drop_remainder=True)


KINDS = {
    "siblings": ({}, 4),
    "masked siblings": ({"mask_siblings": True}, 3),
    "symmetric": ({"symmetric": True}, 2),
    "symmetric siblings, masked": ({"symmetric": True, "mask_siblings": True}, 3),
}


ALL_AT_ONCE = "symmetric siblings, masked"


@pytest.fixture(params=[k if k == ALL_AT_ONCE else pytest.param(k, marks=pytest.mark.slow) for k in KINDS])
def kind(request):
    """Every day the one that has all of what the others have."""
    return KINDS[request.param]


def test_all_keys_are_enqueued_view_by_view_with_their_ids():
    model = moco(mask_siblings=True, queue_size=40)
    model.fit(batches(1), verbose=0)
    assert int(model.queue.pointer) == 3 * BATCH
    expected = [*[0, 1, 2, 3, 4, 0, 1, 2] * 3, *[-1] * 16]
    assert model.queue.ids.numpy().tolist() == expected
    plain = moco(queue_size=40)
    plain.fit(batches(1), verbose=0)
    np.testing.assert_array_equal(plain.queue.keys, model.queue.keys)  # nothing was masked in the first step
    assert plain.queue.ids is None


def test_a_pair_as_a_dict_learns_what_the_tuple_does_bit_for_bit():
    one, other = moco(), moco()
    one.fit(batches(3, views=2), verbose=0)
    other.fit(batches(3, views=2).map(lambda batch: batch["views"]), verbose=0)
    for a, b in zip(one.variables, other.variables, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("number", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_replicas_do_what_one_device_does_and_hold_the_same_bits(kind, number):
    settings, views = kind
    alone = moco(**settings)
    alone.fit(batches(4, views), verbose=0)
    with replicas.on_one_cpu(number).scope():
        model = moco(**settings)
    model.fit(batches(4, views), verbose=0)
    for a, b in zip(alone.variables, model.variables, strict=True):
        if a is not alone.totals:
            np.testing.assert_allclose(a, b.numpy(), rtol=2e-4, atol=2e-5, err_msg=a.path)
        copies = [copy.numpy() for copy in getattr(b.value, "values", [b.value])]
        assert all(np.array_equal(copies[0], copy) for copy in copies[1:]), b.path


def test_a_checkpoint_goes_on_as_if_nothing_had_happened(kind, tmp_path):
    settings, views = kind
    whole, first, second = (moco(**settings) for _ in range(3))
    whole.fit(batches(4, views), verbose=0)
    first.fit(batches(4, views).take(2), verbose=0)
    Checkpoints(tmp_path, first).save()
    Checkpoints(tmp_path, second).restore_last()
    second.fit(batches(4, views).skip(2), verbose=0)
    for a, b in zip(whole.variables, second.variables, strict=True):
        if a is not whole.totals:  # `fit` begins them anew
            np.testing.assert_array_equal(a, b, err_msg=a.path)


@pytest.mark.parametrize("precision", ["mixed_bfloat16", "mixed_float16"])
def test_they_train_in_mixed_precision_with_queue_and_ids_in_their_own(kind, precision):
    keras.config.set_dtype_policy(precision)
    settings, views = kind
    model = moco(**settings)
    history = model.fit(batches(4, views), verbose=0).history
    assert np.isfinite(history["loss"]).all() and model.queue.keys.dtype == "float32"
    assert model.queue.ids is None or model.queue.ids.dtype == "int64"


def test_a_keras_file_keeps_what_is_masked(tmp_path):
    model = moco(mask_siblings=True, symmetric=True)
    model.fit(batches(2), verbose=0)
    model.save(tmp_path / "model.keras")
    again = keras.models.load_model(tmp_path / "model.keras")
    np.testing.assert_array_equal(model.queue.ids, again.queue.ids)
    for m in (model, again):
        m.fit(batches(1, seed=1), verbose=0)
    np.testing.assert_array_equal(model.queue.keys, again.queue.keys)


def test_a_tuple_of_three_is_refused_where_its_last_would_be_left_out():
    with pytest.raises(ValueError, match=r"got a tuple of three"):
        moco().fit(batches(1, views=3).map(lambda batch: batch["views"]), verbose=0)


def test_masks_need_ids_and_say_so():
    with pytest.raises(ValueError, match='need an "id"'):
        moco(mask_siblings=True).fit(batches(1).map(lambda batch: {"views": batch["views"]}), verbose=0)
