"""ResNet and ResNeXt as torchvision defines them, so that official weights fit tensor for tensor.

Differences from `keras.applications`: the stride sits on the 3x3 convolution ("v1.5"), convolutions have no
bias, padding is explicit and symmetric (TensorFlow's SAME pads only right and below at stride 2). Layers bear
torchvision's module names. Axes: N batch, H W space, C channels.
"""

from functools import partial

import keras
from keras import layers

from moco_tf.encoders.batch_norm import BatchNorm

# He et al. 2015 (arXiv:1502.01852), over the fan out: torchvision's `kaiming_normal_(mode="fan_out")`.
KAIMING_NORMAL = {"scale": 2.0, "mode": "fan_out", "distribution": "untruncated_normal"}
NORMS = {"batch": BatchNorm, "layer": partial(layers.GroupNormalization, groups=1, epsilon=1e-5)}


def resnet(
    blocks,
    bottleneck,
    *,
    image_size=224,
    width=64,
    stem="imagenet",
    cardinality=1,
    base_width=64,
    zero_init_residual=False,
    channels=3,
    norm="batch",
    before=None,
):
    """Builds a functional model: images float32 (N, image_size, image_size, channels) -> features (N, C).

    Args:
      blocks: the number of residual blocks in each of the four stages.
      bottleneck: 1x1 - 3x3 - 1x1 blocks (C = 32 `width`) in place of two 3x3 (C = 8 `width`).
      image_size: side of the square input in pixels, or None for any size.
      width: channels of the first stage; each later stage doubles them. 64 in the paper.
      stem: "imagenet" (7x7, stride 2, then a 3x3 max-pool) or "cifar" (3x3, stride 1, no pooling).
      zero_init_residual: start the gain of each block's last BatchNorm at 0, so that blocks begin as identities
        (MoCo v3; Goyal et al. 2017, arXiv:1706.02677). v1 and v2 do not.
      channels: number of channels of the images.
      norm: "batch"; or "layer", for each image by itself, over H, W and C together.
      before: a function of the input; the first convolution sees its result. None: the input itself.
      cardinality, base_width: groups of the 3x3 convolutions and their width at stage width 64 (ResNeXt, wide).

    Sources: He et al. 2016 (arXiv:1512.03385), Xie et al. 2017 (arXiv:1611.05431), Zagoruyko and Komodakis 2016
    (arXiv:1605.07146).
    """
    if stem not in ("imagenet", "cifar"):
        raise ValueError(f"stem is 'imagenet' or 'cifar', not {stem!r}")
    if norm not in NORMS:
        raise ValueError(f"norm is 'batch' or 'layer', not {norm!r}")
    norm = NORMS[norm]
    last_norm = partial(norm, gamma_initializer="zeros" if zero_init_residual else "ones")
    inputs = keras.Input((image_size, image_size, channels))
    x = inputs if before is None else before(inputs)
    if stem == "imagenet":
        x = _convolution(x, width, 7, stride=2, name="conv1")
        x = _norm_relu(x, norm, "bn1")
        x = layers.ZeroPadding2D(1, name="pad_maxpool")(x)  # zeros never win: the inputs come out of a ReLU
        x = layers.MaxPooling2D(3, strides=2, name="maxpool")(x)
    else:
        x = _convolution(x, width, 3, name="conv1")
        x = _norm_relu(x, norm, "bn1")
    for stage, count in enumerate(blocks):
        channels = width * 2**stage
        for index in range(count):
            stride = 2 if stage > 0 and index == 0 else 1
            name = f"layer{stage + 1}.{index}"
            if bottleneck:
                inner = channels * base_width // 64 * cardinality
                x = _bottleneck(x, inner, 4 * channels, stride, cardinality, norm, last_norm, name)
            else:
                x = _basic(x, channels, stride, norm, last_norm, name)
    return keras.Model(inputs, layers.GlobalAveragePooling2D(name="avgpool")(x))


def maps(backbone):
    """A model of a ResNet's own layers: images (N, H, W, 3) -> its last maps (N, h, w, C); features are their means.

    Raises:
      ValueError: the backbone is not a ResNet of this package.
    """
    if "avgpool" not in [layer.name for layer in backbone.layers]:
        raise ValueError(f"maps are those of a ResNet of moco_tf.encoders.resnet; {backbone.name} has no avgpool")
    return keras.Model(backbone.input, backbone.get_layer("avgpool").input)


def _basic(x, channels, stride, norm, last_norm, name):
    shortcut = _shortcut(x, channels, stride, norm, name)
    x = _convolution(x, channels, 3, stride, name=f"{name}.conv1")
    x = _norm_relu(x, norm, f"{name}.bn1")
    x = _convolution(x, channels, 3, name=f"{name}.conv2")
    x = last_norm(name=f"{name}.bn2")(x)
    return layers.ReLU(name=f"{name}.relu")(layers.Add(name=f"{name}.add")([x, shortcut]))


def _bottleneck(x, inner, channels, stride, cardinality, norm, last_norm, name):
    shortcut = _shortcut(x, channels, stride, norm, name)
    x = _convolution(x, inner, 1, name=f"{name}.conv1")
    x = _norm_relu(x, norm, f"{name}.bn1")
    x = _convolution(x, inner, 3, stride, cardinality, name=f"{name}.conv2")
    x = _norm_relu(x, norm, f"{name}.bn2")
    x = _convolution(x, channels, 1, name=f"{name}.conv3")
    x = last_norm(name=f"{name}.bn3")(x)
    return layers.ReLU(name=f"{name}.relu")(layers.Add(name=f"{name}.add")([x, shortcut]))


def _shortcut(x, channels, stride, norm, name):
    if stride == 1 and x.shape[-1] == channels:
        return x
    x = _convolution(x, channels, 1, stride, name=f"{name}.downsample.0")
    return norm(name=f"{name}.downsample.1")(x)


def _convolution(x, channels, kernel, stride=1, groups=1, *, name):
    if kernel > 1 and stride > 1:  # at stride 1 SAME is symmetric already
        x = layers.ZeroPadding2D(kernel // 2, name=f"{name}.pad")(x)
    return (PointwiseConv2D if kernel == 1 else layers.Conv2D)(
        channels,
        kernel,
        strides=stride,
        padding="same" if stride == 1 else "valid",
        groups=groups,
        use_bias=False,
        kernel_initializer=keras.initializers.VarianceScaling(**KAIMING_NORMAL),
        name=name,
    )(x)


def _norm_relu(x, norm, name):
    return layers.ReLU(name=f"{name}.relu")(norm(name=name)(x))


@keras.saving.register_keras_serializable("moco_tf")
class PointwiseConv2D(layers.Conv2D):
    """A 1x1 convolution; with a stride, a 1x1 pool picks the pixels first.

    oneDNN's gradient of a strided 1x1 convolution writes past its buffer where channels are few, and is sometimes
    wrong (github.com/uxlfoundation/oneDNN/issues/6035). Picking the pixels first takes no longer.
    """

    def convolution_op(self, inputs, kernel):
        if self.strides != (1, 1):
            inputs = keras.ops.max_pool(inputs, 1, strides=self.strides)
        return keras.ops.conv(inputs, kernel, padding="valid")


# Each takes resnet()'s keywords. 10, 18 and 34 have basic blocks; 14 and 26 are shallow bottlenecks.
resnet10 = partial(resnet, (1, 1, 1, 1), False)
resnet14 = partial(resnet, (1, 1, 1, 1), True)
resnet18 = partial(resnet, (2, 2, 2, 2), False)
resnet26 = partial(resnet, (2, 2, 2, 2), True)
resnet34 = partial(resnet, (3, 4, 6, 3), False)
resnet50 = partial(resnet, (3, 4, 6, 3), True)
resnet101 = partial(resnet, (3, 4, 23, 3), True)
resnet152 = partial(resnet, (3, 8, 36, 3), True)
resnext50 = partial(resnet, (3, 4, 6, 3), True, cardinality=32, base_width=4)
wide_resnet50 = partial(resnet, (3, 4, 6, 3), True, base_width=128)  # torchvision's wide_resnet50_2
wide_resnet101 = partial(resnet, (3, 4, 23, 3), True, base_width=128)
