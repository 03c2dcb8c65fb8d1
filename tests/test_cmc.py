"""CMC: colours as scikit-image has them, losses as loops have them, and exact on replicas."""

import json
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf
from exactness import assert_goes_on, assert_replicas_begin_alike
from test_several_keys import BATCH, SIZE, K

import moco_tf
from moco_tf.command import ConfigError
from moco_tf.config import parse
from moco_tf.data.inputs.image import IMAGENET, Preprocessing
from moco_tf.encoders import color_spaces, resnet, two_modalities
from moco_tf.methods.cmc import CMC
from moco_tf.pretext import cmc as task
from moco_tf.pytorch import tensor_names

T = 0.2
GOLDEN = json.loads((Path(__file__).with_name("color_spaces.json")).read_text())


@pytest.mark.parametrize("space", color_spaces.SPACES)
def test_colors_are_those_of_scikit_image(space):
    rgb = tf.constant(np.array(GOLDEN["rgb"]) / 255, tf.float32)
    convert, center, half_range = color_spaces.SPACES[space]
    np.testing.assert_allclose(convert(rgb), GOLDEN[space], atol=1e-3)
    images = (rgb - IMAGENET.mean) / IMAGENET.std
    found = color_spaces.ColorSpace(space, IMAGENET.mean, IMAGENET.std)(images)
    np.testing.assert_allclose(found, (np.array(GOLDEN[space]) - center) / half_range, atol=1e-4)


def test_a_grey_picture_has_one_color_and_a_colored_one_its_own_luminance():
    grey = tf.tile(tf.random.stateless_uniform((1, 4, 4, 1), (0, 0)), (1, 1, 1, 3))
    np.testing.assert_allclose(color_spaces.lab(grey)[..., 1:], np.zeros((1, 4, 4, 2)), atol=0.02)


def test_the_way_back_from_lab_is_a_way_back():
    rgb = tf.random.stateless_uniform((64, 3), (0, 0))
    np.testing.assert_allclose(color_spaces.of_lab(color_spaces.lab(rgb)), rgb, atol=1e-4)


def test_a_picture_of_views_shows_each_crop_its_luminance_and_its_colors():
    inputs = Preprocessing(image_size=96)
    images = tf.random.stateless_uniform((2, 96, 96, 3), (0, 0), 0, 256, tf.int32)
    shown = task.picture((inputs.normalize(images),), inputs, task_options()).numpy().astype(int)
    crops, luminance, colors = np.split(shown, 3)
    np.testing.assert_array_equal(crops, np.concatenate(images, axis=1))
    assert (np.ptp(luminance, axis=-1) <= 1).all()  # grey
    lightness = color_spaces.lab(tf.constant(colors / 255, tf.float32))[..., 0]
    inside = ((colors > 0) & (colors < 255)).all(axis=-1)
    np.testing.assert_allclose(lightness[inside], task.SHOWN_LUMINANCE, atol=0.5)


def task_options():
    return parse(["--pretext=cmc", "--augment=flip"]).options(task.Options)


def cmc(**settings):
    keras.utils.set_random_seed(1)
    preprocessing = Preprocessing(image_size=SIZE)

    def half(channels):
        return resnet.resnet10(image_size=None, width=4, stem="cifar", channels=channels)

    backbone = two_modalities.of_two_colors(half, "lab", preprocessing)
    settings = {"dim": 4, "queue_size": K, "momentum": 0.9, "temperature": T, "bn_groups": 4, "seed": 3} | settings
    model = CMC(backbone, preprocessing=preprocessing, **settings)
    model.compile(moco_tf.SGD(0.05, momentum=0.9, weight_decay=1e-3))
    return model


def batches(model, steps, seed=0):
    views = model.VIEWS[0]
    images = np.random.default_rng(seed).normal(size=(views, steps * BATCH, SIZE, SIZE, 3)).astype("float32")
    data = {"views": tuple(images), "id": np.arange(steps * BATCH, dtype="int64") % RECORDS}
    return tf.data.Dataset.from_tensor_slices(data).batch(BATCH, drop_remainder=True)


RECORDS = K + 2 * BATCH
FRAMES = [
    {"frame": "in_batch"},
    {"frame": "queue", "head": "mlp"},
    {"frame": "memory_bank", "records": RECORDS},
    {"frame": "memory_bank", "records": RECORDS, "loss": "nce"},
]
NAMES = ["in_batch", "queue", "memory_bank", "memory_bank-nce"]


def halves(model, encoder, images):
    projections = encoder(images, training=True)["projection"].numpy()
    return [half / np.linalg.norm(half, axis=1, keepdims=True) for half in (projections[:, :4], projections[:, 4:])]


@pytest.mark.parametrize("settings", FRAMES[:2], ids=NAMES[:2])
def test_each_modality_looks_for_the_other_of_its_image(settings):
    model = cmc(**settings, shuffle_bn=False)
    (batch,) = batches(model, 1)
    context = model.prepare(batch)
    queries = halves(model, model.query_encoder, batch["views"][0])
    losses = []
    for one, other in ((0, 1), (1, 0)):
        if model.frame == "queue":
            keys = halves(model, model.key_encoder, batch["views"][1])[other]
            candidates = [[key, *model.queues[other].keys.numpy()] for key in keys]
            places = [0] * BATCH
        else:
            candidates, places = [queries[other]] * BATCH, range(BATCH)
        for query, among, place in zip(queries[one], candidates, places, strict=True):
            weights = [np.exp(query @ key / T) for key in among]
            losses.append(-np.log(weights[place] / sum(weights)))
    found = model.objective(batch, context)
    assert np.mean(found.loss) == pytest.approx(2 * np.mean(losses), rel=1e-4)
    model.finish(batch, context, found)
    if model.frame == "queue":
        for queue, keys in zip(model.queues, context, strict=True):
            np.testing.assert_array_equal(queue.keys.numpy()[:BATCH], keys)


def test_luminance_sees_no_color_and_color_no_luminance():
    model = cmc()
    images = tf.random.stateless_uniform((2, SIZE, SIZE, 3), (0, 0), 0.2, 0.8)
    luma, *_ = tf.unstack(color_spaces.lab(images), axis=-1)
    grey = tf.where(luma <= 8, luma / 903.3, ((luma + 16) / 116) ** 3)  # linear light of that L
    grey = tf.where(grey <= 0.0031308, 12.92 * grey, 1.055 * grey ** (1 / 2.4) - 0.055)
    same_luminance = tf.tile(grey[..., None], (1, 1, 1, 3))

    def features(rgb):
        return model.query_encoder((rgb - IMAGENET.mean) / IMAGENET.std, training=False)["features"].numpy()

    own, other = features(images), features(same_luminance)
    width = own.shape[1] // 2
    np.testing.assert_allclose(own[:, :width], other[:, :width], rtol=1e-3, atol=1e-3)
    assert np.abs(own[:, width:] - other[:, width:]).max() > 0.01


@pytest.mark.parametrize("settings", FRAMES[2:], ids=NAMES[2:])
def test_each_modality_looks_for_the_others_key_in_its_bank_which_then_moves(settings):
    model = cmc(**settings)
    (batch,) = batches(model, 1)
    numbers, _, drawn = context = model.prepare(batch)
    kept = [bank.keys.numpy().astype("float64") for bank in model.banks]
    queries = [half.astype("float64") for half in halves(model, model.query_encoder, batch["views"][0])]
    found = model.objective(batch, context)
    losses = []
    for one, other in ((0, 1), (1, 0)):
        noise = kept[other][drawn]
        log_z = np.log(RECORDS * np.mean(np.exp(queries[one] @ noise.T / T)))
        for query, number in zip(queries[one], numbers.numpy(), strict=True):
            weights = np.exp(np.array([query @ key for key in (kept[other][number], *noise)]) / T)
            if settings.get("loss") == "nce":
                own = weights / np.exp(log_z)
                own = own / (own + K / RECORDS)
                losses.append(-np.log(own[0]) - np.sum(np.log(1 - own[1:])))
            else:
                assert not set(drawn.numpy()) & set(numbers.numpy())
                losses.append(-np.log(weights[0] / weights.sum()))
    assert np.mean(found.loss) == pytest.approx(2 * np.mean(losses), rel=1e-4)
    model.finish(batch, context, found)
    for bank, before, half in zip(model.banks, kept, queries, strict=True):
        moved = (before[numbers] + half) / 2
        moved /= np.linalg.norm(moved, axis=1, keepdims=True)
        np.testing.assert_allclose(bank.keys.numpy()[numbers], moved, rtol=1e-3, atol=1e-5)
        others = np.setdiff1d(np.arange(RECORDS), numbers)
        np.testing.assert_array_equal(bank.keys.numpy()[others], before[others].astype("float32"))


@pytest.mark.parametrize(
    "settings",
    [*(pytest.param(frame, marks=pytest.mark.slow) for frame in FRAMES[:3]), FRAMES[3]],  # the queue's is MoCo's
    ids=NAMES,
)
def test_replicas_checkpoints_and_keras_files_go_on(settings, tmp_path):
    assert_goes_on(lambda: cmc(**settings), batches, tmp_path)
    assert_replicas_begin_alike(lambda: cmc(**settings), batches)


def test_features_are_both_and_the_embedding_is_of_unit_length():
    model = cmc()
    found = model.encode(tf.random.stateless_normal((3, SIZE, SIZE, 3), (0, 0)))
    assert found["features"].shape == (3, 2 * 32) and found["embedding"].shape == (3, 8)
    np.testing.assert_allclose(np.linalg.norm(found["embedding"], axis=1), 1.0, rtol=1e-5)


@pytest.mark.parametrize("augment", ["flip", "v1", "v2", "v3", "cifar"])
def test_no_crop_is_made_grey(augment):
    inputs = Preprocessing(image_size=8)
    for frame, number in (("in_batch", 1), ("queue", 2), ("memory_bank", 1)):
        kinds = task.kinds(inputs, task.Options(augment=augment, frame=frame))
        assert len(kinds) == number and all("grayscale" not in kind.steps and "flip" in kind.steps for kind in kinds)


def test_wrong_settings_are_refused():
    with pytest.raises(ValueError, match="CMC needs frame of in_batch, queue"):
        cmc(frame="bank")
    with pytest.raises(ValueError, match="CMC's memory banks need records > 0"):
        cmc(frame="memory_bank")
    with pytest.raises(ConfigError, match="--loss=nce is of keys drawn from a memory bank; got --frame=in_batch"):
        parse(["--pretext=cmc", "--loss=nce"])


def test_two_networks_have_no_names_in_pytorch():
    with pytest.raises(tensor_names.Mismatch, match="two layers are called"):
        list(tensor_names.names(cmc().query_encoder))
