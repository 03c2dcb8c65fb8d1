"""Tasks that are reconstructions: what is corrupted, what is predicted, and losses as loops have them."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from exactness import assert_goes_on, assert_numeric, assert_replicas_begin_alike

import moco_tf
from moco_tf.command import ConfigError
from moco_tf.config import parse
from moco_tf.data import dataset, sources
from moco_tf.data.inputs.image import Preprocessing
from moco_tf.encoders import color_spaces, decoders, resnet
from moco_tf.methods import colorize, inpaint
from moco_tf.methods.colorize import Colorize
from moco_tf.methods.denoise import Denoise
from moco_tf.methods.inpaint import Inpaint
from moco_tf.methods.reconstruction import Reconstruction
from moco_tf.pytorch import conversion

SIZE, BATCH = 16, 4
INPUTS = Preprocessing(image_size=SIZE)


def make(kind, **settings):
    keras.utils.set_random_seed(1)
    before = (lambda images: color_spaces.luminance(images, INPUTS)) if kind is Colorize else None
    backbone = resnet.resnet10(image_size=SIZE, width=4, stem="cifar", before=before)
    model = kind(backbone, preprocessing=INPUTS, seed=3, **{"bn_groups": 2} | settings)
    model.compile(moco_tf.SGD(0.05, momentum=0.9, weight_decay=1e-3))
    return model


def batches(model, steps, seed=0):
    images = np.random.default_rng(seed).integers(0, 256, (steps * BATCH, SIZE, SIZE, 3))
    images = tf.cast(INPUTS.normalize(images), keras.config.floatx())
    return tf.data.Dataset.from_tensor_slices({"views": (images,)}).batch(BATCH, drop_remainder=True)


def seen_and_told(model, images):
    """What the encoder saw in the first step, what `corrupted` gives beside, and what the decoder predicted."""

    def draw(shape, random=tf.random.stateless_uniform):
        return random((BATCH, *shape), (3, 0), dtype=model.totals.dtype, alg="philox")

    seen, beside = model.corrupted(images, draw)
    return seen.numpy(), beside, model.decoder(model.maps_of(seen, training=True), training=True).numpy()


@pytest.mark.parametrize(
    ("kind", "settings"),
    [(Denoise, {}), (Denoise, {"noise": "masking", "level": 0.3}), (Inpaint, {}), (Colorize, {})],
    ids=["denoise", "masking", "inpaint", "colorize"],
)
def test_the_loss_is_that_of_a_loop_and_its_gradient_a_numeric_one(kind, settings, float64):
    model = make(kind, **settings)
    if kind is Colorize:
        model.weights_of_classes.assign(np.random.default_rng(1).uniform(size=len(colorize.classes())))
    (batch,) = batches(model, 1)
    (images,) = batch["views"]
    with tf.GradientTape() as tape:
        loss = tf.reduce_mean(model.objective(batch, None).loss)
    _, beside, told = seen_and_told(model, images)
    losses = []
    for number, image in enumerate(images.numpy()):
        if kind is Colorize:
            losses.append(naive_color_loss(model, told[number], beside[number].numpy()))
            continue
        squares = [
            np.mean((told[number, row, column] - image[row, column]) ** 2)
            for row in range(SIZE)
            for column in range(SIZE)
            if kind is Denoise or beside[number, row, column, 0] == 1
        ]
        losses.append(np.mean(squares))
    assert float(loss) == pytest.approx(np.mean(losses), abs=1e-9)
    variables = [*model.decoder.trainable_variables[-2:], model.query_encoder.trainable_variables[0]]
    for variable, gradient in zip(variables, tape.gradient(loss, variables), strict=True):
        value = lambda: tf.reduce_mean(model.objective(batch, None).loss)  # noqa: E731
        assert_numeric(gradient, variable, value, 1e-7, rel=1e-4, abs=1e-13)  # ReLUs have kinks


def naive_color_loss(model, told, colors):
    """Of one image: told (s, s, Q), colors (s, s, 2)."""
    centers, weights, losses = colorize.classes().astype("float64"), model.weights_of_classes.numpy(), []
    if not (np.abs(colors) > 5).any():
        return 0.0
    for scores, color in zip(told.reshape(-1, len(centers)), colors.reshape(-1, 2), strict=True):
        squares = [np.sum((color - center) ** 2) for center in centers]
        nearest = np.argsort(squares, kind="stable")[:5]
        heights = np.array([np.exp(-squares[q] / (2 * 5.0**2)) for q in nearest])
        log = scores - np.log(np.sum(np.exp(scores)))
        losses.append(-weights[nearest[0]] * np.sum(heights / heights.sum() * log[nearest]))
    return np.mean(losses)


@pytest.mark.parametrize("kind", [Inpaint, pytest.param(Denoise, marks=pytest.mark.slow)])
def test_replicas_checkpoints_and_keras_files_go_on(kind, tmp_path):
    assert_goes_on(lambda: make(kind), batches, tmp_path)
    assert_replicas_begin_alike(lambda: make(kind), batches)


def test_noise_has_its_size_and_masks_take_whole_pixels():
    images = next(iter(batches(None, 1)))["views"][0]
    noise = seen_and_told(make(Denoise, level=0.5), images)[0] - images.numpy()
    assert np.std(noise) == pytest.approx(0.5, rel=0.05) and np.mean(noise) == pytest.approx(0, abs=0.05)
    seen = seen_and_told(make(Denoise, noise="masking", level=0.3), images)[0]
    gone = (seen == 0).all(axis=-1)
    assert gone.mean() == pytest.approx(0.3, abs=0.05)
    np.testing.assert_array_equal(seen[~gone], images.numpy()[~gone])


def test_so_much_of_each_image_is_missing_in_few_regions_and_the_encoder_sees_none_of_it():
    noise = tf.random.stateless_uniform((BATCH, inpaint.COARSE, inpaint.COARSE, 1), (0, 0))
    hole = inpaint.regions(noise, 32, 0.25).numpy()
    np.testing.assert_array_equal(hole.sum(axis=(1, 2, 3)), [256] * BATCH)
    borders = np.abs(np.diff(hole, axis=1)).sum() + np.abs(np.diff(hole, axis=2)).sum()
    assert borders / BATCH < 150  # of 256 pixels one by one it would be some 800
    model = make(Inpaint)
    images = next(iter(batches(model, 1)))["views"][0]
    _, hole, told = seen_and_told(model, images)
    *_, again = seen_and_told(model, images + 5 * tf.cast(hole, images.dtype))
    np.testing.assert_array_equal(told, again)
    kept = images + 5 * tf.cast(1 - hole, images.dtype)  # what is not missing is not told
    np.testing.assert_allclose(model.loss_of(told, images, hole), model.loss_of(told, kept, hole), rtol=1e-6)


def test_the_encoder_of_colors_sees_luminance_alone_and_grey_pictures_count_for_nothing():
    model = make(Colorize)
    rgb = tf.random.stateless_uniform((BATCH, SIZE, SIZE, 3), (0, 0))
    luminance, *_ = tf.unstack(color_spaces.lab(rgb), axis=-1)
    grey = color_spaces.of_lab(tf.stack([luminance, *[tf.zeros_like(luminance)] * 2], axis=-1))
    features = [model.query_encoder(INPUTS.normalize(255 * x))["features"] for x in (rgb, grey)]
    np.testing.assert_allclose(*features, atol=1e-3)
    batch = {"views": (tf.concat([INPUTS.normalize(255 * x)[:2] for x in (rgb, grey)], axis=0),)}
    losses = model.objective(batch, None).loss.numpy()
    assert (losses[:2] > 1).all() and (losses[2:] == 0).all()


def test_an_encoder_that_converts_colors_is_not_exported_as_a_plain_network():
    with pytest.raises(ConfigError, match="a layer that PyTorch's networks do not have"):
        conversion.backbone_state_dict(make(Colorize))


@pytest.mark.parametrize("kind", [Denoise, Inpaint, Colorize])
def test_no_pass_of_a_reconstruction_is_one_that_xla_compiles_by_itself_on_replicas(kind):
    assert make(kind).backbones_for_xla() == []  # so that --xla=on is refused on several, and not ignored


def test_classes_are_the_squares_of_ten_that_colors_reach():
    rgb = tf.random.stateless_uniform((5000, 3), (0, 0))
    of_pixels = color_spaces.lab(rgb)[:, 1:]
    near, shares = colorize.nearest_classes(of_pixels)
    centers = colorize.classes()
    assert len(centers) == 260 and (centers % 10 == 0).all()
    assert np.abs(of_pixels - centers[near[:, 0]]).max() <= 7  # half of a square, or a little more at the border
    np.testing.assert_allclose(tf.reduce_sum(shares, axis=1), np.ones(5000), rtol=1e-5)
    assert (np.diff(shares, axis=1) <= 1e-7).all()


def test_rare_colors_weigh_more_and_a_pixel_one_on_average():
    counts = np.ones(len(colorize.classes()))
    counts[100] = 10_000
    weights = colorize.class_weights(counts, 0.5)
    assert weights.argmin() == 100
    np.testing.assert_allclose(colorize.class_weights(counts, 1.0), np.ones(len(counts)))
    centers = colorize.classes()
    smoothed = np.zeros(len(counts))
    for place, count in enumerate(counts):
        kernel = np.exp(-np.sum((centers - centers[place]) ** 2, axis=1) / 50)
        smoothed += count / counts.sum() * kernel / kernel.sum()
    naive = 1 / (0.5 * smoothed + 0.5 / len(counts))
    np.testing.assert_allclose(weights, naive / (naive * smoothed).sum(), rtol=1e-6)


def test_a_run_counts_the_colors_of_its_images_before_its_first_epoch():
    model, source = make(Colorize), sources.embedded("test").only(np.arange(20))
    model.before_epoch(0, source)
    counts = np.zeros(len(colorize.classes()))
    for record in source.in_order():
        near, _ = colorize.nearest_classes(colorize.colors(INPUTS.of_record(record)[None], INPUTS))
        np.add.at(counts, near[..., 0].numpy().ravel(), 1)
    np.testing.assert_allclose(model.weights_of_classes, colorize.class_weights(counts, 0.5), rtol=1e-5)
    kept = model.weights_of_classes.numpy()
    model.before_epoch(1, sources.embedded("test"))
    np.testing.assert_array_equal(model.weights_of_classes, kept)


def test_a_broken_image_among_those_that_are_counted_is_passed_over(tmp_path):
    for number in range(4):
        pixels = np.random.default_rng(number).integers(0, 256, (SIZE, SIZE, 3), np.uint8)
        (tmp_path / f"{number}.png").write_bytes(tf.io.encode_png(pixels).numpy()[: 40 if number == 2 else None])
    source = dataset.find(str(tmp_path), "", "train", 0.5).open()
    model = make(Colorize)
    model.before_epoch(0, source)
    assert np.ptp(model.weights_of_classes.numpy()) > 0


def test_features_are_the_mean_of_the_maps_and_a_decoder_doubles_them():
    model = make(Denoise)
    images = next(iter(batches(model, 1)))["views"][0]
    maps = model.maps_of(images)
    np.testing.assert_allclose(tf.reduce_mean(maps, axis=(1, 2)), model.encode(images)["features"], rtol=1e-5)
    assert model.decoder.output_shape == (None, SIZE, SIZE, 3)
    with pytest.raises(ValueError, match="doubled"):
        decoders.of_maps((3, 3, 8), 16, 3)
    with pytest.raises(ValueError, match="avgpool"):
        Reconstruction(keras.Sequential([keras.Input((8, 8, 3)), keras.layers.Flatten()]))


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--pretext=denoise", "--arch=vit_tiny", "--patch_size=4", "--image_size=32"], "--pretext=mae is for ViTs"),
        (["--pretext=inpaint", "--image_size=20", "--stem=cifar"], "a multiple of 8"),
        (["--pretext=colorize", "--image_size=40"], "a multiple of 32"),
        (["--pretext=inpaint", "--image_size=32", "--missing=1"], "is a share"),
        (["--pretext=denoise", "--image_size=32", "--noise=masking", "--noise_level=1"], "is a share below 1"),
        (["--pretext=colorize", "--image_size=32", "--rebalance=0"], "more than 0"),
    ],
)
def test_flags_that_do_not_fit_are_refused(flags, said):
    with pytest.raises(ConfigError, match=said):
        parse(flags)
