"""Contrastive predictive coding: from the patches above, tell which patch comes further down (CPC).

Van den Oord, Li and Vinyals 2018, "Representation Learning with Contrastive Predictive Coding" (arXiv:1807.03748), in
the form of Henaff et al. 2020 (CPC v2, arXiv:1905.09272): layer norm, all other positions of the batch as negatives,
up to four directions.

Two frames:

  in_batch  the targets are projections of the batch's own patches, and gradients go to both sides (CPC v2);
  queue     ours, after MoCo: a momentum encoder makes keys of the patches, and a queue adds keys to the batch's.

Axes: n images of this replica, N of the global batch, G patches along each side, P side of one, D features of a
patch, C length of a target.
"""

from typing import ClassVar, NamedTuple

import keras
import tensorflow as tf

from moco_tf import encoders, replicas
from moco_tf.encoders import heads, patch_grid
from moco_tf.methods import backbones
from moco_tf.methods.dictionary import look_up
from moco_tf.methods.ema import ema_update, rise_steps
from moco_tf.methods.flags import FRAMES
from moco_tf.methods.losses import full, unit_length
from moco_tf.methods.pretrainer import Spread
from moco_tf.methods.queue import Queue
from moco_tf.methods.queue_frame import QueueFrame

SCALE = 0.1  # of the predictions, in CPC v2
NEAREST = 2  # rows ahead: the next row overlaps the one that predicts


def backbone(config, options, inputs):
    """The backbone of a run."""
    return patch_grid.of_patches(
        lambda side: encoders.of_config(config, image_size=side, channels=1, norm="layer"),
        inputs.image_size,
        options.grid,
    )


def model(config, options, inputs, source):
    """The `CPC` of a run."""
    return CPC(
        backbone(config, options, inputs),
        dim=config.dim,
        hidden_dim=config.hidden_dim or None,
        ahead=options.rows_ahead,
        directions=options.directions,
        frame=options.frame,
        queue_size=options.queue_size,
        momentum=options.momentum,
        momentum_rise_steps=rise_steps(config, options, source),
        temperature=config.temperature,
        preprocessing=inputs,
        seed=config.seed,
    )


class Terms(NamedTuple):
    """The terms of the loss, one value per image."""

    loss: tf.Tensor  # n: the mean over the positions, summed over rows ahead and directions
    top1: tf.Tensor  # n, share of predictions nearest to their own patch; chance: 1 / (N G G), or 1 / (N G G + K)
    embeddings: tf.Tensor  # n x C, of unit length


@keras.saving.register_keras_serializable("moco_tf")
class CPC(QueueFrame):
    """Learns an encoder of patches by predicting those further down; an image's features are the mean over its grid.

    A batch is (pictures,), (N, G P, G P, 3); a picture shows an image's patches side by side. `predict` takes images.

    Args:
      backbone: as `patch_grid.of_patches` builds it.
      dim: C; 64 in CPC v2.
      hidden_dim: width of the context network; None: 256, as in CPC v2.
      ahead: how many rows further down the predicted patches are, 2 or more; CPC v2: (3,).
      directions: 1, from above; or 4, from all sides, each with its own context network.
      frame: "in_batch" or "queue".
      queue_size, momentum, momentum_rise_steps, temperature: for the queue's frame, as in `MoCo`.
      preprocessing, seed: as in `MoCo`.

    Attributes:
      query_encoder: a model of normalised images (N, S, S, 3) -> {"features", "projection"}; the queue's frame has
        a key_encoder too.
      predictor: a model of grids of patches' features -> predictions, see `patch_grid.predictor`.
    """

    METRICS: ClassVar[dict] = {
        "prediction_top1": lambda terms: terms.top1,
        "feature_std": Spread(lambda terms: terms.embeddings),
    }
    VIEWS = (1, 1)

    def __init__(
        self,
        backbone,
        dim=64,
        hidden_dim=None,
        ahead=(2, 3, 4, 5, 6),
        directions=1,
        frame="in_batch",
        queue_size=16384,
        momentum=0.999,
        momentum_rise_steps=None,
        temperature=0.07,
        preprocessing=None,
        seed=0,
        **kwargs,
    ):
        image_shape = backbones.image_shape(backbone, preprocessing)
        self.grid = backbone.get_layer("patches").grid
        positive = temperature > 0 and queue_size > 0
        if frame not in FRAMES or directions not in (1, 4) or not positive or not 0 <= momentum <= 1:
            raise ValueError(
                f"CPC needs frame of {', '.join(FRAMES)}, directions 1 or 4, queue_size > 0, temperature > 0 and 0 <= "
                f"momentum <= 1, not frame={frame!r}, directions={directions}, queue_size={queue_size}, "
                f"temperature={temperature}, momentum={momentum}"
            )
        if not ahead or len(set(ahead)) < len(ahead) or not all(NEAREST <= rows < self.grid for rows in ahead):
            raise ValueError(
                f"CPC predicts from {NEAREST} to {self.grid - 1} rows ahead in a grid of {self.grid}; got {ahead}"
            )
        super().__init__(image_shape, preprocessing, **kwargs)
        self.dim = dim
        self.hidden_dim = hidden_dim
        self.ahead = tuple(ahead)
        self.directions = directions
        self.frame = frame
        self.queue_size = queue_size
        self.momentum = momentum
        self.momentum_rise_steps = momentum_rise_steps
        self.temperature = temperature
        self.seed = seed

        self.query_encoder = heads.encoder(backbone, image_shape, "linear", dim)
        width = self.query_encoder.output["features"].shape[-1]
        predicted = dim if frame == "in_batch" else width  # features, which then go through the head, as a key's do
        self.predictor = patch_grid.predictor(
            self.grid, width, predicted, len(ahead), directions, hidden_dim or patch_grid.CONTEXT_WIDTH
        )
        if frame == "queue":
            self.key_encoder = heads.encoder(backbones.clone(backbone), image_shape, "linear", dim)
            backbones.start_key_encoder(self.query_encoder, self.key_encoder)
            self.queue = Queue(queue_size, dim, seed=seed, name="queue")

    def backbones_for_xla(self):
        return []  # patches go through a part of the backbone, and never through the whole

    def prepare(self, batch, training=True):
        """In the queue's frame, moves the momentum encoder; returns all patches' keys (N G G, C), of unit length."""
        if self.frame == "in_batch":
            return ()
        if training:
            ema_update(self.query_encoder, self.key_encoder, self._momentum())
        keys = self._targets(self.key_encoder, self._vectors(self.key_encoder, batch, training))
        return replicas.gather(unit_length(keys))

    def objective(self, batch, context, training=True):
        """Each prediction looks for its patch among all patches of the batch, and in the queue."""
        vectors = self._vectors(self.query_encoder, batch, training)  # n G G x D
        in_batch = self.frame == "in_batch"
        if in_batch:
            keys = replicas.gather(full(self._targets(self.query_encoder, vectors)))  # N G G x C
        else:
            keys = tf.concat([context, look_up(self.queue.keys.value, tf.range(self.queue.size))], axis=0)
        vectors = tf.reshape(vectors, (-1, self.grid, self.grid, vectors.shape[-1]))
        count = tf.shape(vectors)[0]
        places = replicas.own(tf.range(count * replicas.count() * self.grid**2))
        places = tf.reshape(places, (-1, self.grid, self.grid, 1))  # the key of each patch
        turned = [tf.image.rot90(vectors, turn) for turn in range(self.directions)]
        losses, right = [], []
        for turn, predicted in enumerate(_listed(self.predictor(turned, training=training))):
            labels = tf.image.rot90(places, turn)[..., 0]  # n x G x G
            for index, rows in enumerate(self.ahead):
                queries = tf.reshape(predicted[:, :-rows, :, index], (-1, predicted.shape[-1]))
                if in_batch:
                    logits = SCALE * tf.matmul(full(queries), full(keys), transpose_b=True)
                else:
                    queries = unit_length(self._targets(self.query_encoder, queries))
                    logits = tf.matmul(queries, keys, transpose_b=True) / self.temperature
                wanted = tf.reshape(labels[:, rows:], (-1,))
                loss = tf.nn.sparse_softmax_cross_entropy_with_logits(wanted, logits)
                found = tf.argmax(logits, axis=1, output_type=tf.int32) == wanted
                losses.append(tf.reduce_mean(tf.reshape(loss, (count, -1)), axis=1))
                right.append(tf.reduce_mean(tf.reshape(tf.cast(found, loss.dtype), (count, -1)), axis=1))
        embeddings = unit_length(self._targets(self.query_encoder, tf.reduce_mean(vectors, axis=(1, 2))))
        return Terms(tf.reduce_sum(tf.stack(losses), axis=0), tf.reduce_mean(tf.stack(right), axis=0), embeddings)

    def finish(self, batch, context, terms):
        """In the queue's frame the patches' keys enter the queue."""
        if self.frame == "queue":
            self.queue.enqueue(context)

    def _vectors(self, encoder, batch, training):
        """The features of a batch's patches, (n G G, D)."""
        (pictures,) = batch["views"]
        grey = patch_grid.luma(patch_grid.apart(pictures, self.grid))  # n G G x P x P x 1
        return heads.backbone_of(encoder).get_layer("patch_encoder")(grey, training=training)

    def _targets(self, encoder, vectors):
        """Applies the head to patches' features: (..., D) -> (..., C)."""
        return encoder.get_layer("fc")(vectors)

    def get_config(self):
        return super().get_config() | {
            "dim": self.dim,
            "hidden_dim": self.hidden_dim,
            "ahead": self.ahead,
            "directions": self.directions,
        }


def _listed(outputs):
    return outputs if isinstance(outputs, list) else [outputs]
