import keras
import numpy as np
import pytest
import tensorflow as tf

from moco_tf.encoders import BatchNorm, batch_norm

X = np.random.default_rng(0).normal(2.0, 3.0, size=(8, 3, 5, 4))


def _naive(x, groups, momentum):
    """Outputs, and PyTorch's running statistics after one step from (5, 7), as the mean over the groups."""
    parts = np.split(x, groups)
    axes = tuple(range(x.ndim - 1))
    y = np.concatenate([(p - p.mean(axes)) / np.sqrt(p.var(axes) + 1e-5) for p in parts])
    mean = np.mean([p.mean(axes) for p in parts], axis=0)
    variance = np.mean([p.var(axes) * p[..., 0].size / (p[..., 0].size - 1) for p in parts], axis=0)
    return y, momentum * 5 + (1 - momentum) * mean, momentum * 7 + (1 - momentum) * variance


@pytest.mark.parametrize("shape", [(8, 3, 5, 4), (8, 60)], ids=["4-D", "2-D"])
@pytest.mark.parametrize("groups, momentum", [(1, 0.9), (2, 0.9), (4, 0.9), (1, 0.0), (2, 0.0)])
@pytest.mark.parametrize("dtype, tolerance", [("float64", 1e-12), ("float32", 2e-5)])
@pytest.mark.parametrize("gpu", [False, True])
def test_training_mode_equals_pytorchs_definition_in_each_group(
    shape, groups, momentum, dtype, tolerance, gpu, monkeypatch
):
    monkeypatch.setattr(batch_norm, "on_gpu", lambda: gpu)
    x = X.reshape(shape)
    layer = BatchNorm(momentum, groups=groups, dtype=dtype)
    layer.build(shape)
    layer.moving_mean.assign(np.full(shape[-1], 5.0))
    layer.moving_variance.assign(np.full(shape[-1], 7.0))
    y, mean, variance = _naive(x, groups, momentum)
    np.testing.assert_allclose(layer(x.astype(dtype), training=True), y, atol=tolerance, rtol=tolerance)
    np.testing.assert_allclose(layer.moving_mean, mean, rtol=tolerance, atol=tolerance)
    np.testing.assert_allclose(layer.moving_variance, variance, rtol=tolerance, atol=tolerance)


def test_parts_of_a_batch_are_equal_on_a_gpu_as_well(monkeypatch):
    monkeypatch.setattr(batch_norm, "on_gpu", lambda: True)
    layer = BatchNorm(groups=3)
    layer.build(X.shape)
    with pytest.raises(tf.errors.InvalidArgumentError, match="equal parts"):
        layer(X[:, :, :3].astype("float32"), training=True)  # 8 images, 72 pixels


def test_inference_mode_uses_the_running_statistics_and_moves_nothing():
    layer = BatchNorm()
    layer.build(X.shape)
    layer.moving_mean.assign([1.0, 2, 3, 4])
    layer.moving_variance.assign([4.0, 3, 2, 1])
    expected = (X - [1, 2, 3, 4]) / np.sqrt(np.array([4, 3, 2, 1]) + 1e-5)
    np.testing.assert_allclose(layer(X.astype("float32"), training=False), expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(layer.moving_mean, [1, 2, 3, 4])


@pytest.mark.parametrize("traced", [False, True])
@pytest.mark.parametrize("groups, gpu", [(1, False), (2, False), (2, True)])
def test_gradients_of_the_kernels_equal_the_plain_paths(groups, gpu, traced, monkeypatch):
    def gradient(layer, x):
        with tf.GradientTape() as tape:
            tape.watch(x)
            loss = tf.reduce_sum(layer(x, training=True) ** 3)
        return tape.gradient(loss, [x, layer.gamma.value, layer.beta.value])

    gradients = []
    for dtype in ("float32", "float64"):
        monkeypatch.setattr(batch_norm, "on_gpu", lambda kernel=dtype == "float32": gpu and kernel)
        layer = BatchNorm(groups=groups, dtype=dtype)
        layer.build(X.shape)
        gradients.append((tf.function(gradient) if traced else gradient)(layer, tf.constant(X, dtype)))
    for fused, plain in zip(*gradients, strict=True):
        np.testing.assert_allclose(fused, plain, rtol=2e-3, atol=2e-3)


def test_parameters_and_statistics_stay_float32_in_mixed_precision():
    layer = BatchNorm(dtype=keras.DTypePolicy("mixed_bfloat16"))
    y = layer(tf.constant(X, tf.bfloat16), training=True)
    assert y.dtype == tf.bfloat16
    assert {v.dtype for v in layer.variables} == {"float32"}
    assert abs(layer.moving_mean.numpy() - 0.1 * X.mean((0, 1, 2))).max() < 2e-3


def test_sequences_are_refused():
    with pytest.raises(ValueError, match=r"takes \(N, C\) or \(N, H, W, C\), not \(2, 3, 4\)"):
        BatchNorm()(tf.zeros((2, 3, 4)))
