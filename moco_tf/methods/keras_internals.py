"""Wraps private names of Keras 3.15 and TensorFlow 2.21 that have no public counterpart: each stands here, once."""

import tensorflow as tf


def layers_of(model):
    """All layers inside a model, at any depth, without itself; `model.layers` stops at the first level."""
    return list(model._flatten_layers(include_self=False, recursive=True))


def of_several_machines(strategy):
    """Whether a `tf.distribute` strategy trains on several machines; Keras then reduces logs along axis 0."""
    return strategy.extended._in_multi_worker_mode()


def input_of(dataset):
    """Returns the dataset that a tf.data.Dataset was made from; None if there is none or several (TensorFlow 2.21)."""
    return getattr(dataset, "_input_dataset", None)


def restores_zeros_of_another_shape(variable):
    """Lets a variable become zeros where a checkpoint has it in another shape; otherwise Keras 3.15 raises."""
    restore = variable._restore_from_tensors

    def restored(tensors):
        (value,) = tensors.values()
        if value.shape == variable.shape:
            return restore(tensors)
        return restore({name: tf.zeros(variable.shape, variable.dtype) for name in tensors})

    variable._restore_from_tensors = restored


class BuiltByHand:
    """A base class, before `keras.Model`, of a model that is built when it is made.

    Keras' `fit` would build the model with a batch that it draws; under a strategy this fails on batches of several
    views.
    """

    def _maybe_symbolic_build(self, iterator=None, data_batch=None):
        """Does nothing: the model is built already."""
