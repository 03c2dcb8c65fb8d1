"""MoCo v3 on several replicas does what one device does with the whole batch, BatchNorm included."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers
from test_replicas import BATCH, SIZE, mirrored, views

import moco_tf
from moco_tf.encoders import BatchNorm

STEPS = 12


def convolution():
    inputs = keras.Input((SIZE, SIZE, 3))
    x = layers.ReLU()(BatchNorm()(layers.Conv2D(6, 3, use_bias=False)(inputs)))
    return keras.Model(inputs, layers.GlobalAveragePooling2D()(x))


def transformer():
    return moco_tf.encoders.vit.vit(8, 1, 2, image_size=SIZE, patch_size=4)


KINDS = {  # head: backbone, optimizer, settings
    "resnet": (convolution, lambda: moco_tf.LARS(0.5, weight_decay=1e-6), {}),
    "vit": (transformer, lambda: moco_tf.AdamW(1e-3, weight_decay=0.1), {"token_dropout": 0.5}),
}


def train(strategy, head):
    """The model after some steps, and the loss of each."""
    means = []
    note = keras.callbacks.LambdaCallback(on_train_batch_end=lambda batch, logs: means.append(logs["loss"]))
    keras.utils.set_random_seed(1)
    backbone, optimizer, settings = KINDS[head]
    settings = settings | {"head": head, "dim": 4, "hidden_dim": 8, "temperature": 0.2, "momentum_rise_steps": STEPS}
    with strategy.scope():
        model = moco_tf.MoCoV3(backbone(), **settings)
        model.compile(optimizer())
    model.fit(views(STEPS), callbacks=[note], verbose=0, shuffle=False)
    return model, np.diff(np.array(means) * np.arange(1, STEPS + 1), prepend=0.0)


@pytest.mark.parametrize("head", ["resnet", pytest.param("vit", marks=pytest.mark.slow)])
def test_replicas_do_what_one_device_does_and_hold_the_same_bits(head):
    _, one_losses = train(tf.distribute.get_strategy(), head)
    several, losses = train(mirrored(), head)
    print(f"deviation: first step {abs(losses[0] - one_losses[0]):.1e}, all {np.abs(losses - one_losses).max():.1e}")
    assert abs(losses[0] - one_losses[0]) < 1e-5
    assert np.abs(losses - one_losses).max() < 1e-3
    for variable in (*several.variables, *several.optimizer.variables):
        first, *others = (part.numpy() for part in variable.value.values)
        assert all(first.tobytes() == other.tobytes() for other in others), variable.path


@pytest.mark.parametrize("dtype, tolerance", [("float64", 1e-10), ("float32", 2e-4)])
def test_synchronized_batch_norm_is_that_of_the_whole_batch_outputs_statistics_and_gradients(dtype, tolerance):
    x = np.random.default_rng(0).normal(50.0, 3.0, size=(BATCH, 2, 3, 4)).astype(dtype)  # a mean far from 0
    weights = np.random.default_rng(1).normal(size=x.shape).astype(dtype)

    def step(layer, images, factors):
        with tf.GradientTape() as tape:
            tape.watch(images)
            outputs = layer(images, training=True)
            loss = tf.reduce_sum(factors * outputs**2)
        return outputs, *tape.gradient(loss, [images, layer.gamma.value])

    whole = BatchNorm(dtype=dtype)
    expected = step(whole, tf.constant(x), tf.constant(weights))
    strategy = mirrored()
    replicas = strategy.num_replicas_in_sync
    with strategy.scope():
        layer = BatchNorm(synchronized=True, dtype=dtype)
        layer.build(x.shape)
    parts = [
        strategy.experimental_distribute_values_from_function(
            lambda context, a=a: tf.constant(np.split(a, replicas)[context.replica_id_in_sync_group])
        )
        for a in (x, weights)
    ]
    found = tf.function(strategy.run, autograph=False)(lambda *part: step(layer, *part), parts)
    outputs, of_inputs, of_gain = (strategy.experimental_local_results(values) for values in found)
    np.testing.assert_allclose(np.concatenate(outputs), expected[0], atol=tolerance, rtol=tolerance)
    np.testing.assert_allclose(np.concatenate(of_inputs), expected[1], atol=10 * tolerance, rtol=10 * tolerance)
    np.testing.assert_allclose(sum(of_gain), expected[2], atol=100 * tolerance, rtol=100 * tolerance)
    for a, b in ((layer.moving_mean, whole.moving_mean), (layer.moving_variance, whole.moving_variance)):
        np.testing.assert_allclose(a.numpy(), b.numpy(), rtol=tolerance)
