"""What every method is held to: true gradients, to go on bit for bit, and that replicas do what one device does."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from moco_tf import replicas
from moco_tf.checkpoint import Checkpoints


def assert_numeric(gradient, variable, value, step, **close):
    """A gradient agrees with the difference of value() around a variable, in one random direction; step: its size."""
    direction, kept, ends = np.random.default_rng(0).normal(size=variable.shape) * step, variable.numpy(), []
    for sign in (1, -1):
        variable.assign(kept + sign * direction)
        ends.append(float(value()))
    variable.assign(kept)
    slope = np.sum(tf.convert_to_tensor(gradient) * direction)
    assert (ends[0] - ends[1]) / 2 == pytest.approx(slope, **close), variable.path


def assert_goes_on(make, batches, folder):
    """Four steps are two, a checkpoint or a `.keras` file, and two more; make() -> model, batches(model, steps)."""
    whole, second = make(), make()

    def save(batch, logs):
        if batch == 1:
            whole.save(folder / "half.keras")
            Checkpoints(folder / "checkpoints", whole).save()

    saves = keras.callbacks.LambdaCallback(on_train_batch_end=save)
    whole.fit(batches(whole, 4), verbose=0, callbacks=[saves])
    Checkpoints(folder / "checkpoints", second).restore_last()
    for model in (second, keras.models.load_model(folder / "half.keras")):
        model.fit(batches(model, 4).skip(2), verbose=0)
        for a, b in zip(whole.variables, model.variables, strict=True):
            if a is not whole.totals:  # `fit` begins them anew
                np.testing.assert_array_equal(a, b, err_msg=a.path)


def assert_replicas_begin_alike(make, batches, atol=2e-5):
    """One step has the loss of one device and leaves its weights, but for rounding, the same bits on both replicas."""
    with replicas.on_one_cpu(2).scope():
        several = make()
    one, losses = make(), []
    for model in (one, several):
        losses.append(model.fit(batches(model, 1), verbose=0).history["loss"][0])
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    for variable, of_one in zip(several.variables, one.variables, strict=True):
        np.testing.assert_allclose(variable.numpy(), of_one.numpy(), rtol=1e-3, atol=atol, err_msg=variable.path)
        copies = [copy.numpy() for copy in getattr(variable.value, "values", [variable.value])]
        assert all(np.array_equal(copies[0], copy) for copy in copies[1:]), variable.path
