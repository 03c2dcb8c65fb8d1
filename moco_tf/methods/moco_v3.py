"""MoCo v3: no queue, keys from the batch, a predictor after the query encoder, Vision Transformers.

Chen, Xie and He 2021, "An Empirical Study of Training Self-Supervised Vision Transformers" (arXiv:2104.02057),
algorithm 1.

Axes: n images of this replica, N of the global batch, H W image, C length of the projection.
"""

import keras
import tensorflow as tf

from moco_tf import encoders, replicas
from moco_tf.encoders import heads
from moco_tf.methods import backbones, batch_norms, some_patches
from moco_tf.methods.ema import cosine_momentum, ema_update, rise_steps
from moco_tf.methods.keras_internals import layers_of
from moco_tf.methods.losses import in_batch, together, unit_length
from moco_tf.methods.pretrainer import CONTRAST_METRICS, Pretrainer


def model(config, options, inputs, source):
    """The `MoCoV3` of a run."""
    return MoCoV3(
        encoders.of_config(config, zero_init_residual=True),
        head="vit" if config.is_vit else "resnet",
        dim=config.dim,
        hidden_dim=config.hidden_dim or 4096,
        momentum=options.momentum,
        momentum_rise_steps=rise_steps(config, options, source),
        temperature=config.temperature,
        token_dropout=options.token_dropout,
        preprocessing=inputs,
        seed=config.seed,
    )


@keras.saving.register_keras_serializable("moco_tf")
class MoCoV3(Pretrainer):
    """Learns an image encoder from pairs of views: `fit` takes a dataset of (view, other view) image batches.

    The query encoder (backbone, projector) with its predictor encodes each view; so does the key encoder (backbone,
    projector), whose weights follow the query encoder's. Each query looks for its image's other view among the keys of
    the global batch. BatchNorm normalises the global batch, each view separately.

    Views are float32 (N, H, W, 3), normalised as the backbone expects, as `moco_tf.views` makes them. `predict`
    takes raw images, uint8 or 0-255 floats (N, H, W, 3) of any size, and returns backbone features.

    Args:
      backbone: a Keras model of images -> features, as in `MoCo`.
      head: "resnet" or "vit": sets the number of the projector's layers and the predictor's end (section 4.3).
      dim: C, the length of a projection; 256 in the paper.
      hidden_dim: width of the hidden layers of projector and predictor; 4096 in the paper.
      momentum: m of the key encoder; 0.99 in the paper, 0.996 for 1000 epochs.
      momentum_rise_steps: if given, m rises from `momentum` to 1 along a half cosine over this many steps, as in
        the paper.
      temperature: T of the loss; 1.0 for ResNet-50 and 0.2 for ViTs in the paper.
      token_dropout: share of the patches that queries leave out in training, drawn anew for each view. The class token
        stays, and keys see all patches. For this package's ViTs (FLIP, arXiv:2212.00794, has 0.5). 0: none.
      preprocessing: how `predict` brings images to the backbone's input: a `Preprocessing`, or the task of the views,
        which has one. None: the preprocessing of the views that `fit` gets from `moco_tf.views`; before `fit`,
        ImageNet's mean and std, the central crop of 7/8, the backbone's size (224 if it takes any).
      seed: seed of the choice of the patches that are left out.

    Attributes:
      query_encoder, key_encoder: models of normalised images -> {"features", "projection"}.
      predictor: a model of the query encoder's projections (N, C) -> (N, C).
    """

    METRICS = CONTRAST_METRICS
    RATES = ("learning_rate", "momentum")
    VIEWS = (2, 2)

    def __init__(
        self,
        backbone,
        head="resnet",
        dim=256,
        hidden_dim=4096,
        momentum=0.99,
        momentum_rise_steps=None,
        temperature=1.0,
        token_dropout=0.0,
        preprocessing=None,
        seed=0,
        **kwargs,
    ):
        if head not in heads.V3:
            raise ValueError(f"MoCoV3's head is {' or '.join(map(repr, heads.V3))}, not {head!r}")
        if not temperature > 0 or not 0 <= momentum <= 1:
            raise ValueError(
                "MoCoV3 needs temperature > 0 and 0 <= momentum <= 1, not "
                f"temperature={temperature}, momentum={momentum}"
            )
        if not 0 <= token_dropout < 1:
            raise ValueError(f"token_dropout is a share of the patches, from 0 to less than 1; got {token_dropout}")
        backbone = backbones.of_one_output(backbone)
        image_shape = backbones.image_shape(backbone, preprocessing)
        super().__init__(image_shape, preprocessing, **kwargs)
        self.head = head
        self.dim = dim
        self.hidden_dim = hidden_dim
        self.momentum = momentum
        self.momentum_rise_steps = momentum_rise_steps
        self.temperature = temperature
        self.token_dropout = token_dropout
        self.seed = seed

        self.query_encoder = heads.encoder(backbone, image_shape, head, dim, hidden_dim)
        self.key_encoder = heads.encoder(backbones.clone(backbone), image_shape, head, dim, hidden_dim)
        self.predictor = heads.predictor(head, dim, hidden_dim)
        backbones.start_key_encoder(self.query_encoder, self.key_encoder)
        for part in (self.query_encoder, self.key_encoder, self.predictor):
            batch_norms.synchronize(part)
        if token_dropout:
            self.encode_some = some_patches.encoder_of(self.query_encoder, 1 - token_dropout)

    def backbones_for_xla(self):
        whole = [self.key_encoder] if self.token_dropout else [self.query_encoder, self.key_encoder]
        return [heads.backbone_of(encoder) for encoder in whole]  # `encode_some` goes around the query encoder's

    def prepare(self, batch, training=True):
        """Moves the momentum encoder and encodes the keys of both views, each N x C of the global batch."""
        if training:
            ema_update(self.query_encoder, self.key_encoder, self._momentum())
        keys = [unit_length(self.key_encoder(view, training=training)["projection"]) for view in batch["views"]]
        return tf.split(replicas.gather(tf.concat(keys, axis=1)), 2, axis=1)  # gathered at once

    def objective(self, batch, context, training=True):
        """ctr(q1, k2) + ctr(q2, k1): each view's queries look for the other view's keys.

        Each view has its own forward pass, and so its own BN statistics.
        """
        projections = [self._projection(view, place, training) for place, view in enumerate(batch["views"])]
        return self._contrast(projections, context, training)

    def _contrast(self, projections, keys, training):
        """The symmetrised loss of the query encoder's projections (n, C) of both views."""
        q1, q2 = (unit_length(self.predictor(each, training=training)) for each in projections)  # n x C each
        k1, k2 = keys
        labels = replicas.own(tf.range(tf.shape(k1)[0]))  # n: replica r's images are rows r * n to (r + 1) * n
        contrasts = [in_batch(q1, k2, labels, self.temperature), in_batch(q2, k1, labels, self.temperature)]
        return together(contrasts, times=2)

    def rates(self):
        return super().rates() | {"momentum": self._momentum()}

    def watch(self, variables, gradients):
        """The norms of the global batch's gradient in the first and in the last block of the backbone.

        Instability of ViTs shows as spikes in the first layers, tens of steps before it does in the last (section
        4.2).
        """
        by_variable = {id(v): g for v, g in zip(variables, gradients, strict=True) if g is not None}
        ends = [[by_variable[id(v)] for v in end if id(v) in by_variable] for end in end_blocks(self.backbone)]
        scale = tf.cast(self.optimizer.scale_loss(1.0), self.totals.dtype)
        summed_up = replicas.add_up([tf.cast(g, self.totals.dtype) / scale for end in ends for g in end])
        first, last = summed_up[: len(ends[0])], summed_up[len(ends[0]) :]
        return {"gradient_norm_first": tf.linalg.global_norm(first), "gradient_norm_last": tf.linalg.global_norm(last)}

    def _momentum(self):
        return cosine_momentum(self.momentum, self.step.value, self.momentum_rise_steps)

    def _projection(self, view, place, training):
        """The query encoder's projection (n, C) of the first or second view: `place` 0 or 1."""
        if self.token_dropout and training:
            return self.encode_some(view, (self.seed, 2 * self.step.value + place)).projection
        return self.query_encoder(view, training=training)["projection"]

    def get_config(self):
        return super().get_config() | {
            "head": self.head,
            "dim": self.dim,
            "hidden_dim": self.hidden_dim,
            "momentum": self.momentum,
            "momentum_rise_steps": self.momentum_rise_steps,
            "temperature": self.temperature,
            "token_dropout": self.token_dropout,
            "seed": self.seed,
        }


def end_blocks(backbone):
    """The trainable variables up to the end of the backbone's first block, and from its last block on.

    A block is a residual block of a ResNet, or one of a ViT: its layers' names begin with the same two parts, as in
    layer1.0.conv1 and blocks.0.attn.qkv. In another model it is a layer with trainable weights.
    """
    layers = [layer for layer in layers_of(backbone) if layer.trainable_variables]
    layers = [layer for layer in layers if not isinstance(layer, keras.Model)]
    blocks = [tuple(parts[:2]) if len(parts := layer.name.split(".")) > 2 else None for layer in layers]
    named = [block for block in blocks if block]
    if not named:
        return [list(layers[0].trainable_variables), list(layers[-1].trainable_variables)]
    end = len(blocks) - blocks[::-1].index(named[0])  # of the first block
    begin = blocks.index(named[-1])  # of the last one
    return [[v for layer in part for v in layer.trainable_variables] for part in (layers[:end], layers[begin:])]
