"""Writes a ResNet's weights under Detectron2's names, with the settings by which Detectron2 builds that ResNet.

The names come from the authors' converter (github.com/facebookresearch/moco, detection/), the limits from
`build_resnet_backbone` (github.com/facebookresearch/detectron2, modeling/backbone/resnet.py). Detectron2 skips a
tensor that has no place or another shape, and only logs a line, so this module refuses such a network.
`moco_tf.torch_weights --to=detectron2` calls this module.
"""

import re

import numpy as np

from moco_tf.pytorch.tensor_names import FLOATS, Mismatch, recognise, without_head

RENAMED = (  # torchvision's names -> Detectron2's; all are applied, in this order
    (r"^(?!layer)", "stem."),
    (r"^layer(\d)", lambda match: f"res{int(match[1]) + 1}"),
    (r"\bbn(\d)", r"conv\1.norm"),
    (r"\bdownsample\.0", "shortcut"),
    (r"\bdownsample\.1", "shortcut.norm"),
)
DEPTHS = {  # the depths that Detectron2 knows; groups and widths have their own settings
    "resnet18": 18,
    "resnet34": 34,
    "resnet50": 50,
    "resnet101": 101,
    "resnet152": 152,
    "resnext50": 50,
    "wide_resnet50": 50,
    "wide_resnet101": 101,
}
BASIC_WIDTH = 64  # the only width of the two depths with basic blocks


def state_dict(tensors):
    """Returns a ResNet's backbone under Detectron2's names: {name: array}, float32 and BatchNorm's int64 counters.

    Args:
      tensors: {torchvision's name: array}; a head is left out.
    """
    return {
        _renamed(name): value.astype(np.float32) if value.dtype in FLOATS else value
        for name, value in without_head(tensors).items()
    }


def _renamed(name):
    for pattern, replacement in RENAMED:
        name = re.sub(pattern, replacement, name)
    return name


def settings(tensors, preprocessing):
    """Returns Detectron2's settings that build the network of `tensors` and give it the images that it was trained on.

    Args:
      tensors: {torchvision's name: array}.
      preprocessing: has the `mean` and `std` of red, green and blue in 0..1; Detectron2 has them in 0..255.

    Returns:
      {key: value}, as Detectron2's command line takes them.

    Raises:
      Mismatch: Detectron2 has no such ResNet.
    """
    architecture = recognise(tensors)
    _check(architecture, tensors)
    inner, group, *_ = tensors["layer1.0.conv2.weight"].shape
    return {
        "MODEL.RESNETS.DEPTH": DEPTHS[architecture.arch],
        "MODEL.RESNETS.NUM_GROUPS": inner // group,
        "MODEL.RESNETS.WIDTH_PER_GROUP": group,
        "MODEL.RESNETS.STEM_OUT_CHANNELS": architecture.width,
        "MODEL.RESNETS.RES2_OUT_CHANNELS": architecture.features // 8,
        "MODEL.RESNETS.STRIDE_IN_1X1": False,
        "MODEL.PIXEL_MEAN": _of_eight_bits(preprocessing.mean),
        "MODEL.PIXEL_STD": _of_eight_bits(preprocessing.std),
        "INPUT.FORMAT": "RGB",
    }


def _of_eight_bits(values):
    return f"[{','.join(f'{255 * value:.7g}' for value in values)}]"


def _check(architecture, tensors):
    """Raises for an `Architecture` that Detectron2 cannot build with any settings."""
    if architecture.is_vit:
        rule = "Detectron2's names are those of ResNets"
    elif architecture.arch not in DEPTHS:
        rule = f"MODEL.RESNETS.DEPTH is one of {', '.join(map(str, sorted(set(DEPTHS.values()))))}"
    elif architecture.stem != "imagenet":
        rule = "Detectron2's ResNets begin with a 7x7 convolution and a max-pool (--stem=imagenet)"
    elif DEPTHS[architecture.arch] < 50 and architecture.width != BASIC_WIDTH:
        rule = f"MODEL.RESNETS.RES2_OUT_CHANNELS is {BASIC_WIDTH} for depths 18 and 34; others may have any"
    elif (channels := tensors["conv1.weight"].shape[1]) != 3:
        rule = f"Detectron2 gives red, green and blue, 3 channels, and conv1 takes {channels}"
    else:
        return
    raise Mismatch(f"{rule}; this is {architecture}: --to=pytorch writes it under PyTorch's names")
