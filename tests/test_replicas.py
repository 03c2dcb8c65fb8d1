"""Several replicas: they hold the same bits, and together do what the paper says and what one device does."""

import collections
import functools

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

import moco_tf
import moco_tf.replicas
from moco_tf.data import augment, sources
from moco_tf.data.views import batches
from moco_tf.encoders import BatchNorm

SIZE, BATCH = 8, 16


@functools.cache
def mirrored(number=2):
    return moco_tf.replicas.on_one_cpu(number)


@pytest.fixture(params=[2, pytest.param(4, marks=pytest.mark.slow)])
def strategy(request):
    return mirrored(request.param)


def moco(**kwargs):
    keras.utils.set_random_seed(1)
    inputs = keras.Input((SIZE, SIZE, 3))
    x = layers.ReLU()(BatchNorm()(layers.Conv2D(6, 3, use_bias=False)(inputs)))
    backbone = keras.Model(inputs, layers.GlobalAveragePooling2D()(x))
    settings = {"dim": 4, "head": "linear", "queue_size": 40, "momentum": 0.9, "temperature": 0.2, "seed": 3} | kwargs
    model = moco_tf.MoCo(backbone, **settings)
    model.compile(moco_tf.SGD(0.1, momentum=0.9, weight_decay=1e-3))
    return model


def views(steps, seed=0):
    shape = (steps * BATCH, SIZE, SIZE, 3)
    query, key = np.random.default_rng(seed).normal(size=(2, *shape)).astype("float32")
    return tf.data.Dataset.from_tensor_slices((query, key)).batch(BATCH, drop_remainder=True)


def train(strategy, steps, **kwargs):
    """The model after these steps, and the loss of each."""
    means = []
    note = keras.callbacks.LambdaCallback(on_train_batch_end=lambda batch, logs: means.append(logs["loss"]))
    with strategy.scope():
        model = moco(**kwargs)
    model.fit(views(steps), callbacks=[note], verbose=0, shuffle=False)
    return model, np.diff(np.array(means) * np.arange(1, steps + 1), prepend=0.0)


@pytest.mark.parametrize("precision", ["float32", pytest.param("mixed_bfloat16", marks=pytest.mark.slow)])
def test_all_replicas_hold_the_same_bits_after_20_steps(strategy, precision):
    keras.config.set_dtype_policy(precision)
    model, _ = train(strategy, steps=20)
    variables = [*model.variables, *model.optimizer.variables]
    assert {"queue/keys", "queue/pointer"} <= {v.path for v in variables}
    for variable in variables:
        first, *others = (part.numpy() for part in variable.value.values)
        assert len(others) == strategy.num_replicas_in_sync - 1
        assert all(first.tobytes() == other.tobytes() for other in others), variable.path
    assert model.queue.pointer.numpy() == 20 * BATCH % 40


def test_the_keys_are_those_of_a_plain_simulation_of_the_papers_shuffle(strategy):
    with strategy.scope():
        model = moco()
    kernel, weight, bias = (v.numpy() for v in model.key_encoder.weights if v.name in ("kernel", "bias"))
    ((_, key),) = views(1)
    key = key.numpy()

    def encode(images):  # what one GPU does, its BatchNorm seeing these images alone
        x = tf.nn.conv2d(images, kernel, 1, "VALID").numpy().astype("float64")
        x = (x - x.mean((0, 1, 2))) / np.sqrt(x.var((0, 1, 2)) + 1e-5)
        x = np.maximum(x, 0).mean((1, 2)) @ weight + bias
        return x / np.linalg.norm(x, axis=1, keepdims=True)

    order = np.argsort(tf.random.stateless_uniform([BATCH], (3, 0), None, None, tf.int32, alg="philox"))
    assert (order != np.arange(BATCH)).any()
    parts = strategy.num_replicas_in_sync
    expected = np.empty((BATCH, 4))
    expected[order] = np.concatenate([encode(part) for part in np.split(key[order], parts)])
    model.fit(views(1), verbose=0)
    np.testing.assert_allclose(model.queue.keys.numpy()[:BATCH], expected, atol=1e-5)
    assert np.abs(expected - np.concatenate([encode(part) for part in np.split(key, parts)])).max() > 1e-3


def test_no_gradient_reaches_the_key_encoder(strategy):
    with strategy.scope():
        model = moco(momentum=1.0)  # the momentum update moves nothing, so only a gradient could
    before = [v.numpy() for v in model.key_encoder.weights if "moving" not in v.name]
    model.fit(views(3), verbose=0)
    after = [v.numpy() for v in model.key_encoder.weights if "moving" not in v.name]
    assert all(np.array_equal(a, b) for a, b in zip(before, after, strict=True))


@pytest.mark.parametrize(
    "strategy, shuffle_bn",
    [(4, True), *(pytest.param(*case, marks=pytest.mark.slow) for case in ((2, True), (2, False), (4, False)))],
    indirect=["strategy"],
)
def test_replicas_do_what_as_many_bn_groups_do_on_one_device(strategy, shuffle_bn):
    settings = {"bn_groups": 4, "shuffle_bn": shuffle_bn}
    one, one_losses = train(tf.distribute.get_strategy(), 12, **settings)
    several, losses = train(strategy, 12, **settings)
    assert abs(losses[0] - one_losses[0]) < 1e-5
    assert np.abs(losses - one_losses).max() < 1e-3
    for a, b in zip(one.weights, several.weights, strict=True):  # statistics and diagnostics as well
        np.testing.assert_allclose(a.numpy(), b.numpy(), rtol=1e-3, atol=1e-3, err_msg=a.path)


def test_a_step_gathers_images_and_keys_and_reduces_statistics_and_gradients_once_each(strategy, monkeypatch):
    calls = []

    def counted(name):
        original = getattr(tf.distribute.ReplicaContext, name)

        def call(self, *args, **kwargs):
            calls.append(name)
            return original(self, *args, **kwargs)

        monkeypatch.setattr(tf.distribute.ReplicaContext, name, call)

    counted("all_gather"), counted("all_reduce")
    with strategy.scope():
        model = moco()
    model.fit(views(1), verbose=0)
    number = strategy.num_replicas_in_sync
    assert collections.Counter(calls) == {"all_gather": 2 * number, "all_reduce": 2 * number}


@pytest.mark.parametrize(
    "parts", [((1, 4), (2, 4)), pytest.param(((1, 2), (2, 2), (2, 8), (4, 4)), marks=pytest.mark.slow)]
)
def test_the_global_batch_does_not_depend_on_replicas_or_workers(parts):
    source, task = sources.embedded("test"), augment.cifar()
    whole = list(batches(source, task, 8, seed=5, step=249).take(3))  # over an epoch's end
    for workers, replicas in parts:
        shares = [
            list(batches(source, task, 8, 5, 249, replicas, (worker, workers)).take(3 * replicas // workers))
            for worker in range(workers)
        ]
        for step, expected in enumerate(whole):
            here = replicas // workers
            dealt = [share[step * here + i] for share in shares for i in range(here)]
            for view in (0, 1):
                np.testing.assert_array_equal(
                    np.concatenate([part["views"][view] for part in dealt]), expected["views"][view]
                )


def test_groups_that_the_replicas_cannot_share_are_refused(strategy):
    rule = f"multiple of the {strategy.num_replicas_in_sync} replicas; got 3"
    with strategy.scope(), pytest.raises(ValueError, match=rule):
        moco(bn_groups=3)


def test_evaluate_and_predict_work_under_a_strategy(strategy):
    with strategy.scope():
        model = moco()
    alone = moco()
    for metric, value in model.evaluate(views(2), return_dict=True, verbose=0).items():
        assert value == pytest.approx(alone.evaluate(views(2), return_dict=True, verbose=0)[metric], abs=1e-5)
    images = np.random.default_rng(0).integers(0, 256, (2 * BATCH, 11, 9, 3), "uint8")
    expected = alone.predict(images, batch_size=BATCH, verbose=0)
    np.testing.assert_allclose(model.predict(images, batch_size=BATCH, verbose=0), expected, atol=1e-5)
