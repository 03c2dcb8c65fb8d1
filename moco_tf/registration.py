"""Lets Keras find this package's classes in files after `import moco_tf` alone, which loads no class and not Keras.

A `.keras` file names classes as "moco_tf>MoCo". Importing a class's module registers the class with Keras. Until then,
a stand-in under the same name imports the module when a file asks for the class.
"""

from importlib import import_module

import wrapt

# Every class of the package that is registered with Keras, and its module (a test says if one is missing).
CLASSES = {
    "AdamW": "moco_tf.optimizers",
    "Attention": "moco_tf.encoders.vit",
    "BatchNorm": "moco_tf.encoders.batch_norm",
    "ClassToken": "moco_tf.encoders.vit",
    "Cluster": "moco_tf.methods.cluster",
    "CMC": "moco_tf.methods.cmc",
    "Colorize": "moco_tf.methods.colorize",
    "ColorSpace": "moco_tf.encoders.color_spaces",
    "CombinedPatches": "moco_tf.methods.combined_patches",
    "CPC": "moco_tf.methods.cpc",
    "Denoise": "moco_tf.methods.denoise",
    "Dropout": "moco_tf.encoders.text",
    "EndToEnd": "moco_tf.methods.end_to_end",
    "Exemplar": "moco_tf.methods.exemplar",
    "FirstChannel": "moco_tf.encoders.color_spaces",
    "Gelu": "moco_tf.encoders.vit",
    "GreyPatches": "moco_tf.encoders.patch_grid",
    "Halves": "moco_tf.encoders.heads",
    "Inpaint": "moco_tf.methods.inpaint",
    "Jigsaw": "moco_tf.methods.jigsaw",
    "LARS": "moco_tf.optimizers",
    "MAE": "moco_tf.methods.mae",
    "MAEMoCo": "moco_tf.methods.mae_moco",
    "MaskTokens": "moco_tf.encoders.decoders",
    "MeanOverGrid": "moco_tf.encoders.patch_grid",
    "MeanOverWords": "moco_tf.encoders.text",
    "MemoryBank": "moco_tf.methods.memory_bank",
    "MoCo": "moco_tf.methods.moco",
    "MoCoV3": "moco_tf.methods.moco_v3",
    "PointwiseConv2D": "moco_tf.encoders.resnet",
    "Position": "moco_tf.methods.position",
    "Positions": "moco_tf.encoders.text",
    "PyramidBackbone": "moco_tf.transfer.keras_hub",
    "Rotation": "moco_tf.methods.rotation",
    "SelfAttention": "moco_tf.encoders.text",
    "SGD": "moco_tf.optimizers",
    "SimCSE": "moco_tf.methods.simcse",
    "Tokens": "moco_tf.encoders.vit",
    "Triplets": "moco_tf.methods.exemplar",
    "WithoutClassToken": "moco_tf.encoders.decoders",
}


class StandIn:
    """Stands in, for Keras, for a class that is not loaded yet."""

    def __init__(self, module, name):
        self.module = module
        self.name = name

    def from_config(self, config):
        return getattr(import_module(self.module), self.name).from_config(config)


def register_with(keras):
    """Gives Keras a stand-in for each class that it does not know."""
    known = keras.saving.get_custom_objects()
    for name, module in CLASSES.items():
        known.setdefault(f"moco_tf>{name}", StandIn(module, name))


def register():
    """Registers the stand-ins when Keras is imported, or now if it is imported already."""
    wrapt.register_post_import_hook(register_with, "keras")
