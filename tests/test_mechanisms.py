"""`EndToEnd` and `MemoryBank` as Keras models: what a step does, where gradients go, saving, precision, refusals."""

import dataclasses

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

import moco_tf
from moco_tf.checkpoint import Checkpoints
from moco_tf.data import augment, sources
from moco_tf.data import views as views_lib
from moco_tf.encoders import BatchNorm

SIZE, BATCH, RECORDS = 8, 4, 12


def tiny():
    inputs = keras.Input((SIZE, SIZE, 3))
    x = layers.ReLU()(BatchNorm()(layers.Conv2D(6, 3, use_bias=False)(inputs)))
    return keras.Model(inputs, layers.GlobalAveragePooling2D()(x))


def compiled(model):
    model.compile(moco_tf.SGD(0.1, momentum=0.9, weight_decay=1e-3))
    return model


def end_to_end(**kwargs):
    keras.utils.set_random_seed(1)
    return compiled(moco_tf.EndToEnd(tiny(), **{"dim": 4, "temperature": 0.2} | kwargs))


def memory_bank(**kwargs):
    keras.utils.set_random_seed(1)
    settings = {"records": RECORDS, "dim": 4, "queue_size": 5, "temperature": 0.2} | kwargs
    return compiled(moco_tf.MemoryBank(tiny(), **settings))


def views(steps=3, seed=0, batch=BATCH):
    both = np.random.default_rng(seed).normal(size=(2, steps * batch, SIZE, SIZE, 3)).astype("float32")
    return tf.data.Dataset.from_tensor_slices(tuple(both)).batch(batch, drop_remainder=True)


def numbered(steps=3, seed=0, batch=BATCH):
    numbers = np.arange(steps * batch, dtype="int64") * 5 % RECORDS
    images = views(steps, seed, batch).unbatch().map(lambda query, key: query)
    both = tf.data.Dataset.zip(images, tf.data.Dataset.from_tensor_slices(numbers))
    return both.batch(batch, drop_remainder=True)


MODELS = {  # how each is made, and what it trains on
    "one encoder": (end_to_end, views),
    "one trunk": (lambda **kwargs: end_to_end(**{"shared": "trunk", "head": "mlp", "hidden_dim": 5} | kwargs), views),
    "two encoders": (lambda **kwargs: end_to_end(**{"shared": "none", "bn_groups": 2} | kwargs), views),
    "SimCLR": (lambda **kwargs: end_to_end(**{"loss": "nt_xent", "head": "mlp", "hidden_dim": 5} | kwargs), views),
    "memory bank": (memory_bank, numbered),
    "memory bank, NCE": (lambda **kwargs: memory_bank(**{"loss": "nce", "bn_groups": 2} | kwargs), numbered),
}
# Every day those that have a part more than another.
SIMPLER = ("one encoder", "memory bank")
each_model = pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=pytest.mark.slow) if kind in SIMPLER else kind for kind in MODELS]
)


def values(model):
    return [v.numpy() for v in [*model.variables, *model.optimizer.variables]]


def assert_same(a, b):
    assert len(a) == len(b)
    for x, y in zip(a, b, strict=True):
        np.testing.assert_array_equal(x, y)


def embed(encoder, images):
    x = encoder(images, training=True)["projection"].numpy()
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def log_softmax(logits, place):
    return np.log(np.exp(logits).sum()) - logits[place]


@each_model
def test_a_keras_file_goes_on_as_if_nothing_had_happened(tmp_path, kind):
    make, data = MODELS[kind]
    model = make()
    model.fit(data(4), verbose=0)
    model.save(tmp_path / "m.keras")
    loaded = keras.models.load_model(tmp_path / "m.keras")
    assert_same(values(model), values(loaded))
    for m in (model, loaded):
        m.fit(data(4, seed=1), verbose=0)
    assert_same(values(model), values(loaded))
    assert int(loaded.step) == 8


@each_model
def test_a_checkpoint_goes_on_as_if_nothing_had_happened(tmp_path, kind):
    make, data = MODELS[kind]
    whole, first, second = make(), make(), make()
    whole.fit(data(4), verbose=0)
    first.fit(data(4).take(2), verbose=0)
    Checkpoints(tmp_path, first).save()
    assert Checkpoints(tmp_path, second).restore_last() == 2
    second.fit(data(4).skip(2), verbose=0)
    whole.totals.assign(second.totals)  # `fit` begins them anew
    assert_same(values(whole), values(second))


@each_model
def test_evaluation_changes_no_weights(kind):
    make, data = MODELS[kind]
    model = make()
    model.fit(data(), verbose=0)
    weights = [v for v in model.weights if v is not model.totals]
    before = [v.numpy() for v in weights]
    for batches in (data(seed=5), views(seed=5)):  # a bank is evaluated on pairs as well
        logs = model.evaluate(batches, return_dict=True, verbose=0)
        assert np.isfinite(logs["loss"]) and "contrast_top1" in logs
    assert_same(before, [v.numpy() for v in weights])


PRECISIONS = {"two encoders": "mixed_float16", "SimCLR": "float64", "memory bank, NCE": "mixed_bfloat16"}


@pytest.mark.parametrize(
    "kind, precision",  # every day each once
    [
        pytest.param(kind, precision, marks=() if PRECISIONS[kind] == precision else pytest.mark.slow)
        for kind in PRECISIONS
        for precision in PRECISIONS.values()
    ],
)
def test_other_precisions_train(kind, precision):
    if precision == "float64":
        keras.config.set_floatx("float64")
    keras.config.set_dtype_policy(precision)
    make, data = MODELS[kind]
    model = make()
    assert np.isfinite(model.fit(data(), verbose=0).history["loss"][0])
    assert {v.dtype for v in model.weights} <= {"float32", "float64", "int64"}


@pytest.mark.parametrize("shared", ["encoder", "trunk", "none"])
def test_queries_look_for_their_keys_among_those_of_the_batch(shared):
    model = end_to_end(shared=shared)
    ((query, key),) = views(1)
    q, k = embed(model.query_encoder, query), embed(model.key_encoder, key)
    expected = np.mean([log_softmax(q[i] @ k.T / 0.2, i) for i in range(BATCH)])
    assert model.fit(views(1), verbose=0).history["loss"][0] == pytest.approx(expected, rel=1e-5)


def test_nt_xent_lets_each_view_look_for_its_partner_among_all_others():
    model = end_to_end(loss="nt_xent")
    ((query, key),) = views(1)
    z = np.concatenate([embed(model.query_encoder, query), embed(model.query_encoder, key)])
    losses = []
    for i in range(2 * BATCH):
        others = [j for j in range(2 * BATCH) if j != i]
        losses.append(log_softmax(z[others] @ z[i] / 0.2, others.index((i + BATCH) % (2 * BATCH))))
    logs = model.fit(views(1), verbose=0).history
    assert logs["loss"][0] == pytest.approx(np.mean(losses), rel=1e-5)
    cosines = [z[i] @ z[(i + BATCH) % (2 * BATCH)] for i in range(2 * BATCH)]
    assert logs["positive_similarity"][0] == pytest.approx(np.mean(cosines), rel=1e-4)


def test_what_is_shared_is_there_once_and_gradients_reach_all_of_it():
    counts = {shared: len(end_to_end(shared=shared).trainable_variables) for shared in ("encoder", "trunk", "none")}
    one, head = len(end_to_end().query_encoder.trainable_variables), 2
    assert counts == {"encoder": one, "trunk": one + head, "none": 2 * one}
    model = end_to_end(shared="none")
    assert_same(model.query_encoder.get_weights(), model.key_encoder.get_weights())
    before = [v.numpy() for v in model.trainable_variables]
    model.optimizer.weight_decay = 0.0
    model.fit(views(1), verbose=0)
    assert all(not np.array_equal(v.numpy(), old) for v, old in zip(model.trainable_variables, before, strict=True))


@pytest.mark.parametrize("loss", ["infonce", "nt_xent"])
def test_gradients_come_back_through_the_shuffle(loss):
    """In each key's own order with BN over the whole batch, a shuffle changes nothing; so it must with one group."""
    ((query, key),) = views(1, batch=8)

    def gradients(shuffled):
        model = end_to_end(shared="none", loss=loss)
        permutation = tf.constant([3, 0, 7, 5, 1, 2, 6, 4]) if shuffled else None
        context = (key if permutation is None else tf.gather(key, permutation)), permutation
        with tf.GradientTape() as tape:
            value = tf.reduce_mean(model.objective({"views": (query, key)}, context).loss)
        return [value, *tape.gradient(value, model.trainable_variables)]

    for plain, through in zip(gradients(False), gradients(True), strict=True):
        np.testing.assert_allclose(plain, through, atol=1e-5)


@pytest.mark.parametrize("loss", ["infonce", "nce"])
def test_keys_and_negatives_are_the_banks_of_before_and_the_queries_enter_it_afterwards(loss):
    model = memory_bank(loss=loss)
    ((images, numbers),) = numbered(1)
    bank, q = model.bank.keys.numpy(), embed(model.query_encoder, images)
    drawn = model._draw(numbers).numpy()
    keys = bank[numbers.numpy()]
    if loss == "infonce":
        logits = np.concatenate([(q * keys).sum(1, keepdims=True), q @ drawn.T], axis=1) / 0.2
        expected = np.mean([log_softmax(row, 0) for row in logits])
    else:
        z = RECORDS * np.exp(q @ drawn.T / 0.2).mean()
        p = [np.exp(x / 0.2) / z for x in ((q * keys).sum(1), q @ drawn.T)]
        of_key, of_noise = (x / (x + 5 / RECORDS) for x in p)
        expected = np.mean(-np.log(of_key) - np.log(1 - of_noise).sum(1))
    history = model.fit(numbered(1), verbose=0).history
    assert history["loss"][0] == pytest.approx(expected, rel=1e-5)
    if loss == "nce":
        assert float(model.log_z) == pytest.approx(np.log(z), rel=1e-5)
    moved = 0.5 * keys + 0.5 * q
    bank[numbers.numpy()] = moved / np.linalg.norm(moved, axis=1, keepdims=True)
    np.testing.assert_allclose(model.bank.keys.numpy(), bank, atol=1e-6)


def test_nces_normaliser_stays_what_the_first_batch_had():
    model = memory_bank(loss="nce")
    model.fit(numbered(1), verbose=0)
    first = float(model.log_z)
    model.fit(numbered(3, seed=1), verbose=0)
    assert float(model.log_z) == first != 0


def test_a_batch_holds_the_ids_of_its_records_and_as_many_views_as_are_wanted():
    flips = augment.View(steps=("flip",))  # quick
    source, task = sources.embedded("test"), dataclasses.replace(augment.cifar(SIZE), query=flips, key=flips)
    whole, one = (list(views_lib.batches(source, task, 6, seed=2, step=4, most=most).take(2)) for most in (None, 1))
    records = list(source.shuffled(seed=2, start=24, per_epoch=source.size // 6 * 6).take(12))
    for place, (batch, first) in enumerate(zip(whole, one, strict=True)):
        assert len(batch["views"]) == 2 and len(first["views"]) == 1
        np.testing.assert_array_equal(batch["views"][0], first["views"][0])
        assert first["id"].numpy().tolist() == [int(r["id"]) for _, r in records[6 * place : 6 * place + 6]]


@pytest.mark.parametrize(
    "data, got",
    [(lambda: views(), r"float32 \(4, 8, 8, 3\) beside"), (lambda: views().map(lambda q, k: q), "images alone")],
)
def test_a_bank_refuses_batches_without_numbers_and_says_where_to_get_them(data, got):
    with pytest.raises(ValueError, match=f"number of its record.*0 to 11.*got {got}"):
        memory_bank().fit(data(), verbose=0)


def test_more_negatives_than_there_are_others_are_refused():
    with pytest.raises(ValueError, match="queue_size is at most 8 with 12 records and 4 images a batch; got 9"):
        memory_bank(queue_size=9).fit(numbered(), verbose=0)
    memory_bank(queue_size=9, loss="nce").fit(numbered(1), verbose=0)  # noise may come twice


def test_a_number_beyond_the_bank_is_refused():
    beyond = numbered(1).map(lambda images, numbers: (images, numbers + RECORDS))
    with pytest.raises(tf.errors.InvalidArgumentError):
        memory_bank().fit(beyond, verbose=0)


@pytest.mark.parametrize("make", [lambda: end_to_end(shared="heads"), lambda: memory_bank(loss="softmax")])
def test_unknown_choices_are_refused(make):
    with pytest.raises(ValueError, match=r"(shared='heads'|loss='softmax')"):
        make()
