"""Each operation on an image is Pillow's, on images that are not in the golden files."""

import io

import keras_cv
import numpy as np
import pytest
import tensorflow as tf
from PIL import Image, ImageEnhance, ImageFilter, ImageOps
from test_preprocessing import photograph

from moco_tf.data import image_ops
from moco_tf.data.encoded import decode
from moco_tf.data.resize import resize

IMAGE = photograph(57, 71, seed=1)
PIXELS = tf.cast(IMAGE, tf.float32)


def encode(image, suffix, **options):
    file = io.BytesIO()
    Image.fromarray(image).save(file, suffix, **options)
    return tf.constant(file.getvalue())


def assert_close(actual, expected, mean):
    expected = np.asarray(expected, np.float32)
    assert actual.shape == expected.shape
    assert np.abs(np.asarray(actual) - expected).mean() < mean


@pytest.mark.parametrize("factor", [0.0, 0.6, 1.0, 1.4])
@pytest.mark.parametrize(
    ("operation", "enhance"),
    [
        (image_ops.brightness, ImageEnhance.Brightness),
        (image_ops.contrast, ImageEnhance.Contrast),
        (image_ops.saturation, ImageEnhance.Color),
    ],
)
def test_enhancing_is_pillows(operation, enhance, factor):
    assert_close(operation(PIXELS, factor), enhance(Image.fromarray(IMAGE)).enhance(factor), mean=0.55)


@pytest.mark.parametrize("delta", [-0.4, -0.1, 0.05, 0.1, 0.4])
def test_hue_turns_pillows_colour_wheel(delta):
    hue, saturation, value = Image.fromarray(IMAGE).convert("HSV").split()
    turned = (np.asarray(hue).astype(np.int32) + int(delta * 255)) % 256
    expected = Image.merge("HSV", (Image.fromarray(turned.astype(np.uint8)), saturation, value)).convert("RGB")
    assert_close(image_ops.hue(PIXELS, delta), expected, mean=2.0)


@pytest.mark.parametrize("sigma", [0.1, 0.3, 0.7, 1.0, 1.5, 2.0])
def test_blur_is_pillows_three_boxes_up_to_the_edges(sigma):
    expected = np.asarray(Image.fromarray(IMAGE).filter(ImageFilter.GaussianBlur(sigma)), np.float32)
    actual = np.asarray(image_ops.gaussian_blur(PIXELS, tf.constant(sigma)))
    assert_close(actual, expected, mean=1.0)
    assert np.abs(actual - expected)[[0, -1]].mean() < 1.0
    assert np.abs(actual - expected)[:, [0, -1]].mean() < 1.0


@pytest.mark.parametrize("sigma", [0.1, 1.0, 1.99])
def test_blur_in_blocks_leaves_out_nothing(sigma):
    image = tf.random.stateless_uniform((64, 224, 3), (0, 1), maxval=255.0)
    expected = image_ops.gaussian_blur(image, sigma)
    np.testing.assert_allclose(image_ops.gaussian_blur(image, sigma, largest=2.0), expected, atol=1e-4)


@pytest.mark.parametrize("size", [17, 64, 150])
def test_views_are_resized_as_images_to_judge_are(size):
    expected = resize(IMAGE, (size, size))
    np.testing.assert_allclose(image_ops.resized(tf.constant(IMAGE), size), expected, atol=2e-3)


def test_blur_keeps_a_constant_image():
    constant = tf.fill((16, 24, 3), 77.0)
    np.testing.assert_allclose(image_ops.gaussian_blur(constant, 2.0), constant, rtol=1e-5)


def test_greyscale_is_pillows_and_keras_cvs():
    actual = image_ops.grayscale(PIXELS)
    assert_close(actual, Image.fromarray(IMAGE).convert("L").convert("RGB"), mean=0.55)
    np.testing.assert_allclose(actual, keras_cv.layers.Grayscale(output_channels=3)(PIXELS), atol=0.05)


def test_solarise_is_pillows_and_keras_cvs():
    actual = image_ops.solarize(PIXELS)
    np.testing.assert_array_equal(actual, ImageOps.solarize(Image.fromarray(IMAGE), 128))
    layer = keras_cv.layers.Solarization(value_range=(0, 255), threshold_factor=(128, 128))
    np.testing.assert_array_equal(actual, layer(PIXELS))


def test_flip_mirrors_left_and_right():
    np.testing.assert_array_equal(image_ops.flip(PIXELS), IMAGE[:, ::-1])


def test_jpeg_decodes_to_pillows_pixels():
    encoded = encode(IMAGE, "JPEG", quality=80)
    np.testing.assert_array_equal(decode(encoded), Image.open(io.BytesIO(encoded.numpy())))


@pytest.mark.parametrize("suffix", ["PNG", "BMP", "GIF"])
@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA"])
def test_other_formats_decode_to_three_channels(suffix, mode):
    if (suffix, mode) in (("GIF", "RGBA"), ("BMP", "L")):
        pytest.skip("Pillow writes a palette, which TensorFlow's BMP reader does not know, or changes the pixels")
    file = io.BytesIO()
    image = Image.fromarray(IMAGE).convert(mode)
    image.save(file, suffix)
    expected = Image.open(io.BytesIO(file.getvalue())).convert("RGB")
    np.testing.assert_array_equal(decode(tf.constant(file.getvalue())), expected)


def test_the_first_frame_of_an_animation_is_the_image():
    file = io.BytesIO()
    frames = [Image.fromarray(np.full((8, 9, 3), value, np.uint8)) for value in (0, 255)]
    frames[0].save(file, "GIF", save_all=True, append_images=frames[1:])
    np.testing.assert_array_equal(decode(tf.constant(file.getvalue())), np.zeros((8, 9, 3)))


@pytest.mark.parametrize(
    ("suffix", "options"), [("PNG", {}), ("JPEG", {"subsampling": 0}), ("JPEG", {"subsampling": 2})]
)
def test_a_crop_of_encoded_bytes_is_a_crop_of_the_decoded_image(suffix, options):
    encoded = encode(IMAGE, suffix, **options)
    decoded = decode(encoded).numpy()
    for top, left, height, width in [(0, 0, 57, 71), (3, 5, 20, 31), (56, 70, 1, 1), (16, 16, 16, 16), (8, 17, 9, 15)]:
        (part,) = image_ops.crops(encoded, lambda *_, box=(top, left, height, width): [box])
        np.testing.assert_array_equal(part, decoded[top : top + height, left : left + width])


@pytest.mark.parametrize("box", [(3, 5, 20, 31), (0, 0, 57, 71), (10, 2, 40, 11)])
def test_a_resized_crop_is_pillows(box):
    top, left, height, width = box
    cut = Image.fromarray(IMAGE).crop((left, top, left + width, top + height))
    (part,) = image_ops.crops(tf.constant(IMAGE), lambda *_: [box])
    assert_close(image_ops.resized(part, 32), cut.resize((32, 32), Image.BILINEAR), 0.4)


@pytest.mark.parametrize(
    ("boxes", "side", "by"),
    [
        ([(0, 0, 401, 523)], 60, 4),
        ([(0, 0, 401, 523), (101, 93, 300, 430), (127, 13, 274, 300)], 30, 8),
        ([(0, 0, 401, 523), (33, 41, 64, 90)], 16, 4),  # the smallest part says how far all are shrunk
        ([(7, 5, 128, 128)], 64, 2),
    ],
)
def test_parts_of_a_large_jpeg_that_is_shrunk_as_it_is_decoded_are_nearly_those_of_the_whole(boxes, side, by):
    coarse = np.random.default_rng(2).integers(0, 256, (6, 8, 3), np.uint8)  # without noise, which shrinks otherwise
    smooth = np.asarray(Image.fromarray(coarse).resize((523, 401), Image.BICUBIC))
    encoded = encode(smooth, "JPEG", quality=95)
    whole = image_ops.crops(encoded, lambda *_: boxes)
    parts = image_ops.crops(encoded, lambda *_: boxes, [side] * len(boxes))
    for part, exact, (_, _, height, width) in zip(parts, whole, boxes, strict=True):
        assert part.shape == (height // by, width // by, 3) and min(part.shape[:2]) >= side
        assert_close(image_ops.resized(part, side), image_ops.resized(exact, side), 2.5)


@pytest.mark.parametrize("suffix", ["JPEG", "PNG"])
def test_nothing_is_shrunk_that_is_not_twice_as_large_as_needed_or_no_jpeg(suffix):
    encoded = encode(IMAGE, suffix)
    for box, side in (((3, 5, 40, 31), 16), ((0, 0, 57, 71), 29 if suffix == "JPEG" else 4)):
        (part,) = image_ops.crops(encoded, lambda *_, box=box: [box], [side])
        (exact,) = image_ops.crops(encoded, lambda *_, box=box: [box])
        np.testing.assert_array_equal(part, exact)
