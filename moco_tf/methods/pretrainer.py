"""The base class of every method: the one training step, the metrics, and what a method defines.

A method derives from `Pretrainer` and defines, in its paper's order, `prepare` (what needs no gradient), `objective`
(the loss), `finish` (what comes after the gradients).

Axes: n images of this replica, N of the global batch, H W image, C length of the embedding.
"""

import dataclasses
from collections.abc import Callable
from typing import ClassVar

import keras
import tensorflow as tf

from moco_tf import replicas
from moco_tf.data import inputs
from moco_tf.encoders import heads
from moco_tf.methods import batch_norms, keras_internals
from moco_tf.methods.keras_ways import KerasWays
from moco_tf.methods.losses import unit_length
from moco_tf.methods.shuffle_bn import check_groups


@dataclasses.dataclass(frozen=True)
class Spread:
    """A metric of the whole batch: the mean over C of the standard deviations over N of rows (n, C)."""

    rows: Callable


# The metrics of contrast with negatives, from a `losses.Contrast`.
CONTRAST_METRICS = {
    "contrast_top1": lambda terms: terms.top1,  # share of queries that find their key before all negatives
    "positive_similarity": lambda terms: terms.positives,  # mean cosine of a query and its key
    "negative_similarity": lambda terms: terms.negatives,  # mean cosine of a query and a negative
    "feature_std": Spread(lambda terms: terms.queries),  # 0: collapsed, 1/sqrt(C): spread out
}


class Pretrainer(KerasWays):
    """A model with a `query_encoder` of normalised images -> {"features", "projection"} that learns from views.

    Works without a strategy and under any `tf.distribute` strategy that copies variables: build it in
    `strategy.scope()`.

    A class defines its metrics in `METRICS`. A metric has a name and a function of the objective's terms, or a
    `Spread`. The function returns one value per row (n,), and the metric is their mean. Accumulators, metrics.csv and
    TensorBoard follow `METRICS`; the progress line shows the first metric. `RATES` names the values that `rates`
    returns beside the metrics.

    Attributes:
      step: int64 variable, training steps done. Schedules and everything random derive from it.
      totals: sums since the last reset: of the loss, the metrics, and the number of rows.
      preprocessing: how `predict` brings images to the backbone's input.
    """

    METRICS: ClassVar[dict] = {}
    RATES = ("learning_rate",)
    VIEWS = (1, None)  # the fewest and the most views of a record that a step takes; None: any number
    TAKES = None  # how many of a task's views it trains on; None: all
    small_views = 0  # how many of a step's views, the last ones, are queries only, of another size
    groups_here = 1  # BN groups of this replica's batch
    on_device = None  # a step's first operation on a batch's tuple of views; None: the views are ready

    def __init__(self, image_shape, preprocessing=None, **kwargs):
        super().__init__(image_shape, preprocessing, **kwargs)
        self.step = self.add_weight(name="step", shape=(), initializer="zeros", dtype="int64", trainable=False)
        # Weights of the model and no Keras metrics: Keras metrics keep a part of the sum on each replica, which does
        # not restore exactly, and are left out of checkpoints.
        self.totals = self.add_weight(
            name="totals", shape=(len(self.METRICS) + 2,), initializer="zeros", trainable=False, autocast=False
        )
        keras_internals.restores_zeros_of_another_shape(self.totals)  # of a run with other metrics
        self.built = True

    # What a method defines.

    def prepare(self, batch, training=True):
        """Does what needs no gradient (moves a momentum encoder, encodes keys, looks keys up) and returns a context.

        batch: {"views": a tuple of (n, H, W, 3), "id": (n,), "label": (n,)}; the latter two may be missing.
        training: False in evaluation, which changes nothing.
        """

    def objective(self, batch, context, training=True):
        """Returns the terms of loss and metrics, a NamedTuple of tensors with one entry per row (n,), such as `loss`.

        The step takes the mean of `loss` over the rows, and its gradient.
        """
        raise NotImplementedError

    def finish(self, batch, context, terms):
        """Does what comes after the gradients, for example stores keys."""

    def before_epoch(self, epoch, source):
        """Does what comes before an epoch (from 0) of a run, given the source of its records; only a run calls it."""

    def encode(self, images):
        """Returns {"features": (N, D), "embedding": (N, C) of unit length} of normalised images, in inference mode."""
        outputs = self.query_encoder(images, training=False)
        return {"features": outputs["features"], "embedding": unit_length(outputs["projection"])}

    def takes_views(self, count):
        """Says whether a step can take so many views of a record."""
        fewest, most = self.VIEWS
        return fewest <= count <= (most or count)

    def backbones_for_xla(self):
        """Returns the backbones whose passes XLA may compile on several replicas."""
        encoders = [getattr(self, name) for name in ("query_encoder", "key_encoder") if hasattr(self, name)]
        return [heads.backbone_of(encoder) for encoder in encoders]

    def rates(self):
        """Returns {name: scalar}, the schedules' values at the current step; `RATES` has the names."""
        return {"learning_rate": self.optimizer.learning_rate}

    def drawing_step(self, training):
        """Returns the step, int64, that what a step draws is a function of; in evaluation always step 0."""
        return self.step.value if training else tf.zeros_like(self.step.value)

    def watch(self, variables, gradients):
        """Returns {name: scalar} of measures of a step's gradients, for TensorBoard and callbacks.

        gradients: this replica's gradients, not yet added up, times the optimizer's loss scale.
        """
        return {}

    def columns(self):
        """Returns the names of this model's columns in metrics.csv, beside the loss."""
        return (*self.METRICS, *self.RATES)

    # The step.

    def train_step(self, data):
        batch = self._batch(data)
        rates = self.rates()
        context = self.prepare(batch)
        with tf.GradientTape() as tape:
            terms = self.objective(batch, context)
            loss = tf.reduce_mean(terms.loss)
            for value in self._regularization():
                loss += tf.cast(value, loss.dtype)
            loss /= replicas.count()  # the optimizer adds gradients up
            scaled_loss = self.optimizer.scale_loss(loss)  # for float16; else the loss itself
        variables = self.trainable_variables
        gradients = tape.gradient(scaled_loss, variables)
        gradients = [g if g is None else tf.convert_to_tensor(g) for g in gradients]  # looked-up rows give no tensors
        watched = self.watch(variables, gradients)
        self.optimizer.apply(gradients, variables)
        # The loss reads the queue's variable without a copy: `finish` writes to it after loss and gradients exist.
        with tf.control_dependencies([*terms, *(g for g in gradients if g is not None)]):
            self.finish(batch, context, terms)
        self.step.assign_add(1)
        logs = self._reduce_over_replicas(terms, batch_norms.running_statistics(self))
        return logs | self._shaped(rates | watched)

    def _regularization(self):
        """The scalars that regularizers of a user's backbone give; refuses losses that its layers add themselves."""
        of_weights = [v.regularizer(v) for v in self.trainable_variables if getattr(v, "regularizer", None)]
        if len(self.losses) > len(of_weights):  # of two passes of an encoder, Keras keeps those of the last alone
            raise ValueError(
                "a backbone's weights may have regularizers, but its layers add no losses of their own (add_loss, "
                f"activity_regularizer); got {len(self.losses) - len(of_weights)}: leave them out"
            )
        return of_weights

    def test_step(self, data):
        """Returns loss and metrics in inference mode; changes neither weights nor stored keys."""
        batch = self._ready(data)
        return self._reduce_over_replicas(self.objective(batch, self.prepare(batch, training=False), training=False))

    def _batch(self, data):
        """The batch of a training step, its views ready for BN groups."""
        batch = self._ready(data)
        return batch | {"views": tuple(check_groups(v, self.groups_here) for v in batch["views"])}

    def _ready(self, data):
        """Returns the batch with its views finished."""
        batch = as_batch(data)
        self._check_views(batch)
        if not self.on_device:
            if any(map(are_pixels, batch["views"])):
                raise ValueError(
                    f"fit takes normalised images, float, as moco_tf.views makes them; got "
                    f"{batch['views'][0].dtype.name}: model.preprocessing normalises pixels of 0 to 255"
                )
            return batch
        # Compiled on its own too, where the step is not compiled: as single operations it takes nine times as long.
        compiled = tf.function(self.on_device, jit_compile=True, autograph=False)
        return batch | {"views": compiled(batch["views"])}

    def _check_views(self, batch):
        count = len(batch["views"])
        if not self.takes_views(count):
            raise ValueError(
                f"{type(self).__name__} trains on {_number_of_views(*self.VIEWS)}; got {count} views of each record"
            )

    def _reduce_over_replicas(self, terms, statistics=()):
        """Ends a step: one all-reduce makes metrics and BatchNorm's statistics the same on all replicas. Returns logs.

        statistics: BatchNorm's running statistics, variables that become the mean over the replicas, so that all
        replicas hold the same bits.
        """
        statistics = statistics if replicas.count() > 1 else []  # one replica has nothing to average
        dtype = self.totals.dtype
        rows = {name: tf.cast(value, dtype) for name, value in ({"loss": terms.loss} | self._values(terms)).items()}
        spreads = {name: rows[name] for name, metric in self.METRICS.items() if isinstance(metric, Spread)}
        means = {name: value for name, value in rows.items() if name not in spreads}
        number = tf.cast(tf.shape(terms.loss)[0], dtype)
        moments = [tf.reduce_sum(v, axis=0) for value in spreads.values() for v in (value, value**2)]
        sums, *combined = replicas.add_up(
            [
                tf.stack([*(tf.reduce_sum(value) for value in means.values()), number]),
                *moments,
                *(variable.value for variable in statistics),
            ]
        )
        for variable, total in zip(statistics, combined[len(moments) :], strict=True):
            variable.assign(total / replicas.count())

        *sums, number = tf.unstack(sums)
        totals = dict(zip(means, sums, strict=True))
        for place, name in enumerate(spreads):
            first, second = combined[2 * place : 2 * place + 2]
            spread = tf.reduce_mean(tf.sqrt(tf.maximum(second / number - (first / number) ** 2, 0.0)))
            totals[name] = spread * number
        self.totals.assign_add(tf.stack([*(totals[name] for name in rows), number]))
        shown = self.totals.value[:-1] / self.totals.value[-1]
        return self._shaped(dict(zip(rows, tf.unstack(shown), strict=True)))

    def _values(self, terms):
        """{name: (n,) or (n, C)} of the metrics."""
        return {name: (m.rows if isinstance(m, Spread) else m)(terms) for name, m in self.METRICS.items()}

    def _shaped(self, logs):
        """Scalars, or (1,) vectors where several machines train: Keras reduces their logs along axis 0."""
        if not keras_internals.of_several_machines(tf.distribute.get_strategy()):
            return logs
        return {name: tf.reshape(value, [1]) for name, value in logs.items()}

    def reset_metrics(self):
        super().reset_metrics()
        self.totals.assign(tf.zeros_like(self.totals))

    def views_become(self, on_device):
        """Sets `on_device`, a step's first operation on the views, from the next `fit` on."""
        self.on_device = on_device
        self.train_function = self.test_function = None  # they were traced with the old `on_device`

    # What Keras needs.

    @property
    def steps_done(self):
        """The value of `step`, a Python integer, under any strategy."""
        return int(self.step.numpy())

    @property
    def backbone(self):
        return heads.backbone_of(self.query_encoder)

    def call(self, images, training=False):
        """Backbone features, at least float32 (N, D), of uint8 or 0-255 images (N, H, W, 3)."""
        features = self.query_encoder(self.preprocessing(images), training=training)["features"]
        return tf.cast(features, self.totals.dtype)

    def load_own_variables(self, store):
        """Loads the model's own weights; `totals` of other metrics, in the file of another version, become zeros."""
        place = str([variable is self.totals for variable in self.variables].index(True))  # own weights come first
        own = {}
        self.save_own_variables(own)
        own |= {name: store[name] for name in own if name != place or store[name].shape == self.totals.shape}
        own[place] = own[place] if store[place].shape == self.totals.shape else 0 * own[place]
        super().load_own_variables(own)

    def get_config(self):
        return super().get_config() | {
            "backbone": keras.saving.serialize_keras_object(self.backbone),
            "preprocessing": dataclasses.asdict(self.preprocessing),
        }

    @classmethod
    def from_config(cls, config):
        if "momentum_decay_steps" in config:  # its name in files of 0.1
            config = config | {"momentum_rise_steps": config["momentum_decay_steps"]}
            del config["momentum_decay_steps"]
        backbone = keras.saving.deserialize_keras_object(config["backbone"])
        preprocessing = inputs.of_settings(config["preprocessing"])
        before = keras.config.dtype_policy()
        try:  # heads are made anew, in the precision that the file's were made in
            keras.config.set_dtype_policy(keras.dtype_policies.get(config.get("dtype", before)))
            return cls(**config | {"backbone": backbone, "preprocessing": preprocessing})
        finally:
            keras.config.set_dtype_policy(before)


def _number_of_views(fewest, most):
    if (fewest, most) == (2, None):
        return "(query, key) pairs of image batches, as moco_tf.views makes them, or on more keys"
    if (fewest, most) == (2, 2):
        return "(query, key) pairs of batches, as moco_tf.views makes them of images"
    return f"{fewest} view{'s' if fewest > 1 else ''} of each record" + ("" if most == fewest else " or more")


def are_pixels(view):
    """Whether a view, a tensor, an array or the spec of one, is a batch of images of whole numbers."""
    return tf.as_dtype(view.dtype).is_integer and len(view.shape) == 4


def as_batch(data):
    """Returns {"views": (n, H, W, 3) each, ...} of a batch: this dict, or a tuple (query, key) or (images, ids)."""
    if isinstance(data, dict):
        views = data.get("views")
        if not isinstance(views, (tuple, list)) or not views:
            raise ValueError(
                'a batch is a dict with "views", a tuple of image batches (N, H, W, 3), or a pair of them; got a dict '
                f"with {', '.join(map(repr, data)) or 'nothing'}"
            )
        return data | {"views": tuple(views)}
    images, other, third = keras.utils.unpack_x_y_sample_weight(data)
    if third is not None:
        raise ValueError(
            'a batch is a pair (query, key), or a dict whose "views" may be more; got a tuple of three, whose last '
            "would be taken for weights"
        )
    if other is None:
        return {"views": (images,)}
    several = len(other.shape) == len(images.shape)
    return {"views": (images, other)} if several else {"views": (images,), "id": other}
