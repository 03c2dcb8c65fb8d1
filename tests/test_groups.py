"""Positives by what is one thing, records or labels: held against naive loops in float64, and exact on replicas."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from every_task import write
from test_several_keys import BATCH, batches, moco, unit
from test_views_on import FLAGS

from moco_tf import replicas
from moco_tf.checkpoint import Checkpoints
from moco_tf.methods.flags import LOSSES
from moco_tf.methods.losses import info_nce, of_groups
from moco_tf.train import main

T = 0.2


def negatives_of(i, others, different, d, things, of_rows):
    return [*others[different[i]], *d[(things[i] < 0) | (things[i] != of_rows)]]


def naive(form, q, own_keys, others, same, different, d, things, of_rows, from_dictionary):
    """The loss of each query by loops over lists of positives and negatives."""
    losses = []
    for i, query in enumerate(q):
        positives = [*own_keys[i], *others[same[i]]]
        if from_dictionary and things[i] >= 0:
            positives += [*d[things[i] == of_rows]]
        weights = [np.exp(query @ p / T) for p in positives]
        rest = sum(np.exp(query @ n / T) for n in negatives_of(i, others, different, d, things, of_rows))
        losses.append(
            {
                "infonce": np.mean([-np.log(w / (w + rest)) for w in weights]),
                "supcon": np.mean([-np.log(w / (sum(weights) + rest)) for w in weights]),
                "supcon_in": -np.log(sum(weights) / (sum(weights) + rest)),
            }[form]
        )
    return losses


def case():
    """Queries, their keys, others with masks, and a dictionary with what its rows are of."""
    q, own_keys, others, d = unit(5, 3), unit(5, 2, 3, seed=1), unit(6, 3, seed=2), unit(24, 3, seed=3)
    things, of_others = np.array([0, 1, 1, -1, 9]), np.array([0, 1, 1, -1, 9, 1])
    same = (things[:, None] == of_others) & (things[:, None] >= 0)
    itself = np.eye(5, 6, dtype=bool)
    return q, own_keys, others, same & ~itself, ~same & ~itself, d, things, np.array([0, 1, 2, -1] * 6)


@pytest.mark.parametrize("from_dictionary", [False, True])
@pytest.mark.parametrize("form", LOSSES)
def test_each_loss_is_that_of_loops_and_its_gradient_a_numeric_one(form, from_dictionary):
    q, *rest = case()
    _, _, different, d, things, of_rows = rest[-6:]
    queries, *constants = (tf.constant(x) for x in (q, *rest[:5]))
    with tf.GradientTape() as tape:
        tape.watch(queries)
        own = (tf.constant(things), tf.constant(of_rows))
        found = of_groups(form, queries, *constants, T, own, from_dictionary)
        value = tf.reduce_sum(found.loss)
    np.testing.assert_allclose(found.loss, naive(form, q, *rest, from_dictionary), rtol=1e-9)
    gradient, step = tape.gradient(value, queries).numpy(), 1e-6
    for place in np.ndindex(*q.shape):
        ends = []
        for sign in (1, -1):
            moved = q.copy()
            moved[place] += sign * step
            ends.append(sum(naive(form, moved, *rest, from_dictionary)))
        assert gradient[place] == pytest.approx((ends[0] - ends[1]) / (2 * step), abs=1e-7)
    cosines = [[q[i] @ n for n in negatives_of(i, rest[1], different, d, things, of_rows)] for i in range(5)]
    np.testing.assert_allclose(found.hardest, [max(each) for each in cosines], rtol=1e-9)
    np.testing.assert_allclose(found.negatives, [np.mean(each) for each in cosines], rtol=1e-9)


def test_with_one_positive_all_are_infonce_bit_for_bit():
    q, k, d = (tf.constant(x, tf.float32) for x in (unit(5, 3), unit(5, 3, seed=1), unit(24, 3, seed=2)))
    nothing = tf.zeros((5, 5), tf.bool)
    own = (tf.range(5), tf.fill((24,), -1))
    for form in LOSSES:
        with tf.GradientTape(persistent=True) as tape:
            tape.watch(q)
            expected = info_nce(q, k, d, T, own).loss
            found = of_groups(form, q, k[:, None], k, nothing, nothing, d, T, own, True).loss
        np.testing.assert_array_equal(found, expected)
        np.testing.assert_allclose(tape.gradient(found, q), tape.gradient(expected, q), rtol=1e-5, atol=1e-6)


def test_copies_of_one_key_get_the_gradient_of_the_closed_form():
    """supcon: (softmax_p - 1 / P) q / T on each positive; supcon_in: softmax_p (1 - 1 / S) q / T, S their share."""
    q, k, d = unit(1, 3), np.repeat(unit(1, 1, 3, seed=1), 3, axis=1), unit(4, 3, seed=2)
    weights = np.exp(np.array([*(q @ k[0].T)[0], *(q @ d.T)[0]]) / T)
    softmax, share = weights / weights.sum(), weights[:3].sum() / weights.sum()
    none, own = tf.zeros((1, 1), tf.bool), (tf.constant([0]), tf.fill((4,), 1))
    for form, factor in (("supcon", softmax[0] - 1 / 3), ("supcon_in", softmax[0] * (1 - 1 / share))):
        keys, constants = tf.constant(k), (tf.constant(k[0, :1]), none, none, tf.constant(d))
        with tf.GradientTape() as tape:
            tape.watch(keys)
            loss = of_groups(form, tf.constant(q), keys, *constants, T, own, False).loss
        np.testing.assert_allclose(tape.gradient(loss, keys)[0], np.tile(factor / T * q, (3, 1)), rtol=1e-7)


def test_a_query_without_negatives_costs_nothing_and_has_a_finite_gradient():
    q, d = tf.constant(unit(2, 3)), tf.constant(unit(4, 3, seed=2))
    none, own = tf.zeros((2, 2), tf.bool), (tf.constant([7, 8]), tf.fill((4,), 7))
    with tf.GradientTape() as tape:
        tape.watch(q)
        loss = of_groups("supcon_in", q, q[:, None] + 0.0, q + 0.0, none, none, d, T, own, True).loss
    assert float(loss[0]) == 0 and float(loss[1]) > 0 and np.isfinite(tape.gradient(loss, q)).all()


SETTINGS = {
    "symmetric, of batch and queue": {"positives_from": "batch_and_queue", "loss": "supcon", "symmetric": True},
    "of the batch": {"positives_from": "batch"},
}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_a_query_looks_for_all_keys_of_its_thing_but_its_own_view(settings):
    model = moco(temperature=T, **settings)
    model.fit(batches(1, views=3), verbose=0)  # so that the queue has ids
    batch = next(iter(batches(1, views=3, seed=1)))
    context = model.prepare(batch)
    things, losses = batch["id"].numpy(), []
    for place in range(3) if model.symmetric else [0]:
        q = model.query_encoder(batch["views"][place], training=True)["projection"].numpy()
        q /= np.linalg.norm(q, axis=1, keepdims=True)
        own_keys = np.stack([key for other, key in context.items() if other != place], axis=1)
        others = np.concatenate([key.numpy() for key in context.values()])
        same = np.tile((things[:, None] == things) & ~np.eye(BATCH, dtype=bool), len(context))
        different = np.tile(things[:, None] != things, len(context))
        of_queue = model.queue.keys.numpy(), things, model.queue.ids.numpy()
        rest = (model.loss_of_several, q, own_keys, others, same, different, *of_queue)
        losses.append(np.mean(naive(*rest, model.positives_from == "batch_and_queue")))
    assert np.mean(model.objective(batch, context).loss) == pytest.approx(sum(losses), rel=1e-4)


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_replicas_do_what_one_device_does_and_a_checkpoint_goes_on_bit_for_bit(settings, tmp_path):
    whole, first, second = (moco(**settings) for _ in range(3))
    whole.fit(batches(4, 3), verbose=0)
    first.fit(batches(4, 3).take(2), verbose=0)
    Checkpoints(tmp_path, first).save()
    Checkpoints(tmp_path, second).restore_last()
    second.fit(batches(4, 3).skip(2), verbose=0)
    with replicas.on_one_cpu(2).scope():
        several = moco(**settings)
    several.fit(batches(4, 3), verbose=0)
    for a, b, c in zip(whole.variables, second.variables, several.variables, strict=True):
        if a is not whole.totals:  # `fit` begins them anew
            np.testing.assert_array_equal(a, b, err_msg=a.path)
            np.testing.assert_allclose(a, c.numpy(), rtol=2e-4, atol=2e-5, err_msg=a.path)
        copies = [copy.numpy() for copy in getattr(c.value, "values", [c.value])]
        assert all(np.array_equal(copies[0], copy) for copy in copies[1:]), c.path


def test_a_keras_file_keeps_what_is_one_thing(tmp_path):
    model = moco(positives_from="batch", loss="supcon_in", thing_of="label")
    model.save(tmp_path / "model.keras")
    again = keras.models.load_model(tmp_path / "model.keras")
    assert (again.positives_from, again.loss_of_several, again.thing_of) == ("batch", "supcon_in", "label")


def test_a_run_with_labels_keeps_labels_beside_its_keys(tmp_path):
    """That it goes on bit for bit: tests/test_every_task.py."""
    for name in ("cat", "dog"):
        write(tmp_path / "data/train" / name, 12)
    assert main([f"--dataset={tmp_path / 'data'}", *FLAGS, "--pretext=labels", f"--run_dir={tmp_path / 'run'}"]) == 0
    found = tf.train.load_checkpoint(tmp_path / "run/checkpoints/step-000000003/state")
    (ids,) = [found.get_tensor(n) for n in found.get_variable_to_shape_map() if "queue/ids" in n]
    assert set(ids.tolist()) == {0, 1}  # labels, not records


def test_images_without_labels_are_refused(tmp_path, capsys):
    write(tmp_path / "data/train", 8)
    flags = [f"--dataset={tmp_path / 'data'}", *FLAGS, "--pretext=labels", f"--run_dir={tmp_path / 'run'}"]
    assert main(flags) == 2
    assert "has no labels" in capsys.readouterr().err


def test_wrong_settings_are_refused():
    with pytest.raises(ValueError, match="MoCo takes positives_from keys, batch, batch_and_queue and loss infonce"):
        moco(loss="nce")
    pairs = batches(1).map(lambda batch: {"views": batch["views"]})
    with pytest.raises(ValueError, match='need an "id"'):
        moco(positives_from="batch").fit(pairs, verbose=0)
