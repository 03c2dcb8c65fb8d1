"""`MoCoV3` as a Keras model, and its transformers; the golden runs hold the arithmetic."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

import moco_tf
from moco_tf.encoders import BatchNorm, heads, vit
from moco_tf.methods import some_patches
from moco_tf.methods.losses import in_batch

SIZE, BATCH = 8, 6


def convolution():
    inputs = keras.Input((SIZE, SIZE, 3))
    x = layers.ReLU()(BatchNorm()(layers.Conv2D(6, 3, use_bias=False)(inputs)))
    return keras.Model(inputs, layers.GlobalAveragePooling2D()(x))


def moco(backbone=convolution, **kwargs):
    keras.utils.set_random_seed(1)
    model = moco_tf.MoCoV3(backbone(), **{"dim": 4, "hidden_dim": 5, "momentum": 0.9, "temperature": 0.2} | kwargs)
    model.compile(moco_tf.LARS(0.1, weight_decay=1e-3))
    return model


def tiny_vit():
    return vit.vit(8, 1, 2, image_size=SIZE, patch_size=4)


def views(steps=3, seed=0):
    shape = (steps * BATCH, SIZE, SIZE, 3)
    pair = np.random.default_rng(seed).normal(size=(2, *shape)).astype("float32")
    return tf.data.Dataset.from_tensor_slices(tuple(pair)).batch(BATCH, drop_remainder=True)


def test_the_loss_is_a_softmax_over_the_keys_of_the_batch():
    rng = np.random.default_rng(0)
    q, k = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in rng.normal(size=(2, 5, 3)))
    found = [x.numpy() for x in in_batch(tf.constant(q[:2]), tf.constant(k), tf.constant([3, 1]), temperature=0.5)]
    loss, positives, hardest, negatives, *_ = found
    for i, label in enumerate((3, 1)):
        weights = [np.exp(q[i] @ key / 0.5) for key in k]
        assert loss[i] == pytest.approx(-2 * 0.5 * np.log(weights[label] / sum(weights)))
        others = [q[i] @ key for j, key in enumerate(k) if j != label]
        assert positives[i] == pytest.approx(q[i] @ k[label])
        assert (hardest[i], negatives[i]) == (pytest.approx(max(others)), pytest.approx(np.mean(others)))


def test_each_view_looks_for_the_other_in_a_forward_pass_of_its_own():
    model = moco()
    ((one, two),) = views(1)

    def embed(images, predicts):
        x = (model.query_encoder if predicts else model.key_encoder)(images, training=True)["projection"]
        x = (model.predictor(x, training=True) if predicts else x).numpy()
        return x / np.linalg.norm(x, axis=1, keepdims=True)

    expected = 0.0
    for query, key in ((one, two), (two, one)):
        logits = embed(query, True) @ embed(key, False).T / 0.2
        expected += 2 * 0.2 * np.mean(np.log(np.exp(logits).sum(1)) - np.diag(logits))
    assert model.fit(views(1), verbose=0).history["loss"][0] == pytest.approx(expected, rel=1e-4)


def test_no_gradient_reaches_the_key_encoder_and_momentum_moves_parameters_only():
    model = moco(momentum=1.0)
    before = {v.path: v.numpy() for v in model.key_encoder.weights}
    model.fit(views(), verbose=0)
    for variable in model.key_encoder.weights:
        moved = not np.array_equal(before[variable.path], variable.numpy())
        assert moved == ("moving" in variable.name), variable.path
    assert not {id(v) for v in model.trainable_variables} & {id(v) for v in model.key_encoder.weights}


@pytest.mark.parametrize("backbone, head, dropout", [(convolution, "resnet", 0.0), (tiny_vit, "vit", 0.5)])
def test_a_saved_model_trains_on_as_if_nothing_had_happened(tmp_path, backbone, head, dropout):
    whole, first = (moco(backbone, head=head, token_dropout=dropout) for _ in range(2))
    whole.fit(views(4), verbose=0)
    first.fit(views(4).take(2), verbose=0)
    first.save(tmp_path / "first.keras")
    again = keras.models.load_model(tmp_path / "first.keras")
    again.fit(views(4).skip(2), verbose=0)
    for a, b in zip(whole.weights, again.weights, strict=True):
        if a is not whole.totals:
            np.testing.assert_array_equal(a.numpy(), b.numpy(), err_msg=a.path)


def test_a_frozen_patch_projection_stays_as_it_was_drawn_and_the_rest_learns():
    model = moco(tiny_vit, head="vit")
    model.compile(moco_tf.AdamW(0.01, weight_decay=0.1))
    patch, norm = (model.backbone.get_layer(name) for name in ("patch_embed.proj", "blocks.0.norm1"))
    before = [v.numpy() for v in (*patch.weights, *norm.weights)]
    logs = model.fit(views(), verbose=0).history
    same = [np.array_equal(a, v.numpy()) for a, v in zip(before, (*patch.weights, *norm.weights), strict=True)]
    assert same == [True, True, False, False]
    assert logs["gradient_norm_first"][0] > 0 and logs["gradient_norm_last"][0] > 0


def test_queries_may_see_the_class_token_and_a_random_part_of_the_patches():
    model = moco(tiny_vit, head="vit")
    ((one, _),) = views(1)
    found = some_patches.encoder_of(model.query_encoder, 0.5)(one, seed=(3, 7))
    places = vit.patches_kept(BATCH, 4, 2, (3, 7)).numpy()
    assert all(len(set(row)) == 2 for row in places) and len({frozenset(row) for row in places}) > 1

    layer = model.backbone.get_layer
    tokens = layer("tokens")(layer("patch_embed.flatten")(layer("patch_embed.proj")(one))).numpy()
    x = np.stack([t[[0, *(1 + row)]] for t, row in zip(tokens, places, strict=True)])
    for steps in (("norm1", "attn.qkv", "attn.heads", "attn.proj"), ("norm2", "mlp.fc1", "mlp.act", "mlp.fc2")):
        y = x
        for step in steps:
            y = layer(f"blocks.0.{step}")(y)
        x = x + y
    features = layer("norm")(x[:, 0])
    projection = heads.projection(model.query_encoder)(features, training=True)
    np.testing.assert_allclose(found.projection, projection, atol=1e-5)
    np.testing.assert_allclose(found.tokens, layer("norm")(x), atol=1e-5)
    np.testing.assert_array_equal(found.kept, places)


def test_with_all_patches_in_any_order_a_vit_computes_what_it_does():
    model = moco(tiny_vit, head="vit")
    ((one, _),) = views(1)
    expected = model.query_encoder(one, training=True)["projection"]
    found = some_patches.encoder_of(model.query_encoder, 1.0)(one, seed=(0, 0)).projection
    np.testing.assert_allclose(found, expected, atol=1e-4)


def test_patches_are_left_out_of_vits_only():
    with pytest.raises(ValueError, match="patches are left out of a ViT"):
        moco(token_dropout=0.5)
    with pytest.raises(ValueError, match="from 0 to less than 1; got 1"):
        moco(tiny_vit, head="vit", token_dropout=1.0)


def test_positions_are_sines_and_cosines_of_row_and_column():
    found = vit.position_embedding(3, 8)
    assert found.shape == (1, 10, 8) and not found[0, 0].any()
    for row in range(3):
        for column in range(3):
            expected = []
            for place in (row, column):
                for wave in (np.sin, np.cos):
                    expected += [wave(place / 10_000 ** (i / 2)) for i in range(2)]
            np.testing.assert_allclose(found[0, 1 + 3 * row + column], expected, atol=1e-12)


def test_attention_is_that_of_a_naive_loop():
    packed = np.random.default_rng(0).normal(size=(2, 5, 3 * 8))
    expected = np.empty((2, 5, 8))
    for n in range(2):
        for head in range(2):
            q, k, v = (packed[n, :, part * 8 + head * 4 : part * 8 + head * 4 + 4] for part in range(3))
            weights = np.exp(q @ k.T / np.sqrt(4))
            expected[n, :, head * 4 : head * 4 + 4] = weights / weights.sum(1, keepdims=True) @ v
    np.testing.assert_allclose(vit.Attention(2, dtype="float64")(packed), expected, atol=1e-12)


def test_initial_weights_have_the_papers_ranges():
    keras.utils.set_random_seed(0)
    model = vit.vit(96, 1, 4, image_size=32, patch_size=8)
    for name, fans in (("patch_embed.proj", 3 * 64 + 96), ("blocks.0.attn.qkv", 2 * 96), ("blocks.0.mlp.fc1", 5 * 96)):
        kernel, bias = (v.numpy() for v in model.get_layer(name).weights)
        limit = np.sqrt(6 / fans)
        assert 0.97 * limit < np.abs(kernel).max() <= limit
        assert not bias.any()
    assert 0 < np.abs(model.get_layer("tokens").cls_token.numpy()).max() < 1e-5


def test_image_and_patch_sizes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="image_size is a multiple of patch_size; got 30 and 8"):
        vit.vit_tiny(image_size=30, patch_size=8)
    with pytest.raises(ValueError, match="dim is a multiple of 4 and of heads; got 8 and 3"):
        vit.vit(8, 1, 3)


@pytest.mark.parametrize("precision", [pytest.param("mixed_bfloat16", marks=pytest.mark.slow), "mixed_float16"])
def test_a_transformer_trains_in_half_precision(precision):
    keras.config.set_dtype_policy(precision)
    model = moco(tiny_vit, head="vit")
    assert np.isfinite(model.fit(views(), verbose=0).history["loss"][0])
