"""Adapts `keras.Model` (fit, predict, save, export, compile) to models that learn without labels.

Raises an error of one plain sentence where Keras would raise an obscure one.
"""

import warnings

import keras
import numpy as np
import tensorflow as tf

from moco_tf import replicas
from moco_tf.data import arrays
from moco_tf.data.inputs.image import Preprocessing
from moco_tf.encoders.batch_norm import on_gpu
from moco_tf.methods import keras_internals, xla_passes


class KerasWays(keras_internals.BuiltByHand, keras.Model):
    """A `keras.Model` of images whose loss and metrics are its own.

    Attributes:
      preprocessing: how `predict` brings images to the backbone's input.
      seconds_waited: how long `fit` has waited for batches, in this process.
      in_xla: whether XLA compiles the training step, or on several replicas its backbones' passes.
    """

    def __init__(self, image_shape, preprocessing=None, **kwargs):
        super().__init__(autocast=False, **kwargs)  # `predict` takes 0-255 images: too many digits for bfloat16
        self._preprocessing_assumed = preprocessing is None
        preprocessing = getattr(preprocessing, "preprocessing", preprocessing)  # a task's
        self.preprocessing = preprocessing or Preprocessing(image_size=image_shape[0] or 224)
        self.preprocessing.check_fits(image_shape)
        self.seconds_waited = 0.0  # by `fit`, for batches that were not ready

    def compile(self, optimizer="rmsprop", jit_compile="auto", **kwargs):
        """Does the same as `keras.Model.compile`, but without losses and metrics: each method has its own.

        XLA (`jit_compile`) is on by default on GPUs. On one, it compiles the whole step, and `predict` too, once per
        shape. On several replicas it compiles the backbones' passes (`xla_passes.py`).

        Raises:
          ValueError: a loss or metrics are given; or `jit_compile` is True, and XLA can compile none of the passes.
        """
        for name in ("loss", "loss_weights", "metrics", "weighted_metrics"):
            if kwargs.get(name) is not None:
                raise ValueError(
                    f"a pretraining model brings its loss and diagnostics along; compile takes no {name}, got "
                    f"{kwargs[name]!r}: leave it out"
                )
        several = self.distribute_strategy.num_replicas_in_sync > 1
        super().compile(optimizer=optimizer, jit_compile=False if several else jit_compile, **kwargs)
        self.in_xla = self._compile_passes(jit_compile) if several else self.jit_compile
        self.optimizer.build(self.trainable_variables)  # so that files hold its state, and restore it

    def _compile_passes(self, wanted):
        """Sets whether XLA compiles the backbones' passes: True, False or "auto"; returns whether it does."""
        backbones = self.backbones_for_xla()
        can = bool(backbones) and all(map(xla_passes.can_compile, backbones))
        if wanted is True and not can:
            raise ValueError(
                "on several replicas XLA compiles the passes of backbones that send nothing to other replicas; those "
                f"of this {type(self).__name__} do, or have parts that XLA lacks: leave jit_compile (--xla) at auto"
            )
        compiled = can and (on_gpu() if wanted == "auto" else wanted)
        for backbone in backbones:
            xla_passes.set_compiled(backbone, compiled)
        return compiled

    def make_train_function(self, force=False):
        """Does the same as Keras', but `fit` runs one TensorFlow function, not one inside another, and is timed.

        Keras' two functions take a second more to start, since all the model's variables go through both.
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
            with tf.control_dependencies([waited]):  # otherwise a single thread may read the clock after the step
                data = tf.nest.map_structure(tf.identity, data, expand_composites=True)
            logs = strategy.run(train_step, (data,))
            # All replicas have the same logs: take those of the first.
            return {k: tf.reshape(strategy.experimental_local_results(v)[0], ()) for k, v in logs.items()}, waited

        def train_function(data):
            if not isinstance(data, (tf.data.Iterator, tf.distribute.DistributedIterator)):
                return of_keras(data)
            logs, waited = step(data)
            self.seconds_waited += float(waited)
            return logs

        self.train_function = train_function

    def fit(self, x=None, *args, **kwargs):
        """Does the same as `keras.Model.fit`, on (query, key) batches; raises if replicas cannot share one evenly."""
        for name in ("class_weight", "sample_weight"):
            if kwargs.get(name) is not None:
                raise ValueError(f"a pretraining model weighs all pairs alike; fit takes no {name}: leave it out")
        if self.distribute_strategy.num_replicas_in_sync > 1 and self.dtype_policy.name == "mixed_float16":
            raise ValueError(
                "mixed_float16 scales the loss by what one replica's gradients say, so that an overflow on another "
                "one would reach the weights: take mixed_bfloat16 on several replicas"
            )
        self._check_shares(x, *args, **kwargs)
        self._meet_views(x)
        return super().fit(x, *args, **kwargs)

    def _check_shares(self, x, y=None, batch_size=None, *args, **kwargs):
        """Raises if a batch of known size does not have the same number of images for each replica."""
        count = self.distribute_strategy.num_replicas_in_sync
        if isinstance(x, tf.data.Dataset):
            batch_size = tf.nest.flatten(x.element_spec)[0].shape[:1].as_list()[0]
        elif hasattr(x, "shape"):
            batch_size = batch_size or 32
        if batch_size:
            replicas.check_shared(batch_size, count)

    def _meet_views(self, views):
        """Takes over the preprocessing of views by `moco_tf.views`, or warns that the model has a different one."""
        of_views = preprocessing_of(views)
        if of_views in (None, self.preprocessing):
            return
        if self._preprocessing_assumed:
            self.preprocessing = of_views
            self.predict_function = None  # its graph has the old preprocessing
            return
        warnings.warn(
            f"The views are made with {of_views}, but predict, kNN and export will use {self.preprocessing}: give the "
            "model preprocessing=task, the task of the views.",
            stacklevel=3,
        )

    def predict(self, x, *args, **kwargs):
        """Returns the backbone features (N, C), a NumPy array, of raw images, as `keras.Model.predict` does.

        x: uint8 or 0-255 images (N, H, W, 3) or grey (N, H, W, 1), a list of images of one size, or a tf.data.Dataset
        of batches.

        Raises:
          ValueError: the values are plainly not 0..255.
        """
        x = arrays.as_array(x)
        if isinstance(x, tf.data.Dataset):
            x = x.map(arrays.image_of)
            _check_batch_shape(x.element_spec.shape, self.preprocessing.channels)
            arrays.check_dataset(x)
        elif isinstance(x, keras.utils.PyDataset):
            first = x[0]
            arrays.check_array(np.asarray(first[0] if isinstance(first, tuple) else first))
        elif hasattr(x, "dtype"):
            _check_batch_shape(x.shape, self.preprocessing.channels)
            arrays.check_array(x)
            if not len(x):
                return np.zeros((0, self.query_encoder.output["features"].shape[-1]), self.totals.dtype)
        return super().predict(x, *args, **kwargs)

    def export(self, filepath, *args, **kwargs):
        """Raises an error that names `export_encoder`: Keras' own export would leave out the images' preprocessing."""
        raise ValueError(
            f"the encoder of a pretraining model is exported by moco_tf.export_encoder(model, {str(filepath)!r}), "
            "whose folder ends in a version, as in encoder/1"
        )

    def save(self, filepath, *args, **kwargs):
        """Does the same as `keras.Model.save`, to a .keras file."""
        if not str(filepath).endswith(".keras"):
            raise ValueError(
                f"a pretraining model is saved whole in a file that ends in .keras; got {str(filepath)!r}: "
                "moco_tf.export_encoder writes SavedModels"
            )
        super().save(filepath, *args, **kwargs)

    def compile_from_config(self, config):
        # Keeps XLA's setting out of the file: the loading machine decides.
        self.compile(**keras.saving.deserialize_keras_object(config) | {"jit_compile": "auto"})


def _check_batch_shape(shape, channels):
    """Raises unless a batch has colour or grey images, or images of `channels` channels if `channels` is not 3."""
    if channels != 3:
        if len(shape) != 4 or shape[3] not in (channels, None):
            raise ValueError(f"predict takes batches of images, (N, H, W, {channels}), not {tuple(shape)}")
    elif len(shape) != 4 or shape[3] not in (1, 3, None):
        raise ValueError(
            f"predict takes batches of images, (N, H, W, 3) or grey (N, H, W, 1), not {tuple(shape)}: one image is "
            "images[None], grey ones are images[..., None]"
        )


def preprocessing_of(dataset):
    """Returns the `Preprocessing` of a dataset's views, None if `moco_tf.views` did not make them."""
    while isinstance(dataset, tf.data.Dataset):
        if hasattr(dataset, "preprocessing"):
            return dataset.preprocessing
        dataset = keras_internals.input_of(dataset)
    return None
