"""Builds the objects that a `Config` describes: data, pretext task, and model with its optimizer."""

import contextlib
import dataclasses
import functools
import os
from pathlib import Path

import keras
import numpy as np
import tensorflow as tf

from moco_tf import config as config_lib
from moco_tf import encoders, files, replicas, run_folder, schedules
from moco_tf.checkpoint import Checkpoints
from moco_tf.command import ConfigError
from moco_tf.data import augment, errors, views
from moco_tf.data.inputs.image import IMAGENET
from moco_tf.methods.pretrainer import are_pixels
from moco_tf.optimizers import LARS, SGD, AdamW

OPTIMIZERS = {"sgd": SGD, "lars": LARS, "adamw": AdamW}  # each with its paper's constants
POLICIES = {"float32": "float32", "bfloat16": "mixed_bfloat16", "float16": "mixed_float16"}


def strategy(config):
    """The `tf.distribute` strategy that the flags and the machine call for.

    Call it before anything else touches TensorFlow: devices and workers are set up once.
    """
    gpus = tf.config.list_physical_devices("GPU")
    kind = config.strategy
    if kind == "auto":
        several = len(gpus) > 1 or config.virtual_replicas > 1
        kind = "multiworker" if "TF_CONFIG" in os.environ else "mirrored" if several else "single"
    if kind == "multiworker":
        if "TF_CONFIG" not in os.environ:
            raise ConfigError(
                "--strategy=multiworker reads the machines from the environment variable TF_CONFIG, which is not set "
                "(docs/scaling.md has an example)"
            )
        try:
            return tf.distribute.MultiWorkerMirroredStrategy()
        except ValueError as error:
            raise ConfigError(f"TF_CONFIG does not describe the machines: {files.first_line(error)}") from None
    if kind == "single":
        return tf.distribute.get_strategy()
    if not config.virtual_replicas:
        return tf.distribute.MirroredStrategy()
    return replicas.on_one_cpu(config.virtual_replicas)


def is_chief(strategy):
    """Whether this process writes the files: it is the only process, or the first of several."""
    cluster = strategy.cluster_resolver
    if cluster is None or cluster.task_type in (None, "chief"):
        return True
    return cluster.task_id == 0 and "chief" not in cluster.cluster_spec().jobs


def batches(config, strategy, records, task, step, model):
    """Returns endless batches of training data, from training step `step` on: each replica's own share.

    Raises:
      ConfigError: the model does not train on the number of views that the task makes, or the views differ in shape.
    """
    number = strategy.num_replicas_in_sync
    whole = at_once(config, records)

    def share(worker=(0, 1)):
        dataset = views.batches(
            records,
            task,
            config.batch_size,
            config.seed,
            step,
            replicas=number,
            worker=worker,
            most=model.TAKES,
            at_once=whole,
        )
        _check_views(config, dataset.element_spec["views"], model)
        return dataset

    if number == 1:
        return share()
    return strategy.distribute_datasets_from_function(
        lambda worker: share((worker.input_pipeline_id, worker.num_input_pipelines))
    )


def _check_views(config, spec, model):
    if not model.on_device and any(not isinstance(view, tf.TensorSpec) for view in spec):
        raise ConfigError(
            f"--pretext={config.pretext} gives views that the training step is to finish, but has no on_device "
            "(docs/pretext.md) to say how; the crops of --views_on=host are whole"
        )
    if not model.on_device and any(map(are_pixels, spec)):
        raise ConfigError(
            f"--pretext={config.pretext} gives images of whole numbers, and has no on_device that normalises them: "
            "give float views, normalised by inputs"
        )
    if getattr(config, "small_views", 0) and not model.small_views:
        raise ConfigError(f"{config.learner} has no small views; got --small_views={config.small_views}: leave it out")
    shapes = [tuple(tf.nest.flatten(view)[0].shape[1:]) for view in spec]
    if len(set(shapes[: len(shapes) - model.small_views])) > 1:
        raise ConfigError(
            f"--pretext={config.pretext}: all views of a record are of one shape; got {', '.join(map(str, shapes))}"
        )
    if not model.takes_views(len(shapes)):
        fewest, most = model.VIEWS
        wanted = f"{fewest}" if most == fewest else f"{fewest} to {most}" if most else f"{fewest} or more"
        raise ConfigError(
            f"{config.learner} trains on {wanted} views of each record; --pretext={config.pretext} gives {len(shapes)}"
        )


def steps_per_epoch(config, size):
    """Training steps in a pass over `size` images; the last partial batch is dropped."""
    if size < config.batch_size:
        raise ConfigError(
            f"an epoch needs at least one batch: {size} images are fewer than --batch_size={config.batch_size}"
        )
    return size // config.batch_size


def inputs(config, size=None):
    """Returns the encoder's input format: the task's own, or a `Preprocessing` with the numbers of its views' recipe.

    size: the size of the views, if it is not the run's own.
    """
    module = config_lib.task_module(config.pretext)
    size = size or config.image_size
    if hasattr(module, "inputs") and (own := module.inputs(config, config.options(module.Options))):
        return dataclasses.replace(own, image_size=size) if own.unit == "images" else own
    if getattr(config, "augment", None) not in augment.RECIPES:  # a user's own task may give `augment` another meaning
        return dataclasses.replace(IMAGENET, image_size=size).of_channels(config.channels)
    return augment.RECIPES[config.augment](size).preprocessing.of_channels(config.channels)


def task(config, size=None):
    """The pretext task: a function (record, seed) -> views, float32 (S, S, 3) each; size: S, if not the run's own."""
    module = config_lib.task_module(config.pretext)
    views = functools.partial(module.views, inputs=inputs(config, size), options=config.options(module.Options))
    if module.__name__.startswith("moco_tf."):  # written without Python's `if` and `for` over tensors
        return tf.autograph.experimental.do_not_convert(views)  # reading its source would delay the start by a second
    return views


def on_device(config, size=None):
    """Returns the function that finishes a batch's views inside the training step, or None if they are ready.

    size: the size of the views, if it is not the run's own.
    """
    module = config_lib.task_module(config.pretext)
    if not hasattr(module, "on_device"):
        return None
    return module.on_device(inputs(config, size), config.options(module.Options))


def at_once(config, records):
    """Returns the task's function that makes the views of a whole batch, or None if it works record by record.

    Raises:
      ConfigError: the records do not allow what the flags ask for, or a record cannot be read any more.
    """
    module = config_lib.task_module(config.pretext)
    if not hasattr(module, "at_once"):
        return None
    try:
        return module.at_once(records, config.options(module.Options))
    except ValueError as error:
        raise ConfigError(str(error)) from None
    except errors.ERRORS as error:
        raise ConfigError(
            f"{records.name}: {errors.reason(error)}; files that have changed are checked anew"
        ) from None


def read(config, source):
    """Returns the records that the encoder reads: images, sentences, or pairs if it needs a second file for each.

    Raises:
      ConfigError: the source holds something else.
    """
    wanted = inputs(config)
    if source.unit != wanted.unit:
        raise ConfigError(
            f"--pretext={config.pretext} learns from {wanted.unit}; {source.name} holds {source.unit}"
            + (": --pretext=simcse learns from those" if source.unit == "sentences" else "")
        )
    try:
        return wanted.records_of(source)
    except ValueError as error:
        raise ConfigError(f"--pretext={config.pretext}: {error}") from None


def records(config, source):
    """Returns the records that the task makes views of: `source`, or what its module's `records` makes of `source`."""
    module = config_lib.task_module(config.pretext)
    if not hasattr(module, "records"):
        return source
    try:
        return module.records(source, config.options(module.Options))
    except ValueError as error:
        raise ConfigError(f"--pretext={config.pretext}: {error}") from None
    except errors.ERRORS as error:  # an image that changed after it was checked
        raise ConfigError(f"{source.name}: {errors.reason(error)}; files that have changed are checked anew") from None


def picture(config, views):
    """A uint8 image (H, W, 3) of a batch's views of images, as the task's module or the inputs show them."""
    module = config_lib.task_module(config.pretext)
    if hasattr(module, "picture"):
        return module.picture(views, inputs(config), config.options(module.Options))
    return inputs(config).picture(views)


def backbone(config):
    """Returns a run's backbone for its image size, with fresh weights, as its flags or its task describe it."""
    task = config_lib.task_module(config.pretext)
    if hasattr(task, "backbone"):
        return task.backbone(config, config.options(task.Options), inputs(config))
    return encoders.of_config(config, zero_init_residual=config.method == "moco_v3", any_size=False)


@contextlib.contextmanager
def precision(name):
    """Makes layers that are created in this context compute in a precision, named as in --precision."""
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy(POLICIES[name])
    try:
        yield
    finally:
        keras.config.set_dtype_policy(before)


def model(config, source):
    """Returns the compiled model, whose weights are a function of `config.seed`.

    source: the training data; only its `size` is used here.
    """
    keras.utils.set_random_seed(config.seed)
    steps = steps_per_epoch(config, source.size)
    task = config_lib.task_module(config.pretext)
    with precision(config.precision):
        if hasattr(task, "model"):
            pretrainer = task.model(config, config.options(task.Options), inputs(config), source)
        else:
            method = config_lib.method_module(config.method)
            options = config.options(config_lib.method_options(config.method))
            pretrainer = method.model(config, options, inputs(config), source)
        # The step comes from the model's own counter: under loss scaling, an optimizer does not count skipped steps.
        rate = lambda: learning_rate(config, pretrainer.step.value, steps)  # noqa: E731
        xla = {"on": True, "off": False}.get(config.xla, config.xla)
        pretrainer.on_device = on_device(config)
        try:
            pretrainer.compile(OPTIMIZERS[config.optimizer](rate, weight_decay=config.weight_decay), jit_compile=xla)
        except ValueError as error:
            raise ConfigError(str(error)) from None
    return pretrainer


def trained(run_dir):
    """Returns the model of a run folder, restored from its last checkpoint."""
    config = run_folder.recorded(run_dir)
    if config is None:
        raise ConfigError(f"{run_dir} is not a run folder: it has no config.flags")
    moco = model(config, run_folder.data(run_dir) or run_folder.Data(config.batch_size))
    checkpoints = Checkpoints(Path(run_dir) / "checkpoints", moco)
    step = checkpoints.restore_last()
    if step is None:
        raise ConfigError(f"{run_dir} is a run folder without a checkpoint: moco_tf.train writes one an epoch")
    # Features may hide NaN weights: oneDNN's ReLU turns NaN into 0.
    bad = [weight.path for weight in moco.query_encoder.weights if not np.isfinite(weight.numpy()).all()]
    if bad:
        raise ConfigError(
            f"{checkpoints.path(step)} has numbers that are not finite in {len(bad)} of the encoder's weights, first "
            f"in {bad[0]}: move it away, and the checkpoint before it is taken; or train at a lower --lr"
        )
    return moco


def learning_rate(config, step, steps_per_epoch):
    """Returns the learning rate of one training step (from 0), a float64 scalar."""
    epoch = tf.cast(step, tf.float64) / steps_per_epoch
    shaped = tf.floor(epoch) if config.lr_per == "epoch" else epoch
    if config.lr_schedule == "step":
        rate = schedules.steps(config.base_rate, shaped, config.lr_drops)
    else:
        decaying = tf.maximum(shaped - config.warmup_epochs, 0.0)
        rate = schedules.cosine(config.base_rate, decaying, config.epochs - config.warmup_epochs)
    return schedules.warm_up(rate, config.base_rate, epoch, config.warmup_epochs)
