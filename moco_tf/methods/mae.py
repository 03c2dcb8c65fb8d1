"""Masked autoencoder: predict the pixels of the other patches from a quarter of an image's patches (MAE).

He et al. 2021, "Masked Autoencoders Are Scalable Vision Learners" (arXiv:2111.06377), section 3: a random part of the
patches is hidden, and the encoder sees only the others. A light decoder takes the encoder's tokens and mask tokens.
The loss is the squared error at the hidden patches, whose pixels are normalised patch by patch.

Differs from the paper: blocks and class token start with MoCo v3's initial weights, crops are resized bilinearly, and
the decoder is smaller by default.

Axes: n images of this replica, H W image, L patches of an image, M visible ones, P side of a patch, D width.
"""

import math
from typing import ClassVar, NamedTuple

import keras
import tensorflow as tf

from moco_tf import encoders
from moco_tf.encoders import decoders, heads
from moco_tf.methods import backbones, some_patches
from moco_tf.methods.losses import full
from moco_tf.methods.pretrainer import Pretrainer

EPSILON = 1e-6  # added to a patch's variance


def model(config, options, inputs, source):
    """The `MAE` of a run."""
    return MAE(
        encoders.of_config(config),
        mask_ratio=options.mask_ratio,
        decoder_depth=options.decoder_depth,
        decoder_width=options.decoder_width,
        norm_targets=options.norm_targets,
        preprocessing=inputs,
        seed=config.seed,
    )


def patchify(images, side):
    """Images (n, H, W, C) -> the pixels of their patches, row by row, (n, L, P P C); P: `side`."""
    height, width, channels = images.shape[1:]
    rows, columns = height // side, width // side
    patches = tf.reshape(images, (-1, rows, side, columns, side, channels))
    return tf.reshape(tf.transpose(patches, (0, 1, 3, 2, 4, 5)), (-1, rows * columns, side * side * channels))


def targets(images, side, normalised=True):
    """Returns the targets of each patch, (n, L, P P C): its pixels, with mean 0 and variance 1 if `normalised`.

    The variance is the unbiased one, as in PyTorch's `var`, which the authors use; 1e-6 is added to it.
    """
    patches = patchify(images, side)
    if not normalised:
        return patches
    mean, variance = tf.nn.moments(patches, axes=[2], keepdims=True)
    pixels = patches.shape[2]
    return (patches - mean) / tf.sqrt(variance * (pixels / (pixels - 1)) + EPSILON)


def masked_error(predicted, wanted, hidden):
    """The mean squared error of each image, (n,), over the pixels of its hidden patches alone.

    predicted, wanted: (n, L, P P C); hidden: bool (n, L), at least one per image.
    """
    weights = tf.cast(hidden, predicted.dtype)
    errors = tf.reduce_mean((predicted - wanted) ** 2, axis=2)  # n x L
    return tf.reduce_sum(weights * errors, axis=1) / tf.reduce_sum(weights, axis=1)


def masked_correlation(predicted, wanted, hidden):
    """Returns Pearson's correlation of predicted and wanted pixels over each image's hidden ones, (n,): -1 to 1."""
    weights = tf.cast(hidden, predicted.dtype)[..., tf.newaxis]
    number = tf.reduce_sum(weights, axis=(1, 2), keepdims=True) * predicted.shape[2]

    def centred(values):
        return weights * (values - tf.reduce_sum(weights * values, axis=(1, 2), keepdims=True) / number)

    one, other = centred(predicted), centred(wanted)
    lengths = tf.sqrt(tf.reduce_sum(one**2, axis=(1, 2)) * tf.reduce_sum(other**2, axis=(1, 2)))
    return tf.math.divide_no_nan(tf.reduce_sum(one * other, axis=(1, 2)), lengths)


def decoder(backbone, mask_ratio, depth, width):
    """Returns a decoder for a ViT that sees 1 - `mask_ratio` of its patches, and P, the patches' side in pixels.

    Raises:
      ValueError: no patch is hidden, or all patches are.
    """
    patches = some_patches.number(backbone)
    kept = some_patches.number_kept(patches, 1 - mask_ratio)
    if not 0 < mask_ratio < 1 or kept == patches:
        raise ValueError(
            f"mask_ratio is the share of {patches} patches that is hidden, at least one and not all; got {mask_ratio}"
        )
    side = math.isqrt(patches)
    patch_size = backbone.input_shape[1] // side
    dim = backbone.output_shape[-1]
    return decoders.of_tokens(dim, kept, side, patch_size, depth, width, backbone.input_shape[3]), patch_size


def reconstruct(decoder, seen, images, side, normalised, training):
    """Returns the decoder's pixels and the target pixels, (n, L, P P C) each, and which are hidden, bool (n, L).

    seen: a `some_patches.Seen` of the images (n, H, W, C).
    """
    predicted = full(decoder([seen.tokens, seen.kept], training=training))
    _, hidden = decoders.places(seen.kept, predicted.shape[1])
    return predicted, targets(tf.cast(images, predicted.dtype), side, normalised), hidden


class Terms(NamedTuple):
    """The terms of the loss, one value per image."""

    loss: tf.Tensor  # n: the mean over the hidden patches
    correlation: tf.Tensor  # n, -1 to 1


@keras.saving.register_keras_serializable("moco_tf")
class MAE(Pretrainer):
    """Learns a ViT by predicting hidden patches from visible ones; a batch is (images,).

    Features are the class token after the last LayerNorm, as in this package's ViTs. No loss uses the class token
    directly. It learns because the patches attend to it, in the encoder and in the decoder, which takes it too. There
    is no head: the embedding is the features, scaled to unit length.

    Args:
      backbone: a ViT of `moco_tf.encoders.vit`, whose patch projection learns (`freeze_patch=False`).
      mask_ratio: share of the patches that are hidden, drawn anew for each image; 0.75 in the paper.
      decoder_depth, decoder_width: number of blocks and width of the decoder; 8 and 512 in the paper.
      norm_targets: normalise the target pixels patch by patch, as the paper's best model does.
      preprocessing: as in `MoCo`.
      seed: seed of the hidden patches, which are a function of seed, step and an image's row in the global batch.
        Evaluation hides the patches of step 0.

    Attributes:
      query_encoder: a model of normalised images -> {"features", "projection"}, two equal outputs.
      decoder: as `decoders.of_tokens` builds it; for training alone.
    """

    METRICS: ClassVar[dict] = {"pixel_correlation": lambda terms: terms.correlation}
    VIEWS = (1, 1)

    def __init__(
        self,
        backbone,
        mask_ratio=0.75,
        decoder_depth=2,
        decoder_width=128,
        norm_targets=True,
        preprocessing=None,
        seed=0,
        **kwargs,
    ):
        backbone = backbones.of_one_output(backbone)
        image_shape = backbones.image_shape(backbone, preprocessing)
        super().__init__(image_shape, preprocessing, **kwargs)
        self.mask_ratio = mask_ratio
        self.decoder_depth = decoder_depth
        self.decoder_width = decoder_width
        self.norm_targets = norm_targets
        self.seed = seed
        self.query_encoder = heads.encoder_without_head(backbone, image_shape)
        self.encode_some = some_patches.encoder_of(self.query_encoder, 1 - mask_ratio)
        self.decoder, self.patch_size = decoder(backbone, mask_ratio, decoder_depth, decoder_width)

    def backbones_for_xla(self):
        return []  # `encode_some` goes around the backbone

    def objective(self, batch, context, training=True):
        """The squared error at the hidden patches."""
        (images,) = batch["views"]  # n x H x W x 3
        seen = self.encode_some(images, (self.seed, self.drawing_step(training)), training)
        predicted = reconstruct(self.decoder, seen, images, self.patch_size, self.norm_targets, training)
        return Terms(masked_error(*predicted), masked_correlation(*predicted))

    def get_config(self):
        return super().get_config() | {
            "mask_ratio": self.mask_ratio,
            "decoder_depth": self.decoder_depth,
            "decoder_width": self.decoder_width,
            "norm_targets": self.norm_targets,
            "seed": self.seed,
        }
