"""A pretext task that is a reconstruction: an encoder sees a corrupted image, and a decoder predicts what it was.

Each task defines how to spoil an image and what to predict: `denoise.py`, `inpaint.py`, `colorize.py`.

Axes: n images of this replica, N of the global batch, S side, D features, C channels of the prediction.
"""

from typing import ClassVar, NamedTuple

import tensorflow as tf

from moco_tf import replicas
from moco_tf.encoders import decoders, heads, resnet
from moco_tf.methods import backbones
from moco_tf.methods.losses import unit_length
from moco_tf.methods.pretrainer import Pretrainer, Spread
from moco_tf.methods.shuffle_bn import groups_here, set_groups


class Terms(NamedTuple):
    """One value per image."""

    loss: tf.Tensor  # n
    embeddings: tf.Tensor  # n x D, of unit length


class Reconstruction(Pretrainer):
    """Learns an encoder by what a decoder predicts from its last maps.

    A batch is (images,). Each image has its own loss, see `loss_of`.

    Args:
      backbone: a ResNet of this package, for images of one size.
      channels: C; None: the images' channels.
      shrinks: how many times smaller the decoder's pictures are than the images.
      bn_groups, preprocessing, seed: as in `MoCo`.

    Attributes:
      query_encoder: a model of normalised images -> {"features", "projection"}, both the mean (N, D) of its last maps.
      decoder: a model of those maps -> pictures (N, S / shrinks, S / shrinks, C).
    """

    METRICS: ClassVar[dict] = {"feature_std": Spread(lambda terms: terms.embeddings)}
    VIEWS = (1, 1)

    def __init__(self, backbone, channels=None, shrinks=1, bn_groups=None, preprocessing=None, seed=0, **kwargs):
        image_shape = backbones.image_shape(backbone, preprocessing)
        if image_shape[0] is None:
            raise ValueError(
                "a decoder makes pictures of one size: build the backbone for images of one, image_size=S"
            )
        super().__init__(image_shape, preprocessing, **kwargs)
        self.bn_groups = bn_groups
        self.groups_here = groups_here(bn_groups)
        self.seed = seed
        self.query_encoder = heads.encoder_without_head(backbone, image_shape)
        self.maps_of = resnet.maps(backbone)
        self.decoder = decoders.of_maps(
            self.maps_of.output_shape[1:], image_shape[0] // shrinks, channels or image_shape[2]
        )
        for part in (self.query_encoder, self.decoder):
            set_groups(part, self.groups_here)

    def backbones_for_xla(self):
        return []  # `maps_of` goes around the backbone

    def corrupted(self, images, draw):
        """Returns what the encoder sees of images (n, S, S, 3), and what `loss_of` needs beside them.

        draw: a function of a shape, and of `tf.random.stateless_uniform` or a similar function, -> random numbers
        (n, *shape), this replica's rows of the global batch's numbers. Call it once per step: a second call draws the
        same numbers. In evaluation it draws the numbers of step 0.
        """
        raise NotImplementedError

    def loss_of(self, predicted, images, beside):
        """Returns each image's loss (n,).

        predicted: the decoder's pictures (n, S / shrinks, S / shrinks, C) float32; beside: the second result of
        `corrupted`.
        """
        raise NotImplementedError

    def objective(self, batch, context, training=True):
        (images,) = batch["views"]
        seed = (self.seed, self.drawing_step(training))

        def draw(shape, random=tf.random.stateless_uniform):
            return replicas.draw(random, tf.shape(images)[0], shape, seed, dtype=self.totals.dtype)

        seen, beside = self.corrupted(images, draw)
        maps = self.maps_of(seen, training=training)  # n x h x h x D
        predicted = tf.cast(self.decoder(maps, training=training), self.totals.dtype)
        embeddings = unit_length(tf.reduce_mean(tf.cast(maps, predicted.dtype), axis=(1, 2)))
        return Terms(self.loss_of(predicted, tf.cast(images, predicted.dtype), beside), embeddings)

    def get_config(self):
        return super().get_config() | {"bn_groups": self.bn_groups, "seed": self.seed}
