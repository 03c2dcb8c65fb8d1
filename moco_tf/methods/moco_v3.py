"""MoCo v3: no queue, keys from the batch, a predictor after the query encoder, Vision Transformers.

Chen, Xie and He 2021, "An Empirical Study of Training Self-Supervised Vision Transformers" (arXiv:2104.02057),
algorithm 1.

Axes: n images of this replica, N of the global batch, H W image, C length of the projection.
"""

import re

import keras
import tensorflow as tf

from moco_tf import replicas
from moco_tf.encoders import heads
from moco_tf.methods import backbones, normalization, pretrainer
from moco_tf.methods.ema import cosine_momentum, move_weights
from moco_tf.methods.losses import in_batch, unit_length

BLOCK_NAME = re.compile(r"(blocks\.\d+|layer\d+\.\d+)\.")  # how layers of ViTs' and ResNets' blocks are named


@keras.saving.register_keras_serializable("moco_tf")
class MoCoV3(pretrainer.ContrastiveModel):
    """Learns an image encoder from pairs of views: `fit` takes a dataset of (view, other view) image batches.

    Each view is encoded by the query encoder (backbone, projector, predictor) and by the key encoder (backbone,
    projector), whose weights follow the query's; each query looks for its image's other view among the keys of the
    global batch. BatchNorm normalises the global batch, each view apart.

    Views are float32 (N, H, W, 3), normalised as the backbone expects, as `moco_tf.views` makes them. `predict`
    takes images as they are, uint8 or 0-255 floats (N, H, W, 3) of any size, and gives backbone features.

    Args:
      backbone: a Keras model of images -> features, as in `MoCo`.
      head: "resnet" or "vit": the number of the projector's layers and the predictor's end (section 4.3).
      dim: C, the length of a projection; 256 in the paper.
      hidden_dim: width of the hidden layers of projector and predictor; 4096 in the paper.
      momentum: m of the key encoder; 0.99 in the paper, 0.996 for 1000 epochs.
      momentum_decay_steps: if given, m rises from `momentum` to 1 along a half cosine over this many steps, as in
        the paper.
      temperature: T of the loss; 1.0 for ResNet-50 and 0.2 for ViTs in the paper.
      preprocessing: how `predict` brings images to the backbone's input: a `Preprocessing`, or the task of the views,
        which has one. None: that of the views that `fit` gets from `moco_tf.views`; before that, ImageNet's mean and
        std, the central crop of 7/8, the backbone's size (224 if it takes any).

    Attributes:
      query_encoder, key_encoder: models of normalised images -> {"features", "projection"}.
      predictor: a model of the query encoder's projections (N, C) -> (N, C).
    """

    def __init__(
        self,
        backbone,
        head="resnet",
        dim=256,
        hidden_dim=4096,
        momentum=0.99,
        momentum_decay_steps=None,
        temperature=1.0,
        preprocessing=None,
        **kwargs,
    ):
        if head not in heads.V3:
            raise ValueError(f"MoCoV3's head is {' or '.join(map(repr, heads.V3))}, not {head!r}")
        if not temperature > 0 or not 0 <= momentum <= 1:
            raise ValueError(
                "MoCoV3 needs temperature > 0 and 0 <= momentum <= 1, not "
                f"temperature={temperature}, momentum={momentum}"
            )
        backbone = backbones.of_one_output(backbone)
        image_shape = backbones.image_shape(backbone, preprocessing)
        super().__init__(image_shape, preprocessing, **kwargs)
        self.head = head
        self.dim = dim
        self.hidden_dim = hidden_dim
        self.momentum = momentum
        self.momentum_decay_steps = momentum_decay_steps
        self.temperature = temperature

        self.query_encoder = heads.encoder(backbone, image_shape, head, dim, hidden_dim)
        self.key_encoder = heads.encoder(backbones.clone(backbone), image_shape, head, dim, hidden_dim)
        self.predictor = heads.predictor(head, dim, hidden_dim)
        backbones.start_key_encoder(self.query_encoder, self.key_encoder)
        for part in (self.query_encoder, self.key_encoder, self.predictor):
            normalization.synchronize(part)

    def train_step(self, data):
        views = pretrainer.unpack(data)  # two, each n x H x W x 3, this replica's

        momentum = cosine_momentum(self.momentum, self.step.value, self.momentum_decay_steps)
        rates = {"learning_rate": self.optimizer.learning_rate, "momentum": momentum}
        move_weights(self.query_encoder, self.key_encoder, momentum)
        keys = self._encode_keys(views, training=True)  # two, each N x C of the global batch, no gradient
        variables = self.query_encoder.trainable_variables + self.predictor.trainable_variables
        with tf.GradientTape() as tape:
            queries = self._encode_queries(views, training=True)  # two, each n x C
            halves = self._contrast(queries, keys)
            # Each view's queries look for the other view's keys; the optimizer adds the replicas' gradients up.
            loss = sum(tf.reduce_mean(half.loss) for half in halves) / replicas.count()
            scaled_loss = self.optimizer.scale_loss(loss)  # for float16; else the loss itself
        gradients = tape.gradient(scaled_loss, variables)
        norms = self._gradient_norms(variables, gradients)
        self.optimizer.apply(gradients, variables)

        self.step.assign_add(1)
        return self._track(queries, halves) | self.shape_logs(rates | norms)

    def test_step(self, data):
        """Loss and diagnostics in inference mode; changes no weights."""
        views = pretrainer.unpack(data)
        keys = self._encode_keys(views, training=False)
        queries = self._encode_queries(views, training=False)
        return self._track(queries, self._contrast(queries, keys))

    def _encode_queries(self, views, training):
        """Unit-length (n, C) for each view, in a forward pass of its own: each has its own BN statistics."""
        projections = [self.query_encoder(view, training=training)["projection"] for view in views]
        return [unit_length(self.predictor(projection, training=training)) for projection in projections]

    def _encode_keys(self, views, training):
        """Unit-length (N, C) for each view, of all replicas, gathered at once."""
        keys = [unit_length(self.key_encoder(view, training=training)["projection"]) for view in views]
        return tf.split(tf.stop_gradient(replicas.gather(tf.concat(keys, axis=1))), 2, axis=1)

    def _contrast(self, queries, keys):
        """The loss's two halves, `Contrast` each: queries of one view among the keys of the other."""
        labels = replicas.own(tf.range(tf.shape(keys[0])[0]))  # n: replica r's images are rows r * n to (r + 1) * n
        return [in_batch(q, k, labels, self.temperature) for q, k in zip(queries, keys[::-1], strict=True)]

    def _gradient_norms(self, variables, gradients):
        """The norms of the global batch's gradient in the first and in the last block of the backbone.

        Instability of ViTs shows as spikes in the first layers, tens of steps before it does in the last (section
        4.2).
        """
        by_variable = {id(v): g for v, g in zip(variables, gradients, strict=True) if g is not None}
        ends = [[by_variable[id(v)] for v in end if id(v) in by_variable] for end in end_blocks(self.backbone)]
        scale = tf.cast(self.optimizer.scale_loss(1.0), self.totals.dtype)
        summed = replicas.add_up([tf.cast(g, self.totals.dtype) / scale for end in ends for g in end])
        first, last = summed[: len(ends[0])], summed[len(ends[0]) :]
        return {"gradient_norm_first": tf.linalg.global_norm(first), "gradient_norm_last": tf.linalg.global_norm(last)}

    def _track(self, queries, halves):
        # A row a query of either view: the means are those of both halves, and the loss is the halves' sum.
        both = [tf.concat(values, axis=0) for values in zip(*halves, strict=True)]
        loss, positives, hardest, negatives = both
        return self.track(tf.concat(queries, axis=0), 2 * loss, positives, hardest, negatives)

    def get_config(self):
        return super().get_config() | {
            "head": self.head,
            "dim": self.dim,
            "hidden_dim": self.hidden_dim,
            "momentum": self.momentum,
            "momentum_decay_steps": self.momentum_decay_steps,
            "temperature": self.temperature,
        }


def end_blocks(backbone):
    """The trainable variables up to the end of the backbone's first block, and from its last block on.

    A block is a residual block of a ResNet, or one of a ViT; in another model, a layer with trainable weights.
    """
    layers = [layer for layer in backbone._flatten_layers(include_self=False) if layer.trainable_variables]
    layers = [layer for layer in layers if not isinstance(layer, keras.Model)]
    matches = [BLOCK_NAME.match(layer.name) for layer in layers]
    named = [(match.group(1) if match else None, layer) for match, layer in zip(matches, layers, strict=True)]
    blocks = list(dict.fromkeys(name for name, _ in named if name))
    if not blocks:
        return [list(layers[0].trainable_variables), list(layers[-1].trainable_variables)]
    places = [i for i, (name, _) in enumerate(named) if name == blocks[0]]
    first = [v for _, layer in named[: places[-1] + 1] for v in layer.trainable_variables]
    start = next(i for i, (name, _) in enumerate(named) if name == blocks[-1])
    last = [v for _, layer in named[start:] for v in layer.trainable_variables]
    return [first, last]
