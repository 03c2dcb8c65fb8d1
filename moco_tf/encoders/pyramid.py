"""Maps of a trained encoder at several strides, for the heads of detectors and segmenters.

`pyramid` finds P2 to P5 (strides 4, 8, 16, 32) among a ResNet's layers by their names. Lin et al. 2017
(arXiv:1612.03144) use the names C2 to C5 for what keras-cv and keras-hub call P2 to P5. A ViT has one stride;
(de)convolutions make a simple pyramid from its last map (Li et al. 2022, ViTDet, arXiv:2203.16527). `moco_tf.transfer`
calls `pyramid`.
"""

import re

import keras
from keras import layers

from moco_tf.encoders import vit

LEVELS = ("P2", "P3", "P4", "P5")  # level l has stride 2 ** l
STAGE_END = re.compile(r"layer([1-4])\.(\d+)\.relu")
VIT_STRIDE = 16  # the patches of the papers' ViTs
VIT_CHANNELS = 256  # of all levels that grow from a ViT's map, as in ViTDet


def pyramid(model, dilated=False):
    """The maps of an encoder: a functional model of normalised images, float32 (N, H, W, C).

    A ResNet's pyramid takes images of any size. It shares the encoder's layers, so training one of the two models
    trains both. A ViT's pyramid takes images of the encoder's size, and the layers after the ViT's own are new.

    Args:
      model: a backbone (`moco_tf.encoders.resnet` or `vit`), or a model that has one as `backbone`, such as MoCo.
      dilated: the last stage keeps stride 16 with 3x3 convolutions of dilation 2, as in the paper's segmenter
        (He et al. 2020, appendix). The pyramid's layers are then copies.

    Returns:
      A `keras.Model`: images -> {"P2": (N, H / 4, W / 4, C2), ..., "P5": (N, H / 32, W / 32, C5)}. keras-cv's heads
      read its `pyramid_level_inputs`, names of layers. keras-hub's heads read its `pyramid_outputs`, tensors.

    Raises:
      ValueError: the model does not have these maps.
    """
    backbone = getattr(model, "backbone", model)
    names = [layer.name for layer in backbone.layers]
    if "patch_embed.proj" in names:
        if dilated:
            raise ValueError("a ViT has no convolutions to dilate; take dilated=False, or a ResNet")
        return _of_vit(backbone)
    ends = {match[1]: match[0] for match in map(STAGE_END.fullmatch, names) if match}  # the last block of each stage
    if len(ends) < len(LEVELS):
        raise ValueError(
            "a pyramid is read off the layers layer1.N.relu to layer4.N.relu of a ResNet of moco_tf.encoders.resnet, "
            f"or grows from one of its ViTs; {backbone.name} has {', '.join(sorted(ends.values())) or 'neither'}"
        )
    if "maxpool" not in names:
        raise ValueError(
            "a pyramid has strides 4, 8, 16 and 32, those of stem='imagenet'; with the cifar stem they are 1, 2, 4 "
            "and 8, whose maps are as large as the image: pre-train with --stem=imagenet"
        )
    return _with_levels(_of_any_size(backbone, ends, dilated))


def _of_any_size(backbone, ends, dilated):
    """Returns (images, {level: map}) from a ResNet's layers, for images of any size."""
    maps = keras.Model(backbone.input, [backbone.get_layer(ends[stage]).output for stage in sorted(ends)])
    images = keras.Input((None, None, backbone.input.shape[-1]), name="images")
    copy = keras.models.clone_model(
        maps, input_tensors=images, clone_function=_dilated if dilated else lambda layer: layer
    )
    if dilated:
        for layer in filter(lambda layer: layer.weights, maps.layers):
            copy.get_layer(layer.name).set_weights(layer.get_weights())
    return images, dict(zip(LEVELS, copy.outputs, strict=True))


def _dilated(layer):
    """Returns a copy of a layer, with fresh weights.

    In the last stage the copy has no stride, and a 3x3 convolution is dilated.
    """
    config = layer.get_config()
    if layer.name.startswith("layer4."):
        if isinstance(layer, layers.ZeroPadding2D):  # symmetric, before a 3x3 convolution that had a stride
            config["padding"] = 2
        elif isinstance(layer, layers.Conv2D):
            config["strides"] = 1
            if tuple(layer.kernel_size) == (3, 3):
                config["dilation_rate"] = 2
    return type(layer).from_config(config)


def _of_vit(backbone):
    """Returns (images, {level: map}) from a ViT's last tokens after its last LayerNorm, as ViTDet makes them."""
    patch = backbone.get_layer("patch_embed.proj").strides[0]
    if patch != VIT_STRIDE:
        raise ValueError(f"a ViT's pyramid grows from patches of {VIT_STRIDE} pixels, strides 4 to 32; got {patch}")
    side = backbone.get_layer("tokens").side
    tokens = backbone.get_layer("norm")(backbone.get_layer("class_token").input)  # N x T x D
    dim = tokens.shape[-1]
    x = layers.Reshape((side, side, dim), name="pyramid.map")(
        layers.Cropping1D((1, 0), name="pyramid.patches")(tokens)
    )
    up = _upsampled(x, dim // 2, "pyramid.up1")
    halved = layers.Activation("gelu", name="pyramid.up1.act")(vit.layer_norm(up, "pyramid.up1.norm"))
    grown = {
        "P2": _upsampled(halved, dim // 4, "pyramid.up2"),
        "P3": _upsampled(x, dim // 2, "pyramid.up"),
        "P4": x,
        "P5": layers.MaxPooling2D(2, name="pyramid.down")(x),
    }
    return _with_levels((backbone.input, {level: _even(value, f"pyramid.{level}") for level, value in grown.items()}))


def _upsampled(x, channels, name):
    return layers.Conv2DTranspose(channels, 2, strides=2, name=name)(x)


def _even(x, name):
    """Gives all levels the same number of channels: a 1x1 and a 3x3 convolution, each before a LayerNorm."""
    x = layers.Conv2D(VIT_CHANNELS, 1, use_bias=False, name=f"{name}.conv1")(x)
    x = vit.layer_norm(x, f"{name}.norm1")
    x = layers.Conv2D(VIT_CHANNELS, 3, padding="same", use_bias=False, name=f"{name}.conv2")(x)
    return vit.layer_norm(x, f"{name}.norm2")


def _with_levels(images_and_maps):
    images, maps = images_and_maps
    # Separate layers: by them keras-cv finds the maps of this model, and not those of the encoder.
    outputs = {level: layers.Identity(name=level)(value) for level, value in maps.items()}
    model = keras.Model(images, outputs, name="pyramid")
    model.pyramid_level_inputs = {level: level for level in LEVELS}
    model.pyramid_outputs = outputs
    return model
