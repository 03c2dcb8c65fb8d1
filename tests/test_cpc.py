"""CPC: patches as slices have them, losses as loops have them, and no row that sees what it predicts."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from exactness import assert_goes_on, assert_numeric, assert_replicas_begin_alike

import moco_tf
from moco_tf.command import ConfigError
from moco_tf.config import parse
from moco_tf.data.inputs.image import Preprocessing
from moco_tf.encoders import patch_grid, resnet
from moco_tf.methods import cpc as cpc_module
from moco_tf.methods.cpc import CPC
from moco_tf.pretext import cpc as task
from moco_tf.pytorch import tensor_names

GRID, SIZE, SIDE, BATCH = 4, 10, 4, 4


def cpc(**settings):
    keras.utils.set_random_seed(1)

    def encoder(side):
        return resnet.resnet10(image_size=side, width=2, stem="cifar", channels=1, norm="layer")

    backbone = patch_grid.of_patches(encoder, SIZE, GRID)
    settings = {"dim": 5, "hidden_dim": 6, "ahead": (2, 3), "queue_size": 200, "momentum": 0.9} | settings
    model = CPC(backbone, preprocessing=Preprocessing(image_size=SIZE), seed=3, **settings)
    model.compile(moco_tf.SGD(0.05, momentum=0.9, weight_decay=1e-3))
    return model


def batches(model, steps, seed=0):
    side = GRID * SIDE
    pictures = np.random.default_rng(seed).normal(size=(steps * BATCH, side, side, 3))
    data = {"views": (pictures.astype(model.compute_dtype),)}
    return tf.data.Dataset.from_tensor_slices(data).batch(BATCH, drop_remainder=True)


FRAMES = [{"frame": "in_batch", "directions": 4}, {"frame": "queue", "temperature": 0.2}]


def test_patches_overlap_by_half_and_stand_side_by_side():
    images = np.random.default_rng(0).normal(size=(2, SIZE, SIZE, 3))
    assert patch_grid.sides(SIZE, GRID) == (SIDE, 2)
    found = patch_grid.cut(tf.constant(images), GRID)
    for row in range(GRID):
        for column in range(GRID):
            expected = images[:, 2 * row : 2 * row + SIDE, 2 * column : 2 * column + SIDE]
            np.testing.assert_array_equal(found[:, row, column], expected)
    shown = patch_grid.side_by_side(found)
    np.testing.assert_array_equal(shown[:, SIDE : 2 * SIDE, 3 * SIDE :], found[:, 1, 3])
    np.testing.assert_array_equal(patch_grid.apart(shown, GRID), tf.reshape(found, (-1, SIDE, SIDE, 3)))
    np.testing.assert_array_equal(patch_grid.side_by_side(found[0]), shown[0])


def test_features_are_the_mean_over_the_patches_each_encoded_by_itself():
    model = cpc()
    images = tf.random.stateless_normal((3, SIZE, SIZE, 3), (0, 0))
    encoder = model.query_encoder.layers[1].get_layer("patch_encoder")
    each = [
        encoder(patch_grid.luma(p))
        for p in tf.unstack(tf.reshape(patch_grid.cut(images, GRID), (3, -1, 4, 4, 3)), axis=1)
    ]
    np.testing.assert_allclose(model.encode(images)["features"], np.mean(each, axis=0), rtol=1e-4, atol=1e-6)


def test_layer_norm_lets_no_patch_see_another():
    encoder = resnet.resnet10(image_size=SIDE, width=4, stem="cifar", channels=1, norm="layer")
    images = tf.random.stateless_normal((6, SIDE, SIDE, 1), (0, 0))
    np.testing.assert_allclose(
        encoder(images, training=True)[:2], encoder(images[:2], training=True), rtol=1e-4, atol=1e-6
    )
    assert not any("moving" in weight.path for weight in encoder.weights)


@pytest.mark.parametrize("row", range(GRID))
def test_a_row_predicts_from_itself_and_the_rows_above_alone(row):
    """Of all it says, nothing changes when what is further down does; and the second row down shares no pixel."""
    model = cpc()
    vectors = tf.random.stateless_normal((2, GRID, GRID, 16), (0, 0))
    changed = tf.concat([vectors[:, : row + 1], vectors[:, row + 1 :] + 1], axis=1)
    seen = tf.concat([vectors[:, :row], vectors[:, row:] + 1], axis=1)
    before, after, of_own = (model.predictor([grid]).numpy() for grid in (vectors, changed, seen))
    np.testing.assert_array_equal(before[:, : row + 1], after[:, : row + 1])
    assert np.abs(before[:, row] - of_own[:, row]).max() > 1e-3
    image = tf.reshape(tf.range(SIZE * SIZE), (SIZE, SIZE, 1))
    rows = [set(each.numpy().ravel()) for each in patch_grid.cut(image, GRID)]
    assert all(rows[row].isdisjoint(rows[other]) for other in range(row + 2, GRID))
    assert row + 1 == GRID or rows[row] & rows[row + 1]


def naive_loss(model, batch, keys):
    """Of the first frame, or of the queue's with its keys: summed over rows ahead and directions."""
    encoder, total = model.query_encoder.layers[1].get_layer("patch_encoder"), 0.0
    vectors = encoder(patch_grid.luma(patch_grid.apart(batch["views"][0], GRID))).numpy()
    head = model.query_encoder.get_layer("fc")
    queue = model.frame == "queue"
    candidates = np.concatenate([keys, model.queue.keys.numpy()]) if queue else head(vectors).numpy()
    grid = vectors.reshape(BATCH, GRID, GRID, -1)
    numbers = np.arange(BATCH * GRID * GRID).reshape(BATCH, GRID, GRID)
    turned = [np.rot90(grid, turn, axes=(1, 2)) for turn in range(model.directions)]
    predictions = model.predictor(turned)
    for turn, predicted in enumerate(predictions if isinstance(predictions, list) else [predictions]):
        places = np.rot90(numbers, turn, axes=(1, 2))
        for index, rows in enumerate(model.ahead):
            losses = []
            for image in range(BATCH):
                for row in range(GRID - rows):
                    for column in range(GRID):
                        query = predicted.numpy()[image, row, column, index]
                        if queue:
                            query = head(query[None]).numpy()[0]
                            query = query / np.linalg.norm(query) / model.temperature
                        scores = [query @ key * (1 if queue else 0.1) for key in candidates]
                        own = scores[places[image, row + rows, column]]
                        losses.append(-np.log(np.exp(own) / np.sum(np.exp(scores))))
            total += np.mean(losses)
    return total


@pytest.mark.parametrize("settings", FRAMES, ids=lambda settings: settings["frame"])
def test_the_loss_is_that_of_a_loop_and_its_gradient_a_numeric_one(settings, float64):
    model = cpc(**settings)
    (batch,) = batches(model, 1)
    for variable in model.trainable_variables:  # away from 0, where ReLU has no gradient
        variable.assign_add(np.random.default_rng(1).normal(size=variable.shape) * 0.1)
    context = model.prepare(batch)
    with tf.GradientTape() as tape:
        loss = tf.reduce_mean(model.objective(batch, context).loss)
    assert float(loss) == pytest.approx(naive_loss(model, batch, context), abs=1e-9)
    variables = model.trainable_variables
    gradients = tape.gradient(loss, variables)
    assert all(gradient is not None for gradient in gradients)
    for variable, gradient in zip(variables[:: len(variables) // 6], gradients[:: len(variables) // 6], strict=True):
        close = 1e-4 if variable.path.startswith(("context", "predict", "fc")) else 2e-2  # Eigen's rsqrt is coarse
        loss = lambda: tf.reduce_mean(model.objective(batch, context).loss)  # noqa: E731
        assert_numeric(gradient, variable, loss, 1e-4, rel=close)


def test_in_the_queues_frame_keys_are_the_momentum_encoders_and_enter_the_queue():
    model = cpc(**FRAMES[1])
    (batch,) = batches(model, 1)
    model.train_step(batch)
    vectors = model._vectors(model.key_encoder, batch, training=True)
    keys = model.key_encoder.get_layer("fc")(vectors).numpy()
    keys /= np.linalg.norm(keys, axis=1, keepdims=True)
    np.testing.assert_allclose(model.queue.keys.numpy()[: len(keys)], keys, rtol=1e-4, atol=1e-5)
    assert int(model.queue.pointer) == BATCH * GRID**2


@pytest.mark.parametrize(
    "settings", [pytest.param(FRAMES[0], marks=pytest.mark.slow), FRAMES[1]], ids=["in_batch", "queue"]
)
def test_replicas_checkpoints_and_keras_files_go_on(settings, tmp_path):
    assert_goes_on(lambda: cpc(**settings), batches, tmp_path)
    assert_replicas_begin_alike(lambda: cpc(**settings), batches)


def test_patches_lose_their_colors_and_are_flipped_apart_from_one_another():
    cut = tf.random.stateless_uniform((GRID, GRID, SIDE, SIDE, 3), (0, 0))
    found = task.augmented(cut, tf.random.stateless_uniform((2, GRID, GRID), (1, 0))).numpy()
    drawn = set()
    for row in range(GRID):
        for column in range(GRID):
            own = cut[row, column].numpy()
            ways = {(c, f): (own[:, ::-1] if f else own)[..., c] for c in range(3) for f in range(2)}
            (way,) = [way for way, expected in ways.items() if np.array_equal(found[row, column, ..., 0], expected)]
            drawn.add(way)
            assert np.array_equal(found[row, column], np.repeat(found[row, column, ..., :1], 3, axis=-1))
    assert len(drawn) == 6


def test_a_view_shows_the_patches_of_a_crop_as_a_grid():
    inputs, options = Preprocessing(image_size=SIZE), task.Options(grid=GRID)
    record = {"image": tf.cast(tf.random.stateless_uniform((20, 20, 3), (0, 0), 0, 256, tf.int32), tf.uint8)}
    (view,), (again,), (other,) = (
        task.views(record, tf.constant((5, number), tf.int64), inputs, options) for number in (0, 0, 1)
    )
    assert view.shape == (GRID * SIDE, GRID * SIDE, 3) and view.dtype == tf.float32
    np.testing.assert_array_equal(view, again)
    assert np.abs(view - other).max() > 0.1


@pytest.mark.parametrize(
    ("flag", "line"),
    [
        ("--image_size=33", "--image_size is a multiple of 8; got 33: take 32"),
        (
            "--ahead=1,2",
            "--ahead counts rows from 2, which no longer overlap, to 6 in a grid of 7, each once; got 1,2",
        ),
        ("--grid=2", "--grid is at least 3; got 2"),
        ("--directions=2", "--directions is 1 or 4; got 2"),
        ("--arch=vit_small", "patches of one size by a ResNet; got --arch=vit_small"),
    ],
)
def test_what_makes_no_grid_is_refused(flag, line):
    with pytest.raises(ConfigError, match=line):
        parse(["--pretext=cpc", flag])


def test_an_encoder_of_patches_has_no_names_in_pytorch():
    with pytest.raises(tensor_names.Mismatch, match="have no GroupNormalization"):
        list(tensor_names.names(cpc().query_encoder))


def test_wrong_settings_are_refused():
    with pytest.raises(ValueError, match="CPC predicts from 2 to 3 rows ahead in a grid of 4"):
        cpc(ahead=(1,))
    with pytest.raises(ValueError, match="directions 1 or 4"):
        cpc(directions=2)


def test_replicas_gather_full_precision(monkeypatch):
    keras.config.set_dtype_policy("mixed_bfloat16")
    try:
        model, seen = cpc(), []
        monkeypatch.setattr(cpc_module.replicas, "gather", lambda x: (seen.append(x.dtype.name), x)[1])
        model.objective({"views": next(iter(batches(model, 1)))["views"]}, None)
    finally:
        keras.config.set_dtype_policy("float32")
    assert seen and set(seen) == {"float32"}  # TensorFlow's collectives gather no bfloat16
