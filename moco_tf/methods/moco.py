"""Momentum Contrast, v1 and v2: a queue of keys and a momentum encoder.

He et al. 2020, "Momentum Contrast for Unsupervised Visual Representation Learning" (arXiv:1911.05722), and
Chen et al. 2020, "Improved Baselines with Momentum Contrastive Learning" (arXiv:2003.04297). v2 is v1 with an
MLP head, another augmentation, temperature 0.2 and a cosine rate.

Axes: N batch, H W image, C length of the projection, K queue.
"""

import keras
import tensorflow as tf

from moco_tf import replicas
from moco_tf.encoders import heads
from moco_tf.methods import backbones, normalization, pretrainer
from moco_tf.methods.ema import cosine_momentum, move_weights
from moco_tf.methods.losses import info_nce, unit_length
from moco_tf.methods.queue import Queue


@keras.saving.register_keras_serializable("moco_tf")
class MoCo(pretrainer.ContrastiveModel):
    """Learns an image encoder from pairs of views: `fit` takes a dataset of (query, key) image batches.

    Views are float32 (N, H, W, 3), normalised as the backbone expects, as `moco_tf.views` makes them. `predict`
    takes images as they are, uint8 or 0-255 floats (N, H, W, 3) of any size, and gives backbone features.

    Args:
      backbone: a Keras model of images (N, H, W, 3) -> features (N, C) or (N, H, W, C), or -> several outputs, one of
        them "features"; functional, Sequential or with `get_config`. It becomes the query encoder's trunk; a copy with
        the same weights becomes the key's.
      dim: C, the length of a projection; 128 in the papers.
      head: "linear" (v1) or "mlp" (v2).
      hidden_dim: width of the MLP head's hidden layer; None: as many as there are features (2048 for R50).
      queue_size: K, the keys kept as negatives; 65536 in the papers. Any batch size goes with any K.
      momentum: m of the key encoder, 0.999 in the papers.
      momentum_decay_steps: if given, m rises from `momentum` to 1 along a half cosine over this many steps.
      temperature: T of InfoNCE; 0.07 in v1, 0.2 in v2.
      shuffle_bn: encode keys in another order than queries, so that BatchNorm does not leak which belong
        together (section 3.3). Has an effect with `bn_groups` > 1.
      bn_groups: equal parts of the global batch that BatchNorm normalises apart, as that many devices would;
        the papers' 8 GPUs are 8. A multiple of the replicas; None: one each. More than one a replica need this
        package's BatchNorm in the backbone.
      preprocessing: how `predict` brings images to the backbone's input: a `Preprocessing`, or the task of the views,
        which has one. None: that of the views that `fit` gets from `moco_tf.views`; before that, ImageNet's mean and
        std, the central crop of 7/8, the backbone's size (224 if it takes any).
      seed: of the queue's first keys and of the shuffles.

    Attributes:
      query_encoder, key_encoder: models of normalised images -> {"features", "projection"}.
      queue: the `Queue`, the same on all replicas.
    """

    def __init__(
        self,
        backbone,
        dim=128,
        head="linear",
        hidden_dim=None,
        queue_size=65536,
        momentum=0.999,
        momentum_decay_steps=None,
        temperature=0.07,
        shuffle_bn=True,
        bn_groups=None,
        preprocessing=None,
        seed=0,
        **kwargs,
    ):
        if not queue_size > 0 or not temperature > 0 or not 0 <= momentum <= 1:
            raise ValueError(
                "MoCo needs queue_size > 0, temperature > 0 and 0 <= momentum <= 1, not "
                f"queue_size={queue_size}, temperature={temperature}, momentum={momentum}"
            )
        backbone = backbones.of_one_output(backbone)
        image_shape = backbones.image_shape(backbone, preprocessing)
        super().__init__(image_shape, preprocessing, **kwargs)
        self.dim = dim
        self.head = head
        self.hidden_dim = hidden_dim
        self.momentum = momentum
        self.momentum_decay_steps = momentum_decay_steps
        self.temperature = temperature
        self.shuffle_bn = shuffle_bn
        self.bn_groups = bn_groups
        self.groups_here = normalization.groups_here(bn_groups)
        self.seed = seed

        self.query_encoder = heads.encoder(backbone, image_shape, head, dim, hidden_dim)
        self.key_encoder = heads.encoder(backbones.clone(backbone), image_shape, head, dim, hidden_dim)
        for encoder in (self.query_encoder, self.key_encoder):
            normalization.set_groups(encoder, self.groups_here)
        backbones.start_key_encoder(self.query_encoder, self.key_encoder)
        self.queue = Queue(queue_size, dim, seed=seed, name="queue")

    def train_step(self, data):
        query_images, key_images = pretrainer.unpack(data)  # each n x H x W x 3, this replica's
        query_images = normalization.check_groups(query_images, self.groups_here)
        key_images = normalization.check_groups(key_images, self.groups_here)

        momentum = cosine_momentum(self.momentum, self.step.value, self.momentum_decay_steps)
        rates = {"learning_rate": self.optimizer.learning_rate, "momentum": momentum}
        move_weights(self.query_encoder, self.key_encoder, momentum)
        keys = self._encode_keys(key_images)  # N x C of the global batch, no gradient
        with tf.GradientTape() as tape:
            queries = unit_length(self.query_encoder(query_images, training=True)["projection"])  # n x C
            contrast = info_nce(queries, replicas.own(keys), self.queue.keys.value, self.temperature)
            loss = tf.reduce_mean(contrast.loss) / replicas.count()  # the optimizer adds gradients up
            scaled_loss = self.optimizer.scale_loss(loss)  # for float16; else the loss itself
        variables = self.query_encoder.trainable_variables
        gradients = tape.gradient(scaled_loss, variables)
        self.optimizer.apply(gradients, variables)

        # The loss looks at the queue in place: the new keys come after it.
        with tf.control_dependencies([*contrast, *(g for g in gradients if g is not None)]):
            self.queue.enqueue(keys)
        self.step.assign_add(1)
        logs = self.track(queries, *contrast, encoders=(self.query_encoder, self.key_encoder))
        return logs | self.shape_logs(rates)

    def test_step(self, data):
        """Loss and diagnostics in inference mode; changes neither queue nor encoders."""
        query_images, key_images = pretrainer.unpack(data)
        queries = unit_length(self.query_encoder(query_images, training=False)["projection"])
        keys = unit_length(self.key_encoder(key_images, training=False)["projection"])
        return self.track(queries, *info_nce(queries, keys, self.queue.keys.value, self.temperature))

    def _encode_keys(self, images):
        shuffles = self.shuffle_bn and self.groups_here * replicas.count() > 1  # one group: any order is the same
        if not shuffles:
            return replicas.gather(unit_length(self.key_encoder(images, training=True)["projection"]))
        shuffled, permutation = replicas.shuffle(images, seed=(self.seed, self.step.value))
        keys = unit_length(self.key_encoder(shuffled, training=True)["projection"])
        return replicas.unshuffle(keys, permutation)

    def get_config(self):
        return super().get_config() | {
            "dim": self.dim,
            "head": self.head,
            "hidden_dim": self.hidden_dim,
            "queue_size": self.queue.size,
            "momentum": self.momentum,
            "momentum_decay_steps": self.momentum_decay_steps,
            "temperature": self.temperature,
            "shuffle_bn": self.shuffle_bn,
            "bn_groups": self.bn_groups,
            "seed": self.seed,
        }
