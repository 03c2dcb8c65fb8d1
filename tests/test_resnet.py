import keras
import numpy as np
import pytest
import tensorflow as tf

from moco_tf.encoders import resnet


@pytest.mark.parametrize(
    "name, parameters, features",
    [  # torchvision's published counts less the 1000-class layer
        ("resnet18", 11_689_512 - 513_000, 512),
        ("resnet34", 21_797_672 - 513_000, 512),
        ("resnet50", 25_557_032 - 2_049_000, 2048),
        ("resnet101", 44_549_160 - 2_049_000, 2048),
        ("resnet152", 60_192_808 - 2_049_000, 2048),
        ("resnext50", 25_028_904 - 2_049_000, 2048),
    ],
)
def test_parameters_number_as_many_as_torchvisions(name, parameters, features):
    with keras.StatelessScope():  # variables have shapes, and no values: those of all six take 800 MB
        model = getattr(resnet, name)(image_size=64)
    assert sum(int(np.prod(v.shape)) for v in model.trainable_variables) == parameters
    assert model.output_shape == (None, features)


@pytest.mark.parametrize("name, features", [("resnet10", 64), ("resnet14", 256), ("resnet26", 256)])
def test_shallow_and_narrow_variants_work_with_the_small_image_stem(name, features):
    model = getattr(resnet, name)(image_size=32, width=8, stem="cifar")
    assert model(np.zeros((2, 32, 32, 3), "float32")).shape == (2, features)
    assert model.get_layer("layer1.0.bn1" if name == "resnet10" else "layer1.0.bn3").output.shape[1] == 32


def test_the_3x3_convolution_has_the_stride_and_pads_both_sides():
    model = resnet.resnet14(image_size=64, width=8)
    assert model.get_layer("layer2.0.conv1").strides == (1, 1)
    assert model.get_layer("layer2.0.conv2").strides == (2, 2)
    assert model.get_layer("layer2.0.conv2.pad").padding == ((1, 1), (1, 1))


def test_no_1x1_convolution_has_a_stride_whose_gradient_onednn_gets_wrong():
    model = resnet.resnet14(image_size=64, width=8)
    graph = tf.function(model).get_concrete_function(tf.TensorSpec((1, 64, 64, 3))).graph
    kernels = {}
    for operation in graph.get_operations():
        if operation.type == "Conv2D":
            kernels.setdefault(tuple(operation.get_attr("strides")[1:3]), set()).add(operation.inputs[1].shape[0])
    assert kernels == {(1, 1): {1, 3}, (2, 2): {3, 7}}


def test_a_model_survives_keras_file(tmp_path):
    model = resnet.resnet14(image_size=32, width=8)
    model.save(tmp_path / "m.keras")
    images = np.random.default_rng(0).normal(size=(2, 32, 32, 3)).astype("float32")
    np.testing.assert_array_equal(keras.models.load_model(tmp_path / "m.keras")(images), model(images))


def test_an_unknown_stem_is_refused():
    with pytest.raises(ValueError, match="stem is 'imagenet' or 'cifar', not 'tiny'"):
        resnet.resnet10(stem="tiny")
