"""An encoder's pyramid in the form that keras-hub's heads take and save; needs keras-hub, not part of this package.

docs/transfer.md shows a RetinaNet on it.
"""

import math

import keras
import keras_hub

from moco_tf.encoders.pyramid import pyramid


@keras.saving.register_keras_serializable("moco_tf")
class PyramidBackbone(keras_hub.models.FeaturePyramidBackbone):
    """A `FeaturePyramidBackbone` with P2 to P5 of an encoder; saving includes the encoder, loading is bit for bit.

    Args:
      encoder: as `encoders.pyramid.pyramid` takes it; its layers are shared.
      dilated: as `encoders.pyramid.pyramid` takes it.
    """

    def __init__(self, encoder, dilated=False, dtype=None, **kwargs):
        backbone = getattr(encoder, "backbone", encoder)
        maps = pyramid(backbone, dilated)
        super().__init__(inputs=maps.input, outputs=maps.output, dtype=dtype, **kwargs)
        self.encoder, self.dilated = backbone, dilated
        self.pyramid_outputs = maps.pyramid_outputs

    def get_config(self):
        encoder = keras.saving.serialize_keras_object(self.encoder)
        return super().get_config() | {"encoder": encoder, "dilated": self.dilated}

    @classmethod
    def from_config(cls, config):
        return super().from_config(config | {"encoder": keras.saving.deserialize_keras_object(config["encoder"])})


def set_prior(detector, probability=0.01):
    """Gives a keras-hub RetinaNet the biases of the paper: background likely for the classes, 0 for the boxes.

    keras-hub 0.32 sets the prior on the box head instead, so the first losses are in the hundreds (Lin et al. 2017,
    arXiv:1708.02002, section 4.1).
    """
    for name, bias in (("classification_head", -math.log((1 - probability) / probability)), ("box_head", 0.0)):
        variable = detector.get_layer(name).prediction_layer.bias
        variable.assign(keras.ops.full(variable.shape, bias, variable.dtype))
