"""Momentum Contrast, v1 and v2: a queue of keys and a momentum encoder.

He et al. 2020, "Momentum Contrast for Unsupervised Visual Representation Learning" (arXiv:1911.05722), and
Chen et al. 2020, "Improved Baselines with Momentum Contrastive Learning" (arXiv:2003.04297). v2 is v1 with an
MLP head, another augmentation, temperature 0.2 and a cosine rate.

Axes: N batch, H W image, C length of the projection, K queue.
"""

import dataclasses

import keras
import tensorflow as tf

from moco_tf.data.preprocessing import Preprocessing
from moco_tf.encoders import heads
from moco_tf.encoders.batch_norm import BatchNorm
from moco_tf.losses import info_nce, unit_length
from moco_tf.momentum import copy_weights, cosine_momentum, move_weights
from moco_tf.queue import Queue
from moco_tf.replicas import shuffle, unshuffle


@keras.saving.register_keras_serializable("moco_tf")
class MoCo(keras.Model):
    """Learns an image encoder from pairs of views: `fit` takes a dataset of (query, key) image batches.

    Views are float32 (N, H, W, 3), normalised as the backbone expects, as `moco_tf.views` makes them. `predict`
    takes images as they are, uint8 or 0-255 floats (N, H, W, 3) of any size, and gives backbone features.

    Args:
      backbone: a Keras model of images -> features (N, C) or (N, H, W, C); functional, Sequential or with
        `get_config`. It becomes the query encoder's trunk; a copy with the same weights becomes the key's.
      dim: C, the length of a projection; 128 in the papers.
      head: "linear" (v1) or "mlp" (v2).
      hidden_dim: width of the MLP head's hidden layer; None: as many as there are features (2048 for R50).
      queue_size: K, the keys kept as negatives; 65536 in the papers. Any batch size goes with any K.
      momentum: m of the key encoder, 0.999 in the papers.
      momentum_decay_steps: if given, m rises from `momentum` to 1 along a half cosine over this many steps.
      temperature: T of InfoNCE; 0.07 in v1, 0.2 in v2.
      shuffle_bn: encode keys in another order than queries, so that BatchNorm does not leak which belong
        together (section 3.3). Has an effect with `bn_groups` > 1.
      bn_groups: equal parts of the batch that BatchNorm normalises apart, as that many devices would; the
        papers' 8 GPUs are 8. None: one. Needs this package's BatchNorm in the backbone.
      preprocessing: how `predict` brings images to the backbone's input. None: ImageNet's mean and std, the
        central crop of 7/8, the backbone's size (224 if it takes any).
      seed: of the queue's first keys and of the shuffles.

    Attributes:
      query_encoder, key_encoder: models of normalised images -> {"features", "projection"}.
      queue: the `Queue`. step: int64 variable, training steps done.
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
        super().__init__(autocast=False, **kwargs)  # `predict` takes 0-255 images: too many digits for bfloat16
        if not queue_size > 0 or not temperature > 0 or not 0 <= momentum <= 1:
            raise ValueError(
                "MoCo needs queue_size > 0, temperature > 0 and 0 <= momentum <= 1, not "
                f"queue_size={queue_size}, temperature={temperature}, momentum={momentum}"
            )
        self.dim = dim
        self.head = head
        self.hidden_dim = hidden_dim
        self.momentum = momentum
        self.momentum_decay_steps = momentum_decay_steps
        self.temperature = temperature
        self.shuffle_bn = shuffle_bn
        self.bn_groups = bn_groups or 1
        self.seed = seed

        image_shape = _image_shape(backbone, preprocessing)
        self.preprocessing = preprocessing or Preprocessing(image_size=image_shape[0] or 224)
        self.query_encoder = heads.encoder(backbone, image_shape, head, dim, hidden_dim)
        self.key_encoder = heads.encoder(_clone(backbone), image_shape, head, dim, hidden_dim)
        copy_weights(self.query_encoder, self.key_encoder)
        for encoder in (self.query_encoder, self.key_encoder):
            _set_bn_groups(encoder, self.bn_groups)
        # Per variable: `key_encoder.trainable = False` would put stock BatchNorm into inference mode.
        for variable in self.key_encoder.trainable_variables:
            variable.trainable = False
        self.queue = Queue(queue_size, dim, seed=seed, name="queue")
        self.step = self.add_weight(name="step", shape=(), initializer="zeros", dtype="int64", trainable=False)
        self.diagnostics = [
            keras.metrics.Mean(name)
            for name in (
                "loss",
                "contrast_top1",  # share of queries that find their key before all negatives
                "positive_similarity",  # mean cosine of a query and its key
                "negative_similarity",  # mean cosine of a query and a queued key
                "feature_std",  # of the queries' coordinates over the batch: 0 collapsed, 1/sqrt(C) spread out
            )
        ]
        self.built = True

    @property
    def backbone(self):
        return self.query_encoder.layers[1]

    def compile(self, optimizer="rmsprop", jit_compile=False, **kwargs):
        """As `keras.Model.compile`, but without a loss, and with XLA only when asked for."""
        super().compile(optimizer=optimizer, jit_compile=jit_compile, **kwargs)
        self.optimizer.build(self.trainable_variables)  # so that files hold, and give back, its state

    def compile_from_config(self, config):
        self.compile(**keras.saving.deserialize_keras_object(config))

    def call(self, images, training=False):
        """Backbone features, at least float32 (N, C), of uint8 or 0-255 images (N, H, W, 3)."""
        features = self.query_encoder(self.preprocessing(images), training=training)["features"]
        return tf.cast(features, self.queue.keys.dtype)

    def train_step(self, data):
        query_images, key_images = self._unpack(data)  # each N x H x W x 3
        if self.bn_groups > 1:
            _check_bn_groups(query_images, self.bn_groups)

        rates = {"learning_rate": self.optimizer.learning_rate, "momentum": self.current_momentum()}
        move_weights(self.query_encoder, self.key_encoder, rates["momentum"])
        keys = self._encode_keys(key_images)  # N x C, no gradient
        with tf.GradientTape() as tape:
            queries = unit_length(self.query_encoder(query_images, training=True)["projection"])  # N x C
            contrast = info_nce(queries, keys, self.queue.keys.value, self.temperature)
            loss = tf.reduce_mean(contrast.loss)
            scaled_loss = self.optimizer.scale_loss(loss)  # for float16; else the loss itself
        variables = self.query_encoder.trainable_variables
        gradients = tape.gradient(scaled_loss, variables)
        self.optimizer.apply(gradients, variables)

        # The logits used the old queue. Enqueued before the backward pass is through, TensorFlow would have
        # to copy the whole queue, which that pass still reads.
        with tf.control_dependencies([g for g in gradients if g is not None]):
            self.queue.enqueue(keys)
        self.step.assign_add(1)
        return self._track(queries, contrast) | rates

    def test_step(self, data):
        """Loss and diagnostics in inference mode; changes neither queue nor encoders."""
        query_images, key_images = self._unpack(data)
        queries = unit_length(self.query_encoder(query_images, training=False)["projection"])
        keys = unit_length(self.key_encoder(key_images, training=False)["projection"])
        return self._track(queries, info_nce(queries, keys, self.queue.keys.value, self.temperature))

    def current_momentum(self):
        """m at the current step, a scalar."""
        if self.momentum_decay_steps is None:
            return tf.constant(self.momentum, tf.float64)
        return cosine_momentum(self.momentum, self.step.value, self.momentum_decay_steps)

    def _encode_keys(self, images):
        if not (self.shuffle_bn and self.bn_groups > 1):  # one group holds the same images in any order
            return unit_length(self.key_encoder(images, training=True)["projection"])
        shuffled, permutation = shuffle(images, seed=(self.seed, self.step.value))
        keys = unit_length(self.key_encoder(shuffled, training=True)["projection"])
        return unshuffle(keys, permutation)

    def _track(self, queries, contrast):
        found = contrast.positives > tf.reduce_max(contrast.negatives, axis=1)
        values = (
            contrast.loss,
            tf.cast(found, tf.float32),
            contrast.positives,
            tf.reduce_mean(contrast.negatives, axis=1),
            tf.math.reduce_std(queries, axis=0),
        )
        for metric, value in zip(self.diagnostics, values, strict=True):
            metric.update_state(value)
        return {metric.name: metric.result() for metric in self.diagnostics}

    def _unpack(self, data):
        query_images, key_images, _ = keras.utils.unpack_x_y_sample_weight(data)
        if key_images is None:
            raise ValueError("MoCo trains on (query, key) pairs of image batches: moco_tf.views makes them")
        return query_images, key_images

    def get_config(self):
        return super().get_config() | {
            "backbone": keras.saving.serialize_keras_object(self.backbone),
            "dim": self.dim,
            "head": self.head,
            "hidden_dim": self.hidden_dim,
            "queue_size": self.queue.size,
            "momentum": self.momentum,
            "momentum_decay_steps": self.momentum_decay_steps,
            "temperature": self.temperature,
            "shuffle_bn": self.shuffle_bn,
            "bn_groups": self.bn_groups,
            "preprocessing": dataclasses.asdict(self.preprocessing),
            "seed": self.seed,
        }

    @classmethod
    def from_config(cls, config):
        backbone = keras.saving.deserialize_keras_object(config["backbone"])
        preprocessing = Preprocessing(**config["preprocessing"])
        return cls(**config | {"backbone": backbone, "preprocessing": preprocessing})


def _image_shape(backbone, preprocessing):
    """(H, W, 3) of the backbone's input, None for a free side."""
    shape = getattr(backbone, "input_shape", None)  # subclassed models have none
    if isinstance(shape, tuple) and len(shape) == 4:
        return shape[1:]
    size = preprocessing.image_size if preprocessing else 224
    return (size, size, 3)


def _clone(backbone):
    """A model of the same build with weights of its own."""
    if isinstance(backbone, (keras.Function, keras.Sequential)):
        return keras.models.clone_model(
            backbone, clone_function=lambda layer: type(layer).from_config(layer.get_config()), recursive=True
        )
    return type(backbone).from_config(backbone.get_config())


def _set_bn_groups(encoder, groups):
    for layer in encoder._flatten_layers():
        if isinstance(layer, BatchNorm):
            layer.groups = groups
        elif isinstance(layer, keras.layers.BatchNormalization) and groups > 1:
            raise ValueError(
                f"bn_groups={groups} needs BatchNorm layers that know groups; {layer.name!r} is Keras' own: "
                "build the backbone with moco_tf.encoders.BatchNorm, or set bn_groups=1"
            )


def _check_bn_groups(images, groups):
    rule = f"each of the {groups} BN groups takes the same number of images, at least 2: change the batch size"
    batch = images.shape[0]
    if batch is None:  # a last partial batch, say: known only when it comes
        batch = tf.shape(images)[0]
        tf.debugging.assert_equal((batch % groups == 0) & (batch >= 2 * groups), True, rule)
    elif batch % groups or batch < 2 * groups:
        raise ValueError(f"{rule}; got {batch}")
