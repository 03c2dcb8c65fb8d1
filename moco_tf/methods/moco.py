"""Momentum Contrast, v1 and v2: a queue of keys and a momentum encoder.

He et al. 2020, "Momentum Contrast for Unsupervised Visual Representation Learning" (arXiv:1911.05722), and
Chen et al. 2020, "Improved Baselines with Momentum Contrastive Learning" (arXiv:2003.04297). v2 is v1 with an
MLP head, another augmentation, temperature 0.2 and a cosine learning rate.

Axes: n images of this replica, N of the global batch, H W image, C length of the projection, P keys of a query, K keys
in the queue.
"""

import contextlib

import keras
import tensorflow as tf

from moco_tf import encoders, replicas
from moco_tf.encoders import heads
from moco_tf.methods import backbones, batch_norms
from moco_tf.methods.ema import cosine_momentum, ema_update, rise_steps
from moco_tf.methods.flags import LOSSES, POSITIVES_FROM
from moco_tf.methods.losses import info_nce, of_groups, together, unit_length
from moco_tf.methods.pretrainer import CONTRAST_METRICS, Pretrainer
from moco_tf.methods.queue import Queue
from moco_tf.methods.shuffle_bn import groups_here, set_groups, shuffle_key_images


def model(config, options, inputs, source):
    """The `MoCo` of a run."""
    return MoCo(encoders.of_config(config), **settings(config, options, inputs, source))


def settings(config, options, inputs, source):
    """Returns `MoCo`'s arguments from a run's flags, without the backbone."""
    return {
        "dim": config.dim,
        "head": options.head,
        "hidden_dim": config.hidden_dim or None,
        "queue_size": options.queue_size,
        "momentum": options.momentum,
        "momentum_rise_steps": rise_steps(config, options, source),
        "temperature": config.temperature,
        "shuffle_bn": options.shuffle_bn,
        "bn_groups": options.bn_groups,
        "symmetric": options.symmetric,
        "mask_siblings": options.mask_siblings,
        "positives_from": options.positives_from,
        "loss": options.loss,
        "small_views": getattr(config, "small_views", 0),
        "preprocessing": inputs,
        "seed": config.seed,
    }


@keras.saving.register_keras_serializable("moco_tf")
class MoCo(Pretrainer):
    """Learns an image encoder from pairs of views: `fit` takes a dataset of (query, key) image batches.

    Views are float32 (N, H, W, 3), normalised as the backbone expects, as `moco_tf.views` makes them. A batch can also
    be a dict {"views": (query, key, key, ...), "id": (N,)} with several keys. `predict` takes raw images,
    uint8 or 0-255 floats (N, H, W, 3) of any size, and returns backbone features.

    Args:
      backbone: a Keras model of images (N, H, W, 3) -> features (N, C) or (N, H, W, C), or -> several outputs, one of
        them "features"; functional, Sequential or with `get_config`. It becomes the query encoder's trunk; a copy with
        the same weights becomes the key encoder's.
      dim: C, the length of a projection; 128 in the papers.
      head: "linear" (v1) or "mlp" (v2).
      hidden_dim: width of the MLP head's hidden layer; None: as many as there are features (2048 for R50).
      queue_size: K, the keys kept as negatives; 65536 in the papers. Any batch size works with any K.
      momentum: m of the key encoder, 0.999 in the papers.
      momentum_rise_steps: if given, m rises from `momentum` to 1 along a half cosine over this many steps.
      temperature: T of InfoNCE; 0.07 in v1, 0.2 in v2.
      shuffle_bn: encode keys in another order than queries, so that BatchNorm does not leak which key belongs to which
        query (section 3.3). Has an effect where BatchNorm has several groups: `bn_groups` > 1, or several replicas.
      bn_groups: equal parts of the global batch that BatchNorm normalises separately, as that many devices would;
        8 for the papers' 8 GPUs. A multiple of the number of replicas; None: one per replica. More than one per
        replica needs this package's BatchNorm in the backbone.
      preprocessing: how `predict` brings images to the backbone's input: a `Preprocessing`, or the task of the views,
        which has one. None: the preprocessing of the views that `fit` gets from `moco_tf.views`; before `fit`,
        ImageNet's mean and std, the central crop of 7/8, the backbone's size (224 if it takes any).
      symmetric: each view is the query once, and looks for the other views' keys; the losses are summed, and the keys
        of all views are enqueued (the authors' CIFAR-10 demo).
      mask_siblings: the queue keeps an id beside each key; in training, keys of the query's own id are not negatives.
      positives_from: "keys": a query looks for its own views' keys among the queue's; "batch": for all keys of its own
        thing in the batch, among all other keys of batch and queue; "batch_and_queue": for its thing's keys in the
        queue too. `thing_of` says what one thing is. This is for training; evaluation shows InfoNCE with the query's
        own keys.
      loss: "infonce", "supcon" or "supcon_in": how the loss combines several positives (`losses.of_groups`).
      thing_of: the entry of a batch, (N,) integers, that says what one thing is: "id", or "label". -1 equals nothing.
      small_views: M, how many of a batch's views, the last ones, are queries only (multi-crop, arXiv:2006.09882).
        Small views may have another size, if the backbone takes any, and do not change BatchNorm's running statistics.
        The loss is the mean over the queries.
      seed: seed of the queue's first keys and of the shuffles.

    Attributes:
      query_encoder, key_encoder: models of normalised images -> {"features", "projection"}.
      queue: the `Queue`, the same on all replicas.
    """

    METRICS = CONTRAST_METRICS
    VIEWS = (2, None)  # the query, and its keys
    RATES = ("learning_rate", "momentum")

    def __init__(
        self,
        backbone,
        dim=128,
        head="mlp",
        hidden_dim=None,
        queue_size=65536,
        momentum=0.999,
        momentum_rise_steps=None,
        temperature=0.2,
        shuffle_bn=True,
        bn_groups=None,
        symmetric=False,
        mask_siblings=False,
        positives_from="keys",
        loss="infonce",
        thing_of="id",
        small_views=0,
        preprocessing=None,
        seed=0,
        **kwargs,
    ):
        if not queue_size > 0 or not temperature > 0 or not 0 <= momentum <= 1:
            raise ValueError(
                "MoCo needs queue_size > 0, temperature > 0 and 0 <= momentum <= 1, not "
                f"queue_size={queue_size}, temperature={temperature}, momentum={momentum}"
            )
        if positives_from not in POSITIVES_FROM or loss not in LOSSES:
            raise ValueError(
                f"MoCo takes positives_from {', '.join(POSITIVES_FROM)} and loss {', '.join(LOSSES)}, not "
                f"{positives_from!r} and {loss!r}"
            )
        backbone = backbones.of_one_output(backbone)
        image_shape = backbones.image_shape(backbone, preprocessing)
        super().__init__(image_shape, preprocessing, **kwargs)
        self.dim = dim
        self.head = head
        self.hidden_dim = hidden_dim
        self.momentum = momentum
        self.momentum_rise_steps = momentum_rise_steps
        self.temperature = temperature
        self.shuffle_bn = shuffle_bn
        self.bn_groups = bn_groups
        self.groups_here = groups_here(bn_groups)
        self.symmetric = symmetric
        self.mask_siblings = mask_siblings
        self.positives_from = positives_from
        self.loss_of_several = loss
        self.thing_of = thing_of
        self.with_things = mask_siblings or positives_from != "keys"
        self.small_views = small_views
        self.VIEWS = (2 + small_views, None)
        self.seed = seed

        self.query_encoder = heads.encoder(backbone, image_shape, head, dim, hidden_dim)
        self.key_encoder = heads.encoder(backbones.clone(backbone), image_shape, head, dim, hidden_dim)
        for encoder in (self.query_encoder, self.key_encoder):
            set_groups(encoder, self.groups_here)
        backbones.start_key_encoder(self.query_encoder, self.key_encoder)
        self.queue = Queue(queue_size, dim, seed=seed, with_ids=self.with_things, name="queue")

    def prepare(self, batch, training=True):
        """Moves the momentum encoder (equation 2), returns the keys {view's place: (N, C)}, in evaluation (n, C)."""
        views = self._whole(batch)
        if training:
            ema_update(self.query_encoder, self.key_encoder, self._momentum())
        places = [*range(1, len(views)), *([0] if self.symmetric else [])]
        return dict(zip(places, self._encode_keys([views[place] for place in places], training), strict=True))

    def objective(self, batch, context, training=True):
        """InfoNCE (equation 1): each query view's embeddings tell their keys from those in the queue."""
        views, whole = batch["views"], len(self._whole(batch))
        things = self._things(batch) if self.with_things and training else None
        places = range(whole if self.symmetric else 1)
        contrasts = []
        for place in (*places, *range(whole, len(views))):
            keys = [replicas.own(k) if training else k for other, k in context.items() if other != place]  # P of n x C
            keys = keys[0] if len(keys) == 1 else tf.stack(keys, axis=1)
            with batch_norms.statistics_kept(self.query_encoder) if place >= whole else contextlib.nullcontext():
                found = self._queries(views[place], training)
            for queries in found:  # n x C each
                contrasts.append(self._contrast(queries, keys, things, context))
        return together(contrasts, times=len(places))

    def finish(self, batch, context, terms):
        """Puts the new keys of all replicas in the queue, view by view."""
        keys = [context[place] for place in sorted(context)]
        things = tf.tile(replicas.gather(self._things(batch)), [len(keys)]) if self.with_things else None
        self.queue.enqueue(tf.concat(keys, axis=0), things)

    def rates(self):
        return super().rates() | {"momentum": self._momentum()}

    def _whole(self, batch):
        """The views that have keys: all but the small ones."""
        return batch["views"][: len(batch["views"]) - self.small_views]

    def _queries(self, images, training):
        """The queries that look for the keys of one view: embeddings (n, C) each."""
        return [unit_length(self.query_encoder(images, training=training)["projection"])]

    def _contrast(self, queries, keys, things, context):
        """Returns the terms of queries (n, C) with their own keys (n, C) or (n, P, C).

        things: the thing that each query belongs to (n,), or None; context: the keys of all views of the global batch.
        """
        if things is None or self.positives_from == "keys":
            of_what = None if things is None else (things, self.queue.ids.value)
            return info_nce(queries, keys, self.queue.keys.value, self.temperature, of_what)
        all_things = replicas.gather(things)  # N
        rows = tf.range(tf.shape(all_things)[0])
        itself = replicas.own(rows)[:, None] == rows[None, :]  # n x N: its keys are in `keys`; its view is left out
        of_one = (things[:, None] == all_things[None, :]) & (things[:, None] >= 0)
        return of_groups(
            self.loss_of_several,
            queries,
            keys if keys.shape.rank == 3 else keys[:, None],
            tf.concat(list(context.values()), axis=0),  # (views x N) x C
            tf.tile(of_one & ~itself, (1, len(context))),
            tf.tile(~of_one & ~itself, (1, len(context))),
            self.queue.keys.value,
            self.temperature,
            (things, self.queue.ids.value),
            from_dictionary=self.positives_from == "batch_and_queue",
        )

    def _momentum(self):
        return cosine_momentum(self.momentum, self.step.value, self.momentum_rise_steps)

    def _encode_keys(self, views, training):
        """Returns all replicas' keys (N, C) of each key view, encoded in another order than queries in training.

        In evaluation, returns only this replica's keys, (n, C).
        """
        if not training:
            return [unit_length(self.key_encoder(images, training=False)["projection"]) for images in views]
        together = tf.concat(views, axis=-1)  # n x H x W x (views x 3): shuffled and gathered in one go
        seed = (self.seed, self.step.value)
        together, permutation = shuffle_key_images(together, self.shuffle_bn, self.groups_here, seed)
        views = tf.split(together, len(views), axis=-1)
        keys = [unit_length(self.key_encoder(images, training=True)["projection"]) for images in views]
        keys = tf.concat(keys, axis=1)  # n x (views x C)
        keys = replicas.gather(keys) if permutation is None else replicas.unshuffle(keys, permutation)
        return tf.split(keys, len(views), axis=1)

    def _things(self, batch):
        """Returns the thing that each image belongs to: int64 (n,)."""
        if self.thing_of not in batch:
            raise ValueError(
                f'mask_siblings and positives_from ask what is one thing, and need an "{self.thing_of}" (N,) beside '
                f'the "views" of each batch; got {", ".join(batch)}'
            )
        return tf.cast(batch[self.thing_of], tf.int64)

    def get_config(self):
        return super().get_config() | {
            "dim": self.dim,
            "head": self.head,
            "hidden_dim": self.hidden_dim,
            "queue_size": self.queue.size,
            "momentum": self.momentum,
            "momentum_rise_steps": self.momentum_rise_steps,
            "temperature": self.temperature,
            "shuffle_bn": self.shuffle_bn,
            "bn_groups": self.bn_groups,
            "symmetric": self.symmetric,
            "mask_siblings": self.mask_siblings,
            "positives_from": self.positives_from,
            "loss": self.loss_of_several,
            "thing_of": self.thing_of,
            "small_views": self.small_views,
            "seed": self.seed,
        }
