"""Denoising: what did an image look like before noise was added?

Vincent, Larochelle, Bengio and Manzagol 2008, "Extracting and Composing Robust Features with Denoising Autoencoders".
The paper trains layer by layer, with tied weights; here a whole ResNet has a decoder behind it.
"""

import keras
import tensorflow as tf

from moco_tf import encoders
from moco_tf.methods.reconstruction import Reconstruction


def model(config, options, inputs, source):
    """The `Denoise` of a run."""
    return Denoise(
        encoders.of_config(config),
        noise=options.noise,
        level=options.noise_level,
        bn_groups=options.bn_groups,
        preprocessing=inputs,
        seed=config.seed,
    )


@keras.saving.register_keras_serializable("moco_tf")
class Denoise(Reconstruction):
    """The loss is the mean squared difference to the image, in its standard deviations. See `Reconstruction`.

    Args:
      noise: "gaussian", added to each value; or "masking", which sets whole pixels to the mean.
      level: the noise's standard deviation, in units of the data's; or the share of masked pixels.
    """

    def __init__(self, backbone, noise="gaussian", level=0.5, **settings):
        super().__init__(backbone, **settings)
        self.noise = noise
        self.level = level

    def corrupted(self, images, draw):
        shape = images.shape[1:]
        if self.noise == "masking":
            kept = draw((*shape[:2], 1)) >= self.level
            return images * tf.cast(kept, images.dtype), ()
        return images + self.level * tf.cast(draw(shape, tf.random.stateless_normal), images.dtype), ()

    def loss_of(self, predicted, images, beside):
        return tf.reduce_mean((predicted - images) ** 2, axis=(1, 2, 3))

    def get_config(self):
        return super().get_config() | {"noise": self.noise, "level": self.level}
