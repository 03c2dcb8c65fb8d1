"""The preprocessing an encoder carries is torchvision's Resize, CenterCrop and Normalize."""

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image

from moco_tf.data.inputs.image import CIFAR10, IMAGENET, Preprocessing
from moco_tf.data.resize import resize, triangle_weights


def photograph(height, width, seed=0):
    """A smooth random image with some texture, uint8."""
    generator = np.random.default_rng(seed)
    coarse = Image.fromarray(generator.integers(0, 256, (6, 8, 3), np.uint8)).resize((width, height), Image.BICUBIC)
    noisy = np.asarray(coarse, np.float32) + generator.normal(0, 8, (height, width, 3))
    return noisy.clip(0, 255).astype(np.uint8)


def by_pillow(image, shorter, size):
    """Resize(shorter) and CenterCrop(size) as torchvision does them with Pillow."""
    height, width = image.shape[:2]
    resized = [int(shorter * length / min(height, width)) for length in (height, width)]
    pixels = np.asarray(Image.fromarray(image).resize(resized[::-1], Image.BILINEAR))
    top, left = (round((length - size) / 2.0) for length in resized)
    return pixels[top : top + size, left : left + size]


@pytest.mark.parametrize("shape", [(60, 90), (91, 57), (400, 301), (20, 31), (64, 64)])
@pytest.mark.parametrize("preprocessing", [Preprocessing(56), Preprocessing(48, crop_ratio=1.0)])
def test_it_is_pillows_resize_and_centre_crop(shape, preprocessing):
    image = photograph(*shape)
    size = preprocessing.image_size
    expected = by_pillow(image, round(size / preprocessing.crop_ratio), size)
    actual = preprocessing.denormalize(preprocessing(image[np.newaxis]))[0]
    np.testing.assert_allclose(actual, expected, atol=1.6)
    assert np.abs(actual - expected).mean() < 0.4


def test_unknown_shapes_give_what_known_shapes_give():
    preprocessing = Preprocessing(32)
    traced = tf.function(preprocessing, input_signature=[tf.TensorSpec((None, None, None, 3), tf.uint8)])
    for shape in [(40, 61), (61, 40), (32, 32)]:
        images = np.stack([photograph(*shape, seed=seed) for seed in range(2)])
        np.testing.assert_allclose(traced(images), preprocessing(images), atol=1e-5)


def test_integers_and_floats_give_the_same():
    image = photograph(50, 40)[np.newaxis]
    np.testing.assert_array_equal(IMAGENET(image), IMAGENET(image.astype(np.float32)))


def test_images_of_the_right_size_are_only_normalised():
    images = photograph(32, 32)[np.newaxis]
    np.testing.assert_array_equal(CIFAR10(images), CIFAR10.normalize(images))
    graph = tf.function(CIFAR10).get_concrete_function(tf.TensorSpec((None, 32, 32, 3), tf.uint8)).graph
    assert "MatMul" not in {op.type for op in graph.get_operations()}


def test_normalize_subtracts_the_mean_and_divides_by_the_deviation():
    white = np.full((1, 2, 2, 3), 255, np.uint8)
    expected = [(1 - mean) / std for mean, std in zip(IMAGENET.mean, IMAGENET.std, strict=True)]
    np.testing.assert_allclose(IMAGENET.normalize(white)[0, 0, 0], expected, rtol=1e-5)
    np.testing.assert_allclose(IMAGENET.denormalize(IMAGENET.normalize(white)), white, rtol=1e-5)


@pytest.mark.parametrize(("length", "resized"), [(10, 4), (4, 10), (7, 7), (1, 5), (50, 1)])
def test_every_pixel_is_an_average(length, resized):
    weights = triangle_weights(length, resized, resized)
    assert weights.shape == (resized, length)
    np.testing.assert_allclose(tf.reduce_sum(weights, axis=1), np.ones(resized), rtol=1e-6)


def test_a_cut_is_a_part_of_the_whole_resized_image():
    image = photograph(30, 50)
    whole = resize(image, (40, 70))
    cut = resize(image, (40, 70), size=(8, 9), offset=(5, 60))
    np.testing.assert_allclose(cut, whole[5:13, 60:69], atol=1e-4)


@pytest.mark.parametrize("wrong", [{"image_size": 0}, {"crop_ratio": 0.0}, {"crop_ratio": 1.1}])
def test_impossible_sizes_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Preprocessing(**wrong)


@pytest.mark.parametrize("shape", [(32, 32), (32, 40), (40, 32), (33, 33), (16, 16)])
def test_a_file_becomes_the_same_bits_as_its_pixels(shape):
    file = tf.io.encode_jpeg(photograph(*shape))
    pixels = tf.io.decode_jpeg(file, dct_method="INTEGER_ACCURATE")
    of_encoded = tf.function(CIFAR10.of_encoded)
    expected = tf.function(CIFAR10, input_signature=[tf.TensorSpec((None, None, None, 3), tf.uint8)])
    np.testing.assert_array_equal(of_encoded(file), expected(pixels[tf.newaxis])[0])


@pytest.mark.parametrize("shape", [(1024, 1031), (2000, 601)])
@pytest.mark.parametrize("preprocessing", [Preprocessing(56), Preprocessing(48, crop_ratio=1.0)])
def test_the_central_view_of_a_large_picture_is_that_of_the_matrices(shape, preprocessing):
    image = photograph(*shape)
    view = preprocessing.of_record({"image": tf.constant(image)})
    by_matrices = preprocessing(image[None])[0]
    np.testing.assert_allclose(view, by_matrices, atol=2e-3 / 255 / min(preprocessing.std))
    assert np.any(view != by_matrices)  # another way
    grey = preprocessing.of_record({"image": tf.constant(image[..., :1])})
    np.testing.assert_array_equal(grey, preprocessing.of_record({"image": tf.repeat(image[..., :1], 3, axis=-1)}))


@pytest.mark.parametrize("shape", [(64, 17_000), (17_000, 64)])
def test_a_large_picture_that_is_long_and_thin_is_never_resized_whole(shape):
    image = photograph(*shape)
    view = Preprocessing(32).of_record({"image": tf.constant(image)})
    np.testing.assert_array_equal(view, Preprocessing(32)(image[None])[0])
