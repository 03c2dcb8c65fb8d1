"""Exemplar: which image is this a distorted copy of? (Dosovitskiy et al. 2014, arXiv:1406.6909)

`Exemplar` makes each image a class, with a softmax over the classes. It does not scale. `Triplets` compares copies
with other images of the batch instead, as "Revisiting Self-Supervised Visual Representation Learning" (arXiv:
1901.09005) does. It uses FaceNet's semi-hard negatives (arXiv:1503.03832).

Axes: n images of this replica, N of the global batch, V copies of each, R records, C length of an embedding.
"""

import keras
import tensorflow as tf

from moco_tf import encoders, replicas
from moco_tf.encoders import heads
from moco_tf.methods import backbones
from moco_tf.methods.bank import numbers_of
from moco_tf.methods.classification import Classification, Terms
from moco_tf.methods.losses import unit_length
from moco_tf.methods.pretrainer import Pretrainer
from moco_tf.methods.shuffle_bn import groups_here, set_groups


def model(config, options, inputs, source):
    """The `Exemplar` or `Triplets` of a run."""
    shared = {"copies": options.copies, "bn_groups": options.bn_groups, "preprocessing": inputs}
    backbone = encoders.of_config(config)
    if options.loss == "triplet":
        return Triplets(backbone, dim=config.dim, margin=options.margin, **shared)
    return Exemplar(backbone, records=source.size, seed=config.seed, **shared)


@keras.saving.register_keras_serializable("moco_tf")
class Exemplar(Classification):
    """A batch is {"views": V copies, (n, H, W, 3) each, "id": numbers of the records}. See `Classification`.

    Args:
      records: R.
      copies: V.
    """

    def __init__(self, backbone, records, copies=1, **settings):
        super().__init__(backbone, answers=records, **settings)
        self.records = records
        self.copies = copies
        self.VIEWS = (copies, copies)

    def pictures(self, batch):
        return tf.stack(batch["views"], axis=1)

    def questions(self, features, batch, training):
        """Each copy (n, V, D), and the number of its record, 0 to R - 1."""
        numbers = numbers_of(batch, self.records, "Exemplar")
        return features, tf.repeat(numbers[:, tf.newaxis], features.shape[1], axis=1)

    def get_config(self):
        return super().get_config() | {"records": self.records, "copies": self.copies}


@keras.saving.register_keras_serializable("moco_tf")
class Triplets(Pretrainer):
    """A batch is {"views": V copies, (n, H, W, 3) each}; an image's copies come closer than others, by `margin`.

    Args:
      backbone, bn_groups, preprocessing: as in `MoCo`.
      dim: C.
      copies: V.
      margin: 0.5 in the source.

    Attributes:
      query_encoder: a model of normalised images -> {"features", "projection"}.
    """

    METRICS = Classification.METRICS  # a question is an ordered pair of copies: is it nearer than all other images?

    def __init__(self, backbone, dim=128, copies=2, margin=0.5, bn_groups=None, preprocessing=None, **kwargs):
        backbone = backbones.of_one_output(backbone)
        image_shape = backbones.image_shape(backbone, preprocessing)
        super().__init__(image_shape, preprocessing, **kwargs)
        self.dim = dim
        self.copies = copies
        self.margin = margin
        self.bn_groups = bn_groups
        self.groups_here = groups_here(bn_groups)
        self.VIEWS = (copies, copies)
        self.query_encoder = heads.encoder(backbone, image_shape, "linear", dim)
        set_groups(self.query_encoder, self.groups_here)

    def objective(self, batch, context, training=True):
        images = tf.stack(batch["views"], axis=1)  # n x V x S x S x 3
        images = tf.reshape(images, (-1, *images.shape[2:]))
        embeddings = unit_length(self.query_encoder(images, training=training)["projection"])
        embeddings = tf.reshape(embeddings, (-1, self.copies, self.dim))
        everyone = replicas.gather(embeddings)  # N x V x C
        rows = replicas.own(tf.range(tf.shape(everyone)[0]))
        loss, right = semi_hard_triplets(embeddings, everyone, rows, self.margin)
        return Terms(loss, right, embeddings[:, 0])

    def get_config(self):
        return super().get_config() | {
            "dim": self.dim,
            "copies": self.copies,
            "margin": self.margin,
            "bn_groups": self.bn_groups,
        }


def semi_hard_triplets(embeddings, everyone, rows, margin):
    """The triplet loss of each image (n,), and the share of its pairs that are nearer than all other images (n,).

    For each copy a of an image and each other copy p of it, with d the squared distance,

        max(0, d(a, p) - d(a, x) + margin)

    where x is the nearest of the other images' copies that are further than p. If no copy is further, x is the
    furthest of the other images' copies (FaceNet, arXiv:1503.03832, as in TensorFlow Addons).

    Args:
      embeddings: (n, V, C), of unit length.
      everyone: (N, V, C): the embeddings of the global batch.
      rows: (n,) integers: the images' places in the global batch.
    """
    copies = embeddings.shape[1]
    distances = 2 - 2 * tf.einsum("avc,bwc->avbw", embeddings, everyone)  # n x V x N x V
    same = tf.one_hot(rows, tf.shape(everyone)[0], on_value=True, off_value=False, dtype=tf.bool)
    own = tf.gather(distances, rows, axis=2, batch_dims=1)  # n x V (an image's) x V
    others = tf.where(same[:, None, :, None], tf.constant(float("inf"), distances.dtype), distances)
    others = tf.reshape(others, (tf.shape(others)[0], copies, -1))  # n x V x N V
    furthest = tf.reduce_max(tf.where(tf.math.is_finite(others), others, -tf.ones_like(others)), axis=2)
    losses, right = [], []
    for step in range(1, copies):  # p is the copy `step` places further on
        pair = tf.stack([own[:, place, (place + step) % copies] for place in range(copies)], axis=1)  # n x V
        further = tf.where(others > pair[..., None], others, tf.constant(float("inf"), others.dtype))
        nearest = tf.reduce_min(further, axis=2)
        negative = tf.where(tf.math.is_finite(nearest), nearest, furthest)
        losses.append(tf.nn.relu(pair - negative + margin))
        right.append(tf.cast(pair < tf.reduce_min(others, axis=2), pair.dtype))
    return tuple(tf.reduce_mean(tf.concat(values, axis=1), axis=1) for values in (losses, right))
