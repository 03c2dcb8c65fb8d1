"""MAE, and what joins it to MoCo v3: losses as loops have them, and nothing of a hidden patch reaches the encoder."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from exactness import assert_goes_on, assert_numeric, assert_replicas_begin_alike

import moco_tf
from moco_tf.command import ConfigError
from moco_tf.config import parse
from moco_tf.data.inputs.image import Preprocessing
from moco_tf.encoders import decoders, vit
from moco_tf.methods import mae
from moco_tf.methods.mae import MAE
from moco_tf.methods.mae_moco import MAEMoCo
from moco_tf.pretext import mae as task

SIZE, SIDE, BATCH = 12, 4, 4
PATCHES = (SIZE // SIDE) ** 2  # 9


def model(kind=MAE, optimizer=None, **settings):
    keras.utils.set_random_seed(1)
    backbone = vit.vit(8, 1, 2, image_size=SIZE, patch_size=SIDE, freeze_patch=False)
    settings = {"decoder_depth": 1, "decoder_width": 32} | settings
    if kind is not MAE:
        settings = {"dim": 4, "hidden_dim": 5, "momentum": 0.9, "temperature": 0.2} | settings
    if kind is moco_tf.MoCoV3:
        settings = {"head": "vit"} | {name: value for name, value in settings.items() if "decoder" not in name}
    made = kind(backbone, preprocessing=Preprocessing(image_size=SIZE), seed=3, **settings)
    made.compile(optimizer or moco_tf.AdamW(0.01, weight_decay=0.05))
    return made


def batches(model, steps, seed=0):
    shape = (model.VIEWS[1], steps * BATCH, SIZE, SIZE, 3)
    views = np.random.default_rng(seed).normal(size=shape).astype(model.compute_dtype)
    return tf.data.Dataset.from_tensor_slices({"views": tuple(views)}).batch(BATCH, drop_remainder=True)


@pytest.fixture
def float64():
    keras.config.set_floatx("float64")  # of inputs, too
    keras.config.set_dtype_policy("float64")
    yield


KINDS = {"mae": (MAE, {}), "mae_moco": (MAEMoCo, {"reconstruction_weight": 0.5})}


def naive_targets(image, normalised):
    """(L, P P 3) of one image, in loops."""
    rows = []
    for top in range(0, SIZE, SIDE):
        for left in range(0, SIZE, SIDE):
            pixels = image[top : top + SIDE, left : left + SIDE].reshape(-1)
            rows.append((pixels - pixels.mean()) / np.sqrt(pixels.var(ddof=1) + 1e-6) if normalised else pixels)
    return np.array(rows)


def naive_reconstruction(model, images, place):
    """The mean over images and hidden patches of the squared error of what the decoder tells, in loops."""
    keeps = max(1, round((1 - KEPT_BY[type(model)](model)) * PATCHES))
    seed = (model.seed, model.VIEWS[1] * int(model.step) + place)
    noise = tf.random.stateless_uniform((BATCH, PATCHES), seed, alg="philox").numpy()
    kept = np.argsort(-noise, axis=1, kind="stable")[:, :keeps]
    layer = model.backbone.get_layer
    tokens = layer("tokens")(layer("patch_embed.flatten")(layer("patch_embed.proj")(images))).numpy()
    x = np.stack([own[[0, *(1 + places)]] for own, places in zip(tokens, kept, strict=True)])
    x = layer("norm")(through_block(layer, x)).numpy()

    part = model.decoder.get_layer
    embedded = part("embed")(x).numpy()
    mask_token = part("tokens").mask_token.numpy()[0, 0]
    whole = np.empty((BATCH, 1 + PATCHES, embedded.shape[-1]))
    for image in range(BATCH):
        whole[image, 0] = embedded[image, 0]
        for patch in range(PATCHES):
            visible = patch in kept[image]
            own = embedded[image, 1 + list(kept[image]).index(patch)] if visible else mask_token
            whole[image, 1 + patch] = own
    whole += vit.position_embedding(SIZE // SIDE, whole.shape[-1])
    told = part("pixels")(part("norm")(through_block(part, whole))).numpy()[:, 1:]
    errors = []
    for image in range(BATCH):
        wanted = naive_targets(np.array(images)[image], model.norm_targets)
        for patch in set(range(PATCHES)) - set(kept[image]):
            errors.append(np.mean((told[image, patch] - wanted[patch]) ** 2))
    assert len(errors) == BATCH * (PATCHES - keeps)
    return np.mean(errors)


KEPT_BY = {MAE: lambda model: model.mask_ratio, MAEMoCo: lambda model: model.token_dropout}


def through_block(layer, x):
    for steps in (("norm1", "attn.qkv", "attn.heads", "attn.proj"), ("norm2", "mlp.fc1", "mlp.act", "mlp.fc2")):
        y = x
        for step in steps:
            y = layer(f"blocks.0.{step}")(y)
        x = x + y
    return x


def test_patches_are_cut_row_by_row_as_the_vit_numbers_them():
    images = np.random.default_rng(0).normal(size=(2, SIZE, SIZE, 3))
    found = mae.patchify(tf.constant(images), SIDE).numpy()
    for image in range(2):
        np.testing.assert_array_equal(found[image], naive_targets(images[image], normalised=False))
    projection = vit.vit(8, 1, 2, image_size=SIZE, patch_size=SIDE).get_layer("patch_embed.proj")
    kernel = projection.kernel.numpy().reshape(-1, 8)
    expected = projection(images.astype("float32")).numpy().reshape(2, PATCHES, 8)
    np.testing.assert_allclose(found @ kernel, expected, atol=1e-5)


def test_targets_have_mean_0_and_unbiased_variance_1_and_a_flat_patch_is_0():
    images = np.random.default_rng(0).normal(size=(2, SIZE, SIZE, 3))
    images[1, :SIDE, :SIDE] = 0.7
    found = mae.targets(tf.constant(images), SIDE).numpy()
    for image in range(2):
        np.testing.assert_allclose(found[image], naive_targets(images[image], normalised=True), atol=1e-9)
    np.testing.assert_allclose(found[0].var(axis=1, ddof=1), 1, atol=1e-4)
    np.testing.assert_allclose(found[1, 0], 0, atol=1e-9)


def test_only_hidden_patches_have_a_loss_and_a_gradient():
    rng = np.random.default_rng(0)
    predicted, wanted = (tf.constant(rng.normal(size=(2, 5, 6))) for _ in range(2))
    hidden = tf.constant([[True, False, True, False, False], [False, True, True, True, True]])
    with tf.GradientTape() as tape:
        tape.watch(predicted)
        loss = mae.masked_error(predicted, wanted, hidden)
    gradient = tape.gradient(loss, predicted).numpy()
    for image in range(2):
        places = np.flatnonzero(hidden[image])
        errors = [np.mean((predicted[image, i] - wanted[image, i]).numpy() ** 2) for i in places]
        assert loss[image].numpy() == pytest.approx(np.mean(errors), abs=1e-12)
        assert not gradient[image][~hidden[image].numpy()].any() and gradient[image][places].all()
    pearson = [np.corrcoef(*(x.numpy()[i][hidden[i]].ravel() for x in (predicted, wanted)))[0, 1] for i in range(2)]
    np.testing.assert_allclose(mae.masked_correlation(predicted, wanted, hidden), pearson, atol=1e-9)


@pytest.mark.parametrize("norm_targets", [True, False])
@pytest.mark.parametrize("kind, settings", KINDS.values(), ids=KINDS)
def test_the_loss_is_that_of_a_loop_and_its_gradient_a_numeric_one(kind, settings, norm_targets, float64):
    whole = model(kind, norm_targets=norm_targets, **settings)
    (batch,) = batches(whole, 1)
    for variable in whole.trainable_variables:
        variable.assign_add(np.random.default_rng(1).normal(size=variable.shape) * 0.1)
    context = whole.prepare(batch)
    with tf.GradientTape() as tape:
        terms = whole.objective(batch, context)
        loss = tf.reduce_mean(terms.loss)
    told = [naive_reconstruction(whole, view, place) for place, view in enumerate(batch["views"])]
    if kind is MAE:
        assert float(loss) == pytest.approx(told[0], abs=1e-9)
    else:
        assert float(tf.reduce_mean(terms.reconstruction)) == pytest.approx(np.mean(told), abs=1e-9)
        contrast = contrast_of(whole, batch, context)
        assert float(loss) == pytest.approx(contrast + 0.5 * np.mean(told), abs=1e-7)  # BN's kernels are float32's
    variables = whole.trainable_variables
    gradients = tape.gradient(loss, variables)
    assert all(gradient is not None for gradient in gradients)
    for variable, gradient in zip(variables[:: len(variables) // 8], gradients[:: len(variables) // 8], strict=True):
        value = lambda: tf.reduce_mean(whole.objective(batch, context).loss)  # noqa: E731
        assert_numeric(gradient, variable, value, 1e-4, rel=1e-3, abs=1e-9)


def contrast_of(model, batch, keys):
    """MoCo v3's symmetrised loss of what the query encoder makes of some patches."""
    total = 0.0
    for place, view in enumerate(batch["views"]):
        projection = model.encode_some(view, (model.seed, 2 * int(model.step) + place)).projection
        queries = model.predictor(projection, training=True).numpy()
        queries /= np.linalg.norm(queries, axis=1, keepdims=True)
        logits = queries @ keys[1 - place].numpy().T / model.temperature
        total += 2 * model.temperature * np.mean(np.log(np.exp(logits).sum(1)) - np.diag(logits))
    return total


@pytest.mark.parametrize("ratio, hidden", [(0.75, 7), (0.5, 5), (0.34, 3), (0.99, 8)])
def test_each_image_hides_as_many_patches_anew(ratio, hidden):
    masked = model(mask_ratio=ratio)
    ((images,),) = (batch["views"] for batch in batches(masked, 1))
    found = [decoders.places(masked.encode_some(images, (3, step)).kept, PATCHES)[1].numpy() for step in range(2)]
    assert all(row.sum() == hidden for rows in found for row in rows)
    assert not np.array_equal(*found) and len({row.tobytes() for row in found[0]}) > 1


@pytest.mark.parametrize("kind, settings", KINDS.values(), ids=KINDS)
def test_hidden_pixels_change_the_targets_alone(kind, settings):
    """The encoder's outputs and what is told are the same, bit for bit, and no gradient goes back to those pixels."""
    masked = model(kind, **settings)
    (batch,) = batches(masked, 1)
    images = batch["views"][0]
    seen = masked.encode_some(images, (3, 0))
    _, hidden = decoders.places(seen.kept, PATCHES)
    side = SIZE // SIDE
    pixels = np.kron(hidden.numpy().reshape(-1, side, side), np.ones((SIDE, SIDE)))[..., np.newaxis] > 0
    changed = tf.where(pixels, images + 1 + images**2, images)
    again = masked.encode_some(changed, (3, 0))
    for before, after in zip(seen, again, strict=True):
        np.testing.assert_array_equal(before, after)
    one, other = (
        mae.reconstruct(masked.decoder, each, pictures, SIDE, True, True)
        for each, pictures in ((seen, images), (again, changed))
    )
    np.testing.assert_array_equal(one[0], other[0])
    differs = np.abs(one[1] - other[1]).max(axis=2) > 1e-3
    np.testing.assert_array_equal(differs, hidden)
    with tf.GradientTape() as tape:
        tape.watch(images)
        each = masked.encode_some(images, (3, 0))
        told = tf.reduce_sum(masked.decoder([each.tokens, each.kept]) ** 2) + tf.reduce_sum(each.projection**2)
    gradient = tape.gradient(told, images).numpy()
    assert not gradient[np.broadcast_to(pixels, gradient.shape)].any()
    assert (np.abs(gradient).max(axis=-1, keepdims=True) > 0)[~pixels].all()


@pytest.mark.parametrize("kind, settings", KINDS.values(), ids=KINDS)
def test_evaluation_hides_what_step_0_would_and_changes_nothing(kind, settings):
    masked = model(kind, **settings)
    data = batches(masked, 1)
    before = masked.evaluate(data, verbose=0, return_dict=True)
    masked.step.assign(5)
    weights = [variable.numpy() for variable in masked.weights]
    assert masked.evaluate(data, verbose=0, return_dict=True) == before
    for variable, value in zip(masked.weights, weights, strict=True):
        assert variable is masked.totals or np.array_equal(variable, value), variable.path


def test_with_lambda_0_it_is_moco_v3_with_token_dropout():
    mixed = model(MAEMoCo, mask_ratio=0.5, reconstruction_weight=0.0)
    plain = model(moco_tf.MoCoV3, token_dropout=0.5)
    (batch,) = batches(mixed, 1)
    losses, gradients = [], []
    for each in (mixed, plain):
        context = each.prepare(batch)
        with tf.GradientTape() as tape:
            losses.append(each.objective(batch, context).loss)
        variables = [*each.query_encoder.trainable_variables, *each.predictor.trainable_variables]
        gradients.append(tape.gradient(losses[-1], variables))
    np.testing.assert_array_equal(*losses)
    for variable, *both in zip(variables, *gradients, strict=True):
        np.testing.assert_array_equal(*both, err_msg=variable.path)


def test_keys_see_whole_views():
    mixed = model(MAEMoCo)
    (batch,) = batches(mixed, 1)
    expected = [mixed.key_encoder(view, training=True)["projection"].numpy() for view in batch["views"]]
    for found, keys in zip(mixed.prepare(batch), expected, strict=True):
        np.testing.assert_allclose(found, keys / np.linalg.norm(keys, axis=1, keepdims=True), atol=1e-5)


def test_the_patch_projection_learns_and_positions_do_not():
    masked = model()
    (patch, tokens), told = (masked.backbone.get_layer(n) for n in ("patch_embed.proj", "tokens")), masked.decoder
    fixed = [tokens.pos_embed, told.get_layer("tokens").pos_embed]
    moving = [*patch.weights, tokens.cls_token, told.get_layer("tokens").mask_token]
    before = [variable.numpy() for variable in (*fixed, *moving)]
    masked.fit(batches(masked, 2), verbose=0)
    same = [np.array_equal(a, b) for a, b in zip(before, (*fixed, *moving), strict=True)]
    assert same == [True, True, False, False, False, False]


def test_it_learns_to_tell_hidden_patches():
    """Of waves, whose hidden parts follow from the visible ones."""
    masked = model(optimizer=moco_tf.AdamW(0.01), mask_ratio=0.5, decoder_depth=1)
    phases = np.random.default_rng(0).uniform(0, 2 * np.pi, size=(64, 1, 1, 1))
    waves = np.sin(phases + np.arange(SIZE)[:, np.newaxis, np.newaxis]) * np.ones((1, SIZE, SIZE, 3))
    data = tf.data.Dataset.from_tensor_slices({"views": (waves.astype("float32"),)}).batch(16).repeat(40)
    masked.fit(data.take(2), verbose=0)
    first = masked.evaluate(data.take(4), verbose=0, return_dict=True)
    masked.fit(data, verbose=0)
    last = masked.evaluate(data.take(4), verbose=0, return_dict=True)
    assert last["loss"] < 0.3 < 0.7 < first["loss"]
    assert last["pixel_correlation"] > 0.8


def test_features_are_the_class_token_and_the_embedding_is_of_unit_length():
    masked = model()
    images = tf.random.stateless_normal((3, SIZE, SIZE, 3), (0, 0))
    found = masked.encode(images)
    np.testing.assert_allclose(found["features"], masked.backbone(images), atol=1e-6)
    lengths = np.linalg.norm(found["features"], axis=1, keepdims=True)
    np.testing.assert_allclose(found["embedding"], found["features"] / lengths, atol=1e-6)


@pytest.mark.slow  # every day, test_every_task.py has a run of mae_moco go on
@pytest.mark.parametrize("kind, settings", KINDS.values(), ids=KINDS)
def test_replicas_checkpoints_and_keras_files_go_on(kind, settings, tmp_path):
    assert_goes_on(lambda: model(kind, **settings), batches, tmp_path)
    # AdamW divides: where a gradient is rounding alone, as that of keys' biases, a weight moves by as much.
    assert_replicas_begin_alike(lambda: model(kind, **settings), batches, atol=1e-3)


def test_a_picture_shows_each_crop_and_below_it_its_hidden_patches_in_grey():
    inputs = Preprocessing(image_size=SIZE)
    options = task.Options(patch_size=SIDE, mask_ratio=0.5)
    record = {"image": tf.fill((20, 20, 3), tf.constant(255, tf.uint8))}
    (view,) = task.views(record, tf.constant((5, 0), tf.int64), inputs, options)
    shown = task.picture((view[tf.newaxis],), inputs, options).numpy()
    enlarged = 96 // SIZE
    assert shown.shape == (2 * enlarged * SIZE, enlarged * SIZE, 3)
    crop, below = (part[::enlarged, ::enlarged] for part in np.split(shown, 2))
    assert (crop == 255).all() and set(np.unique(below)) == {128, 255}
    assert (below == 128).mean() == pytest.approx(5 / 9)


@pytest.mark.parametrize("name", ["mae", "mae_moco"])
@pytest.mark.parametrize(
    ("flags", "line"),
    [
        (["--arch=resnet18"], "hides patches, which a ViT has; got --arch=resnet18: take --arch=vit_tiny"),
        (["--mask_ratio=1"], "--mask_ratio is a share, more than 0 and less than 1; got 1"),
        (["--mask_ratio=0"], "--mask_ratio is a share, more than 0 and less than 1; got 0"),
        (["--image_size=16"], "hides at least one of an image's 1 patches and leaves one; got .*: take a smaller"),
        (["--channels=1", "--patch_size=1", "--image_size=8"], "divides by the deviation within a patch"),
        (["--decoder_width=48"], "--decoder_width is a multiple of 32; got 48"),
        (["--decoder_depth=-1"], "--decoder_depth is 0 or more; got -1"),
        (["--method=moco_v3"], "has a model of its own, in which no --method has a part; got --method=moco_v3"),
    ],
)
def test_what_cannot_be_masked_is_refused(name, flags, line):
    with pytest.raises(ConfigError, match=line):
        parse([f"--pretext={name}", *flags])


def test_a_negative_lambda_is_refused_and_the_patch_projection_learns_unless_asked():
    with pytest.raises(ConfigError, match="--reconstruction_weight is 0 or more; got -1"):
        parse(["--pretext=mae_moco", "--reconstruction_weight=-1"])
    for name in ("mae", "mae_moco"):
        assert not parse([f"--pretext={name}"]).freeze_patch
        assert parse([f"--pretext={name}", "--freeze_patch"]).freeze_patch


def test_wrong_settings_are_refused():
    for kind in (MAE, MAEMoCo):
        with pytest.raises(ValueError, match="mask_ratio is the share of 9 patches that is hidden, at least one"):
            model(kind, mask_ratio=0.01)
    with pytest.raises(ValueError, match="a decoder's width is a multiple of 32, which each head has; got 40"):
        model(decoder_width=40)
    with pytest.raises(ValueError, match="reconstruction_weight is 0 or more; got -1"):
        model(MAEMoCo, reconstruction_weight=-1.0)
