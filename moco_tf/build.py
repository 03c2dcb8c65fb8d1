"""From a `Config` to the objects that it describes: data, pretext task, model with its optimizer."""

import logging
import os
from pathlib import Path

import keras
import numpy as np
import tensorflow as tf

from moco_tf import replicas, run_folder, schedules
from moco_tf.checkpoint import Checkpoints
from moco_tf.command import ConfigError
from moco_tf.data import augment, folder, sources, tfds
from moco_tf.data.check import remarks
from moco_tf.data.manifest import check_files, too_many_bad
from moco_tf.data.views import pairs
from moco_tf.encoders import resnet, vit
from moco_tf.methods.end_to_end import EndToEnd
from moco_tf.methods.memory_bank import MemoryBank
from moco_tf.methods.moco import MoCo
from moco_tf.methods.moco_v3 import MoCoV3
from moco_tf.optimizers import LARS, SGD, AdamW

log = logging.getLogger("moco_tf")

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
            raise ConfigError(f"TF_CONFIG does not describe the machines: {str(error).splitlines()[0]}") from None
    if kind == "single":
        return tf.distribute.get_strategy()
    if not config.virtual_replicas:
        return tf.distribute.MirroredStrategy()
    return replicas.on_one_cpu(config.virtual_replicas)


def is_chief(strategy):
    """Whether this process is the one that writes: the only one, or the first of several."""
    cluster = strategy.cluster_resolver
    if cluster is None or cluster.task_type in (None, "chief"):
        return True
    return cluster.task_id == 0 and "chief" not in cluster.cluster_spec().jobs


def batches(config, strategy, source, task, step):
    """Endless batches of what the method trains on, from training step `step` on: each replica's own share."""
    number = strategy.num_replicas_in_sync
    ids = config.method == "memory_bank"
    if number == 1:
        return pairs(source, task, config.batch_size, config.seed, step, ids=ids)
    return strategy.distribute_datasets_from_function(
        lambda worker: pairs(
            source,
            task,
            config.batch_size,
            config.seed,
            step,
            replicas=number,
            worker=(worker.input_pipeline_id, worker.num_input_pipelines),
            ids=ids,
        )
    )


def find(config, split, begun=False):
    """What --dataset and a split name: a source, or the `folder.Listing` that `check` makes one of.

    begun: for a run under way (see `folder.scan`).
    """
    path = Path(config.data_dir, config.dataset).expanduser()
    try:
        if config.dataset == "embedded":
            return sources.embedded(split)
        # With --data_dir, a set of TFDS is a folder there as well.
        if path.exists() and not tfds.is_prepared(path):
            return folder.scan(path, split, begun)
        return tfds.find(config.dataset, config.data_dir, split, config.max_bad_fraction)
    except ValueError as error:
        raise ConfigError(f"--dataset={config.dataset}: {error}") from error


def check(config, found, manifest=None, begun=False, writes=True):
    """A source of what was found: a folder's files are checked, with what the manifest knows."""
    if not isinstance(found, folder.Listing):
        return found
    if not begun:
        _say(found)
    checked = check_files(found, manifest, begun, writes)
    if begun:  # with the images that it began with, which the manifest tells
        _say(checked.listing)
    try:
        source = checked.source()
    except ValueError as error:
        raise ConfigError(f"--dataset={config.dataset}: {error}") from error
    _report(checked)
    if refusal := too_many_bad(checked.bad, source.size, config.max_bad_fraction):
        raise ConfigError(refusal)
    return source


def _say(listing):
    """Says how a folder was read."""
    log.info(f"{folder.printable(listing.path)}: {listing.size} images")
    for sentence in folder.remarks(listing):
        log.log(logging.WARNING if sentence in listing.doubts else logging.INFO, f"  {sentence}")


def _report(checked):
    """Says on the screen how many images are bad or not what they seem, and in the log which are bad."""
    listing = checked.listing
    for sentence in remarks(checked.verdicts):
        log.info(f"  {sentence}")
    if checked.added:
        log.warning(
            f"{checked.added} images came into {listing.path} after the run began and are left out; "
            "a run in another --run_dir takes them in."
        )
    for file, problem in checked.bad:
        log.debug(f"Undecodable image: {folder.printable(listing.path / file)} ({problem})")
    if checked.bad:
        log.warning(
            f"{len(checked.bad)} of {listing.size} images in {listing.path} cannot be decoded (the log file names "
            "them); the next good one stands in for each."
        )


def steps_per_epoch(config, size):
    """Training steps in a pass over `size` images; the last partial batch is dropped."""
    if size < config.batch_size:
        raise ConfigError(
            f"an epoch needs at least one batch: {size} images are fewer than --batch_size={config.batch_size}"
        )
    return size // config.batch_size


def task(config):
    """The pretext task: (record, seed) -> (query view, key view)."""
    return augment.RECIPES[config.augment](config.image_size, crop_min=config.crop_min or None)


def model(config, steps_per_epoch, size=None):
    """The compiled model, its weights a function of `config.seed`; a memory bank holds a key of `size` images."""
    keras.utils.set_random_seed(config.seed)
    keras.config.set_dtype_policy(POLICIES[config.precision])
    settings = {
        "dim": config.dim,
        "temperature": config.temperature,
        "preprocessing": task(config).preprocessing,
    }
    follows = {  # the momentum encoder's
        "momentum": config.momentum,
        "momentum_rise_steps": config.epochs * steps_per_epoch if config.momentum_schedule == "cosine" else None,
    }
    if config.method == "moco_v3":
        head = "vit" if config.is_vit else "resnet"
        moco = MoCoV3(backbone(config), head=head, hidden_dim=config.hidden_dim or 4096, **settings, **follows)
    else:
        settings |= {
            "head": config.head,
            "hidden_dim": config.hidden_dim or None,
            "bn_groups": config.bn_groups,
            "seed": config.seed,
        }
        if config.method == "moco":
            settings |= follows | {"queue_size": config.queue_size, "shuffle_bn": config.shuffle_bn}
            moco = MoCo(backbone(config), **settings)
        elif config.method == "end_to_end":
            settings |= {"shared": config.shared, "loss": config.loss, "shuffle_bn": config.shuffle_bn}
            moco = EndToEnd(backbone(config), **settings)
        else:
            check_bank(config, size)
            settings |= {"queue_size": config.queue_size, "bank_momentum": config.bank_momentum, "loss": config.loss}
            moco = MemoryBank(backbone(config), size, **settings)
    # The model's own counter: an optimizer under loss scaling does not count the steps that it skips.
    rate = lambda: learning_rate(config, moco.step.value, steps_per_epoch)  # noqa: E731
    xla = {"on": True, "off": False}.get(config.xla, config.xla)
    moco.compile(OPTIMIZERS[config.optimizer](rate, weight_decay=config.weight_decay), jit_compile=xla)
    return moco


def check_bank(config, size):
    """Refuses a memory bank of `size` images that has too few others for a batch, or is larger than the machine."""
    if config.loss == "infonce" and config.queue_size > size - config.batch_size:
        raise ConfigError(
            f"--queue_size counts negatives from other images than the batch's, at most {size - config.batch_size} of "
            f"{size} with --batch_size={config.batch_size}; got {config.queue_size}"
        )
    needed = config.bank_bytes(size) * max(1, config.virtual_replicas)
    there = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if 3 * needed > there:  # a checkpoint's bank is read beside the one that is there, and the rest needs room, too
        raise ConfigError(
            f"the memory bank has --dim={config.dim} numbers for each of {size} images, "
            f"{needed / 1e9:.3g} GB, more than a third of this machine's {there / 1e9:.3g} GB (a checkpoint is read "
            "beside it): choose a smaller --dim, or --method=moco, whose queue does not grow with the data"
        )


def trained(run_dir):
    """The model of a run folder as its last checkpoint has it; the learning rate's schedule is not the run's."""
    config = run_folder.recorded(run_dir)
    if config is None:
        raise ConfigError(f"{run_dir} is no run folder: it has no config.flags")
    # The steps shape schedules only, which are no part of a checkpoint.
    moco = model(config, steps_per_epoch=1, size=run_folder.images(run_dir))
    checkpoints = Checkpoints(Path(run_dir) / "checkpoints", moco)
    step = checkpoints.restore_last()
    if step is None:
        raise ConfigError(f"{run_dir} is a run folder without a checkpoint: moco_tf.train writes one an epoch")
    # Features need not show it: oneDNN's ReLU turns NaN into 0.
    bad = [weight.path for weight in moco.query_encoder.weights if not np.isfinite(weight.numpy()).all()]
    if bad:
        raise ConfigError(
            f"{checkpoints.path(step)} has numbers that are not finite in {len(bad)} of the encoder's weights, first "
            f"in {bad[0]}: move it away, and the checkpoint before it is taken; or train at a lower --lr"
        )
    return moco


def backbone(config):
    """The encoder's trunk, a functional model with fresh weights."""
    if config.is_vit:
        return getattr(vit, config.arch)(
            image_size=config.image_size, patch_size=config.patch_size, freeze_patch=config.freeze_patch
        )
    return getattr(resnet, config.arch)(
        image_size=config.image_size,
        width=config.width,
        stem=config.stem,
        zero_init_residual=config.method == "moco_v3",
    )


def learning_rate(config, step, steps_per_epoch):
    """The rate of one training step (from 0), a float64 scalar."""
    epoch = tf.cast(step, tf.float64) / steps_per_epoch
    shaped = tf.floor(epoch) if config.lr_per == "epoch" else epoch
    if config.lr_schedule == "step":
        rate = schedules.steps(config.base_rate, shaped, config.lr_drops)
    else:
        decaying = tf.maximum(shaped - config.warmup_epochs, 0.0)
        rate = schedules.cosine(config.base_rate, decaying, config.epochs - config.warmup_epochs)
    return schedules.warm_up(rate, config.base_rate, epoch, config.warmup_epochs)
