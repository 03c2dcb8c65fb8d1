"""An encoder in training whose ViT sees only the class token and a random share of the patches.

For MoCo v3 with token dropout, MAE, and the method that joins them. Which patches an image keeps is a function of a
seed and of its row in the global batch, so that a run resumes bit for bit and replicas do what one device does.

Axes: n images of this replica, H W image, L patches of an image, M kept ones, D width, C length of the projection.
"""

from typing import NamedTuple

import tensorflow as tf

from moco_tf import replicas
from moco_tf.encoders import heads, vit
from moco_tf.methods.keras_internals import layers_of


class Seen(NamedTuple):
    """An encoder's outputs for some patches."""

    projection: tf.Tensor  # n x C
    tokens: tf.Tensor  # n x (1 + M) x D, the class token first, after the last LayerNorm
    kept: tf.Tensor  # n x M, the patches' numbers, row by row, in no order


def encoder_of(encoder, share):
    """Makes a function that encodes with a random `share` of a ViT's patches, at least one.

    Positions are added before patches are left out.

    Returns:
      A function (images (n, H, W, 3), seed of two integers, training) -> `Seen`. Replica r keeps the patches of
      rows r * n to (r + 1) * n of the global batch.
    """
    backbone = heads.backbone_of(encoder)
    if "tokens" not in [layer.name for layer in layers_of(backbone)]:
        raise ValueError("patches are left out of a ViT of moco_tf.encoders.vit; this backbone has no layer of tokens")
    patches = number(backbone)
    kept = number_kept(patches, share)
    embed, blocks = vit.parts(backbone, kept)
    head = heads.projection(encoder)

    def see(images, seed, training=True):
        tokens = embed(images, training=training)  # n x (1 + L) x D
        places = replicas.own(vit.patches_kept(replicas.count() * tf.shape(images)[0], patches, kept, seed))
        some = tf.gather(tokens, 1 + places, axis=1, batch_dims=1)  # n x M x D
        seen = blocks(tf.concat([tokens[:, :1], some], axis=1), training=training)
        return Seen(head(seen["features"], training=training), seen["tokens"], places)

    return see


def number(backbone):
    """Returns L of a ViT."""
    return backbone.get_layer("tokens").output.shape[1] - 1


def number_kept(patches, share):
    """Returns M, how many of `patches` patches are kept."""
    return max(1, round(share * patches))
