"""What every method shares: prediction, the step counter, running diagnostics, and what replicas agree on.

The methods of this folder derive from `ContrastiveModel`; nothing else does.
"""

import dataclasses

import keras
import tensorflow as tf

from moco_tf import replicas
from moco_tf.data.preprocessing import Preprocessing
from moco_tf.methods import normalization
from moco_tf.momentum import copy_weights

DIAGNOSTICS = (
    "loss",
    "contrast_top1",  # share of queries that find their key before all negatives
    "positive_similarity",  # mean cosine of a query and its key
    "negative_similarity",  # mean cosine of a query and a negative
    "feature_std",  # of the queries' coordinates over the batch: 0 collapsed, 1/sqrt(C) spread out
)


class ContrastiveModel(keras.Model):
    """A model with a `query_encoder` of normalised images -> {"features", "projection"} that learns from pairs.

    Works as it is and under any `tf.distribute` strategy that copies variables: build it in `strategy.scope()`.

    Attributes:
      step: int64 variable, training steps done. Schedules and everything random derive from it.
      preprocessing: how `predict` brings images to the backbone's input.
      seconds_waited: how long `fit` has waited for batches, in this process.
    """

    def __init__(self, preprocessing, **kwargs):
        super().__init__(autocast=False, **kwargs)  # `predict` takes 0-255 images: too many digits for bfloat16
        self.preprocessing = preprocessing
        self.step = self.add_weight(name="step", shape=(), initializer="zeros", dtype="int64", trainable=False)
        # Weights of the model and no Keras metrics: those keep a part of the sum on each replica, which does not
        # restore exactly, and are left out of checkpoints. The last place counts.
        self.totals = self.add_weight(
            name="totals", shape=(len(DIAGNOSTICS) + 1,), initializer="zeros", trainable=False, autocast=False
        )
        self.seconds_waited = 0.0  # by `fit`, for batches that were not ready
        self.built = True

    @property
    def steps_done(self):
        """The value of `step`, a Python integer, under any strategy."""
        return int(self.step.numpy())

    @property
    def backbone(self):
        return self.query_encoder.layers[1]

    def compile(self, optimizer="rmsprop", **kwargs):
        """As `keras.Model.compile`, but without a loss.

        XLA (`jit_compile`) is on where there is one GPU and no strategy; for `predict` as well, once a shape.
        """
        super().compile(optimizer=optimizer, **kwargs)
        self.optimizer.build(self.trainable_variables)  # so that files hold, and give back, its state

    def make_train_function(self, force=False):
        """As Keras', but `fit` runs one TensorFlow function, where Keras has one within another; and it is timed.

        Those take a second more to begin, since all the model's variables go through both.
        """
        if self.train_function is not None and not force:
            return
        super().make_train_function(force)
        if self.run_eagerly or self.steps_per_execution > 1:
            return
        of_keras = self.train_function  # takes `train_on_batch`'s data as well
        strategy, train_step = self.distribute_strategy, self.train_step
        if self.jit_compile:
            train_step = tf.function(train_step, autograph=False, reduce_retracing=True, jit_compile=True)

        @tf.function(autograph=False, reduce_retracing=True)
        def step(iterator):
            begun = tf.timestamp()
            with tf.control_dependencies([begun]):
                data = next(iterator)
            with tf.control_dependencies(tf.nest.flatten(data, expand_composites=True)):
                waited = tf.timestamp() - begun
            logs = strategy.run(train_step, (data,))
            # The replicas have agreed on them: the first has what all have.
            return {k: tf.reshape(strategy.experimental_local_results(v)[0], ()) for k, v in logs.items()}, waited

        def train_function(data):
            if not isinstance(data, (tf.data.Iterator, tf.distribute.DistributedIterator)):
                return of_keras(data)
            logs, waited = step(data)
            self.seconds_waited += float(waited)
            return logs

        self.train_function = train_function

    def compile_from_config(self, config):
        # Whether XLA compiles is this machine's choice, and not that of the one that wrote the file.
        self.compile(**keras.saving.deserialize_keras_object(config) | {"jit_compile": "auto"})

    def call(self, images, training=False):
        """Backbone features, at least float32 (N, C), of uint8 or 0-255 images (N, H, W, 3)."""
        features = self.query_encoder(self.preprocessing(images), training=training)["features"]
        return tf.cast(features, self.totals.dtype)

    def reset_metrics(self):
        super().reset_metrics()
        self.totals.assign(tf.zeros_like(self.totals))

    def track(self, queries, loss, positives, hardest, negatives, encoders=()):
        """Ends a step: what the replicas saw apart becomes one, in a single all-reduce.

        Args:
          queries: (n, C), of unit length, of this replica.
          loss, positives, hardest, negatives: (n,) for each query its loss and its cosines: with its key, with the
            nearest negative, and the mean over the negatives.
          encoders: models whose BatchNorm has moved its running statistics in this step. They become the mean over
            the replicas, so that all hold the same bits.

        Returns:
          The logs: means since the last reset.
        """
        dtype = self.totals.dtype
        found = tf.cast(positives > hardest, dtype)
        values = [tf.reduce_sum(tf.cast(value, dtype)) for value in (loss, found, positives, negatives)]
        queries = tf.cast(queries, dtype)
        number = tf.cast(tf.shape(queries)[0], dtype)
        running = []
        if replicas.count() > 1:  # one has nothing to agree on
            running = [variable for encoder in encoders for variable in normalization.running_statistics(encoder)]
        sums, first, second, *statistics = replicas.add_up(
            [
                tf.stack([*values, number]),
                tf.reduce_sum(queries, axis=0),
                tf.reduce_sum(queries**2, axis=0),
                *(variable.value for variable in running),
            ]
        )
        for variable, total in zip(running, statistics, strict=True):
            variable.assign(total / replicas.count())

        number = sums[-1]
        spread = tf.reduce_mean(tf.sqrt(tf.maximum(second / number - (first / number) ** 2, 0.0)))
        self.totals.assign_add(tf.concat([sums[:-1], [spread * number, number]], axis=0))
        means = self.totals.value[:-1] / self.totals.value[-1]
        return self.shape_logs(dict(zip(DIAGNOSTICS, tf.unstack(means), strict=True)))

    def shape_logs(self, logs):
        """Scalars, or (1,) vectors where several machines train: Keras reduces their logs along axis 0."""
        strategy = tf.distribute.get_strategy()
        if not strategy.extended._in_multi_worker_mode():
            return logs
        return {name: tf.reshape(value, [1]) for name, value in logs.items()}

    def _maybe_symbolic_build(self, iterator=None, data_batch=None):
        """Nothing: the model is built. Under a strategy, Keras' own would draw a batch, and fails on pairs."""

    def get_config(self):
        return super().get_config() | {
            "backbone": keras.saving.serialize_keras_object(self.backbone),
            "preprocessing": dataclasses.asdict(self.preprocessing),
        }

    @classmethod
    def from_config(cls, config):
        backbone = keras.saving.deserialize_keras_object(config["backbone"])
        preprocessing = Preprocessing(**config["preprocessing"])
        return cls(**config | {"backbone": backbone, "preprocessing": preprocessing})


def unpack(data):
    """The two batches of views (n, H, W, 3) of a training step."""
    query_images, key_images, _ = keras.utils.unpack_x_y_sample_weight(data)
    if key_images is None:
        raise ValueError("a contrastive model trains on (query, key) pairs of image batches: moco_tf.views makes them")
    return query_images, key_images


def image_shape(backbone, preprocessing=None):
    """(H, W, 3) of the backbone's input, None for a free side."""
    shape = getattr(backbone, "input_shape", None)  # subclassed models have none
    if isinstance(shape, tuple) and len(shape) == 4:
        if shape[1] != shape[2]:
            raise ValueError(f"a backbone takes square images, or any size; this one takes {shape[1]} x {shape[2]}")
        return shape[1:]
    size = preprocessing.image_size if preprocessing else 224
    return (size, size, 3)


def clone(backbone):
    """A model of the same build with weights of its own."""
    if isinstance(backbone, (keras.Function, keras.Sequential)):
        return keras.models.clone_model(
            backbone, clone_function=lambda layer: type(layer).from_config(layer.get_config()), recursive=True
        )
    return type(backbone).from_config(backbone.get_config())


def start_key_encoder(query_encoder, key_encoder):
    """Makes a model of the same build a momentum encoder: the query's weights, and none for the optimizer."""
    copy_weights(query_encoder, key_encoder)
    # Per variable: `key_encoder.trainable = False` would put stock BatchNorm into inference mode.
    for variable in key_encoder.trainable_variables:
        variable.trainable = False
