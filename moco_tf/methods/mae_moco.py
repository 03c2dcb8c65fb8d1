"""MoCo v3's contrast and MAE's reconstruction, from one pass over the visible part of each view.

This package's own mix, after CAN (arXiv:2210.16870: both views masked, both losses on the visible tokens) and CMAE
(arXiv:2207.13532: a momentum encoder that sees whole views), in MoCo v3's frame (arXiv:2104.02057):

1. keys: the momentum encoder sees all patches of both views, as in v3;
2. queries: the query encoder sees the class token and a random part of the patches of each view;
3. contrast: v3's symmetrised loss, unchanged, of the class tokens through projector and predictor;
4. reconstruction: a light decoder takes the visible tokens and mask tokens, and predicts the hidden patches of the
   same distorted view, each normalised, as in MAE (arXiv:2111.06377);
5. loss = contrast + lambda x reconstruction, where the reconstruction is the mean over both views.

With lambda 0 it is MoCo v3 with token dropout. As lambda grows, it approaches MAE on two distorted crops.

Axes: n images of this replica, L patches of an image, P side of a patch, C length of the projection.
"""

from typing import NamedTuple

import keras
import tensorflow as tf

from moco_tf import encoders
from moco_tf.methods import mae
from moco_tf.methods.ema import rise_steps
from moco_tf.methods.moco_v3 import MoCoV3
from moco_tf.methods.pretrainer import CONTRAST_METRICS


def model(config, options, inputs, source):
    """The `MAEMoCo` of a run."""
    return MAEMoCo(
        encoders.of_config(config),
        dim=config.dim,
        hidden_dim=config.hidden_dim or 4096,
        momentum=options.momentum,
        momentum_rise_steps=rise_steps(config, options, source),
        temperature=config.temperature,
        mask_ratio=options.mask_ratio,
        reconstruction_weight=options.reconstruction_weight,
        decoder_depth=options.decoder_depth,
        decoder_width=options.decoder_width,
        norm_targets=options.norm_targets,
        preprocessing=inputs,
        seed=config.seed,
    )


class Terms(NamedTuple):
    """The terms of `losses.Contrast`, one row per query, so 2 n, and the reconstruction of the query's own view."""

    loss: tf.Tensor
    positives: tf.Tensor
    hardest: tf.Tensor
    negatives: tf.Tensor
    top1: tf.Tensor
    queries: tf.Tensor  # 2 n x C
    reconstruction: tf.Tensor


@keras.saving.register_keras_serializable("moco_tf")
class MAEMoCo(MoCoV3):
    """`MoCoV3` on a ViT whose queries see a part of the patches, and also predict the pixels of the others.

    Evaluation hides the patches of step 0, and shows both losses for them.

    Args:
      backbone: a ViT of `moco_tf.encoders.vit`, whose patch projection learns (`freeze_patch=False`).
      mask_ratio: share of the patches that are hidden from queries; CAN: 0.5, CMAE: 0.75 (its code: 0.65).
      reconstruction_weight: lambda; 1 in CMAE, whose contrast is scaled as v3's is.
      decoder_depth, decoder_width, norm_targets: as in `MAE`.
      others: as in `MoCoV3`.

    Attributes:
      decoder: as `decoders.of_tokens` builds it; for training alone.
    """

    METRICS = CONTRAST_METRICS | {"reconstruction": lambda terms: terms.reconstruction}

    def __init__(
        self,
        backbone,
        mask_ratio=0.5,
        reconstruction_weight=1.0,
        decoder_depth=1,
        decoder_width=128,
        norm_targets=True,
        head="vit",
        **kwargs,
    ):
        if not reconstruction_weight >= 0:
            raise ValueError(f"reconstruction_weight is 0 or more; got {reconstruction_weight}")
        super().__init__(backbone, head=head, token_dropout=mask_ratio, **kwargs)
        self.reconstruction_weight = reconstruction_weight
        self.decoder_depth = decoder_depth
        self.decoder_width = decoder_width
        self.norm_targets = norm_targets
        self.decoder, self.patch_size = mae.decoder(self.backbone, mask_ratio, decoder_depth, decoder_width)

    def objective(self, batch, context, training=True):
        """ctr(q1, k2) + ctr(q2, k1) + lambda (error(view 1) + error(view 2)) / 2."""
        step = self.drawing_step(training)
        seen = [
            self.encode_some(view, (self.seed, 2 * step + place), training)
            for place, view in enumerate(batch["views"])
        ]
        contrast = self._contrast([each.projection for each in seen], context, training)  # rows of 2 n queries
        predicted = [
            mae.reconstruct(self.decoder, each, view, self.patch_size, self.norm_targets, training)
            for each, view in zip(seen, batch["views"], strict=True)
        ]
        reconstruction = tf.concat(
            [mae.masked_error(*each) for each in predicted], axis=0
        )  # 2 n; the step takes the mean
        loss = contrast.loss + self.reconstruction_weight * reconstruction
        return Terms(*contrast._replace(loss=loss), reconstruction)

    def get_config(self):
        config = super().get_config()
        del config["token_dropout"]
        return config | {
            "mask_ratio": self.token_dropout,
            "reconstruction_weight": self.reconstruction_weight,
            "decoder_depth": self.decoder_depth,
            "decoder_width": self.decoder_width,
            "norm_targets": self.norm_targets,
        }
