"""P2 to P5 of an encoder: its own layers, at four strides, on images of any size."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from moco_tf import MoCo
from moco_tf.encoders import resnet, vit
from moco_tf.encoders.pyramid import LEVELS, pyramid

IMAGES = np.random.default_rng(0).normal(size=(2, 64, 64, 3)).astype(np.float32)


def with_statistics(backbone):
    """The same backbone, whose BatchNorm layers have seen something."""
    backbone(IMAGES, training=True)
    return backbone


@pytest.mark.parametrize("make", [resnet.resnet10, resnet.resnet14, resnet.resnet18])
def test_the_last_map_pooled_is_the_encoders_features_to_the_bit(make):
    backbone = with_statistics(make(image_size=64, width=8))
    maps = pyramid(backbone)(IMAGES)
    assert [maps[level].shape[1] for level in LEVELS] == [16, 8, 4, 2]
    pooled = keras.layers.GlobalAveragePooling2D()(maps["P5"])
    assert np.array_equal(pooled, backbone(IMAGES))


def test_images_may_have_any_size():
    maps = pyramid(resnet.resnet10(image_size=64, width=4))(np.zeros((1, 96, 160, 3), np.float32))
    assert [tuple(maps[level].shape[1:3]) for level in LEVELS] == [(24, 40), (12, 20), (6, 10), (3, 5)]


def test_weights_are_the_encoders_own():
    model = MoCo(resnet.resnet10(image_size=64, width=4), dim=8, queue_size=16)
    maps = pyramid(model)
    assert all(mine is its for mine, its in zip(maps.weights, model.backbone.weights, strict=True))


def test_a_dilated_last_stage_sees_what_the_stride_leaves_out():
    """At every second place it is the stage with stride, whose 3x3 kernels then reach as far."""
    backbone = with_statistics(resnet.resnet10(image_size=64, width=8))
    maps, dilated = pyramid(backbone)(IMAGES), pyramid(backbone, dilated=True)(IMAGES)
    assert dilated["P5"].shape == (2, 4, 4, 64) and np.array_equal(maps["P4"], dilated["P4"])
    # The first convolution of the stage has stride 2 there and dilation 2 here: they see other pixels. The shortcut, a
    # 1x1 convolution, sees the same ones at every second place.
    models = backbone, pyramid(backbone, dilated=True)
    shortcut = [keras.Model(model.input, model.get_layer("layer4.0.downsample.1").output) for model in models]
    with_stride, without = (model(IMAGES) for model in shortcut)
    np.testing.assert_allclose(without[:, ::2, ::2], with_stride, rtol=1e-5, atol=1e-6)


def test_a_dilated_convolution_is_a_naive_loop_over_every_second_pixel():
    backbone = with_statistics(resnet.resnet10(image_size=64, width=4))
    maps = pyramid(backbone, dilated=True)
    layer = maps.get_layer("layer4.0.conv1")
    before = keras.Model(maps.input, maps.get_layer("layer3.0.relu").output)(IMAGES).numpy()
    after = keras.Model(maps.input, layer.output)(IMAGES).numpy()
    kernel, padded = layer.kernel.numpy(), np.pad(before, ((0, 0), (2, 2), (2, 2), (0, 0)))
    expected = np.zeros_like(after)
    for row in range(after.shape[1]):
        for column in range(after.shape[2]):
            for i in range(3):
                for j in range(3):
                    expected[:, row, column] += padded[:, row + 2 * i, column + 2 * j] @ kernel[i, j]
    np.testing.assert_allclose(after, expected, rtol=1e-4, atol=1e-5)


def test_a_vit_grows_four_levels_from_its_last_map():
    backbone = vit.vit(32, 2, 2, image_size=64)
    maps = pyramid(backbone)
    assert {level: tuple(maps(IMAGES)[level].shape[1:]) for level in LEVELS} == {
        "P2": (16, 16, 256), "P3": (8, 8, 256), "P4": (4, 4, 256), "P5": (2, 2, 256),
    }  # fmt: skip
    assert all(any(weight is mine for mine in maps.weights) for weight in backbone.weights)


def test_what_has_no_pyramid_is_refused():
    with pytest.raises(ValueError, match="cifar stem they are 1, 2, 4"):
        pyramid(resnet.resnet10(image_size=32, width=4, stem="cifar"))
    with pytest.raises(ValueError, match=r"layer1\.N\.relu"):
        pyramid(keras.Sequential([keras.Input((8, 8, 3)), keras.layers.Flatten()]))
    with pytest.raises(ValueError, match="patches of 16 pixels"):
        pyramid(vit.vit(32, 1, 2, image_size=32, patch_size=8))
    with pytest.raises(ValueError, match="no convolutions to dilate"):
        pyramid(vit.vit(32, 1, 2, image_size=32), dilated=True)


def test_a_layer_that_is_not_to_train_infers():
    """`trainable = False` leaves statistics and outputs of BatchNorm as they are, as Keras' own does."""
    backbone = with_statistics(resnet.resnet10(image_size=64, width=4))
    for layer in backbone.layers:
        layer.trainable = False
    before = [weight.numpy() for weight in backbone.weights]
    assert np.array_equal(backbone(IMAGES, training=True), backbone(IMAGES, training=False))
    assert all(np.array_equal(weight, kept) for weight, kept in zip(backbone.weights, before, strict=True))


def hub():
    return pytest.importorskip("keras_hub", reason="keras-hub is not installed")


def hub_detector(maps):
    backbone = hub().models.RetinaNetBackbone(
        image_encoder=maps, min_level=3, max_level=5, use_p5=True, image_shape=(64, 64, 3)
    )
    return hub().models.RetinaNetObjectDetector(
        backbone=backbone, num_classes=2, bounding_box_format="xyxy", pre_logits_num_conv_layers=1
    )


@pytest.mark.slow
def test_keras_hubs_heads_take_the_pyramid_and_save_it_exactly(tmp_path):
    hub()
    from moco_tf.transfer.keras_hub import PyramidBackbone

    backbone = with_statistics(resnet.resnet10(image_size=64, width=4))
    detector = hub_detector(PyramidBackbone(backbone))
    segmenter = hub().models.DeepLabV3Backbone(
        image_encoder=PyramidBackbone(backbone), low_level_feature_key="P2", spatial_pyramid_pooling_key="P5",
        upsampling_size=8, dilation_rates=[1, 2, 3], projection_filters=8, spatial_pyramid_pooling_filters=8,
        image_shape=(64, 64, 3),
    )  # fmt: skip
    for number, model in enumerate((detector, segmenter)):
        model.save(tmp_path / f"{number}.keras")
        again = keras.models.load_model(tmp_path / f"{number}.keras")
        before, after = (tf.nest.flatten(m(IMAGES, training=False)) for m in (model, again))
        assert all(np.array_equal(a, b) for a, b in zip(before, after, strict=True))


@pytest.mark.slow
def test_keras_hub_still_sets_its_prior_on_the_wrong_head_and_ours_is_the_papers():
    """Fails when upstream mends it: `set_prior` can go then."""
    hub()
    from moco_tf.transfer.keras_hub import PyramidBackbone, set_prior

    detector = hub_detector(PyramidBackbone(resnet.resnet10(image_size=64, width=4)))
    biases = lambda: [  # noqa: E731
        detector.get_layer(name).prediction_layer.bias.numpy() for name in ("classification_head", "box_head")
    ]
    prior = -np.log(99)
    assert np.allclose(biases()[0], 0) and np.allclose(biases()[1], prior)
    set_prior(detector)
    assert np.allclose(biases()[0], prior) and np.allclose(biases()[1], 0)


def test_a_served_encoder_gives_its_maps_where_asked_to(tmp_path):
    import moco_tf

    model = MoCo(with_statistics(resnet.resnet10(image_size=64, width=4)), dim=8, queue_size=16)
    moco_tf.export_encoder(model, tmp_path / "1", feature_maps=True)
    signatures = tf.saved_model.load(str(tmp_path / "1")).signatures
    assert set(signatures) >= {"serving_default", "encoded_images", "preprocessed", "feature_maps"}
    maps, wide = moco_tf.encoders.pyramid(model), np.concatenate([IMAGES, IMAGES], axis=2)
    for images in (IMAGES, wide):
        served = signatures["feature_maps"](images=tf.constant(images))
        for level, value in maps(images).items():
            np.testing.assert_allclose(served[level], value, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="cifar stem"):
        small = MoCo(resnet.resnet10(image_size=32, width=4, stem="cifar"), dim=8, queue_size=16)
        moco_tf.export_encoder(small, tmp_path / "2", feature_maps=True)
