"""End-to-end and memory bank on several replicas: they hold the same bits, and do what one device does."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from test_mechanisms import MODELS
from test_replicas import BATCH, SIZE, mirrored

import moco_tf

STEPS, RECORDS = 6, 50


def batches(numbered):
    rng = np.random.default_rng(0)
    views = rng.normal(size=(2, STEPS * BATCH, SIZE, SIZE, 3)).astype("float32")
    views += 3 * rng.normal(size=(STEPS * BATCH, 1, 1, 3)).astype("float32")  # there is something to find
    # As an epoch has them: no record twice in a step.
    numbers = np.concatenate([rng.permutation(RECORDS)[:BATCH] for _ in range(STEPS)])
    data = (views[0], numbers) if numbered else tuple(views)
    return tf.data.Dataset.from_tensor_slices(data).batch(BATCH, drop_remainder=True)


def train(strategy, kind):
    """The model after some steps, and the loss of each."""
    means = []
    note = keras.callbacks.LambdaCallback(on_train_batch_end=lambda batch, logs: means.append(logs["loss"]))
    make = MODELS[kind][0]
    settings = {"records": RECORDS, "queue_size": 20} if "bank" in kind else {}
    with strategy.scope():
        model = make(bn_groups=4, **settings)  # with as many on one device
        model.compile(moco_tf.SGD(0.1, momentum=0.9, weight_decay=1e-3))
    model.fit(batches("bank" in kind), callbacks=[note], verbose=0, shuffle=False)
    return model, np.diff(np.array(means) * np.arange(1, STEPS + 1), prepend=0.0)


@pytest.mark.parametrize("kind", ["two encoders", "SimCLR", "memory bank", "memory bank, NCE"])
def test_replicas_do_what_one_device_does_and_hold_the_same_bits(kind):
    one, one_losses = train(tf.distribute.get_strategy(), kind)
    assert np.ptp(one_losses) > 0.1  # gradients matter
    several, losses = train(mirrored(), kind)
    print(f"deviation: first step {abs(losses[0] - one_losses[0]):.1e}, all {np.abs(losses - one_losses).max():.1e}")
    assert abs(losses[0] - one_losses[0]) < 1e-5
    assert np.abs(losses - one_losses).max() < 1e-3
    for a, b in zip(one.weights, several.weights, strict=True):  # statistics and bank as well
        if a is one.totals:
            continue  # of NCE's noise a key may be the query's own: a tie, which rounding breaks
        np.testing.assert_allclose(a.numpy(), b.numpy(), rtol=1e-3, atol=1e-3, err_msg=a.path)
    for variable in (*several.variables, *several.optimizer.variables):
        first, *others = (part.numpy() for part in variable.value.values)
        assert all(first.tobytes() == other.tobytes() for other in others), variable.path
