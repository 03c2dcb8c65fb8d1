"""Trains a head and its encoder: the step, the contents of a checkpoint, rows of metrics.csv, an exact resume."""

import logging
import math
import time

import keras
import numpy as np
import tensorflow as tf

from moco_tf import command, progress, schedules
from moco_tf.checkpoint import Checkpoints
from moco_tf.optimizers import SGD

BEFORE = ("step", "loss", "learning_rate", "images_per_second")  # columns of metrics.csv, before the judge's

log = logging.getLogger("moco_tf")


class Learner(keras.Model):
    """A network, its optimizer and its progress: all that a checkpoint holds.

    Args:
      network: a Keras model.
      loss: (network, batch) -> a scalar.
      settings: `settings.Settings`.
    """

    def __init__(self, network, loss, settings):
        super().__init__()
        self.network = network
        self.objective = loss  # so that checkpoints save its state, if it has one
        # The sum of the losses and their number since the last row of metrics.csv.
        self.totals = self.add_weight(name="totals", shape=(2,), initializer="zeros", trainable=False, autocast=False)
        rate = lambda: learning_rate(settings, optimizer.iterations)  # noqa: E731
        optimizer = SGD(rate, weight_decay=settings.weight_decay)
        self.compile(optimizer)
        optimizer.build(network.trainable_variables)

        @tf.function(reduce_retracing=True)
        def learn(batch):
            with tf.GradientTape() as tape:
                value = loss(network, batch)
            optimizer.apply(tape.gradient(value, network.trainable_variables), network.trainable_variables)
            self.totals.assign_add(tf.stack([value, 1.0]))
            return value

        self.learn = learn

    @property
    def steps_done(self):
        return int(self.optimizer.iterations)


def learning_rate(settings, step):
    """Returns the learning rate of one training step (from 0), a float64 scalar."""
    step = tf.cast(step, tf.float64)
    if settings.lr_schedule == "step":
        rate = schedules.steps(settings.lr, step, settings.lr_drops)
    else:
        rate = schedules.cosine(settings.lr, step, settings.steps)
    return schedules.warm_up(rate, settings.lr, step, settings.warmup_steps)


class Interrupt:
    """Holds the signal that the training loop has received."""

    signal = None


def learn(settings, run, learner, batches_at, judge):
    """Trains until --steps or --max_steps, from the last checkpoint if any; returns the process's exit status.

    Args:
      run: the open `RunFolder`, begun with the columns `BEFORE` and the columns of `judge`.
      batches_at: step -> endless batches from that step on.
      judge: () -> {column: number}, of the current network.
    """
    checkpoints = Checkpoints(run.checkpoints, learner)
    step = checkpoints.restore_last() or 0
    last = min(settings.steps, settings.max_steps or settings.steps)
    if step >= last:
        more = "; a larger --max_steps goes on" if step < settings.steps else ""
        log.info(f"{settings.output} is finished, at step {step} of {settings.steps}{more}.")
        return 0
    run.rewind(step, settings.record_every)
    if step:
        log.info(f"Going on from step {step} of {settings.steps}.")
    interrupt = Interrupt()
    begun, minutes = time.monotonic(), progress.Minutes()
    counted = first = None  # start time and step of the throughput; the first step is left out, as it traces
    with command.signals_to(interrupt), progress.bar(last, "steps", done=step) as bar:
        for batch in batches_at(step):
            loss = float(learner.learn(batch))
            step += 1
            bar.update()
            if first is None:
                counted, first = time.monotonic(), step
            if not math.isfinite(loss):
                log.error(f"Stopped: the loss is {loss} at step {step}. Try a lower --lr in another --output.")
                return 1
            if step % settings.record_every == 0 or step == settings.steps:
                speed = (step - first) * settings.batch_size / (time.monotonic() - counted)
                row = _row(settings, learner, step, round(speed, 2) if step > first else None)
                if (settings.eval_every and step % settings.eval_every == 0) or step == settings.steps:
                    row |= judge()
                run.add_row(row)
                log.info(f"Step {step}/{settings.steps}: " + _shown(row))
                learner.totals.assign(tf.zeros(2))
                counted, first = time.monotonic(), step
            elif bar.disable and minutes.passed():
                log.info(f"  step {step}: loss {loss:.3f}")
            stops = interrupt.signal or step >= last
            if stops or step % settings.checkpoint_every == 0:
                checkpoints.save()
            if stops:
                break
    if interrupt.signal:
        log.error(f"Stopped by {interrupt.signal.name}; saved {checkpoints.path(step)}. The same command goes on.")
        return 128 + interrupt.signal
    log.info(f"Done: step {step} of {settings.steps}, {time.monotonic() - begun:.0f} s. {checkpoints.path(step)}")
    return 0


def restore(run_path, learner):
    """Restores a learner from the last checkpoint of an output folder; returns its step, None without a checkpoint."""
    return Checkpoints(run_path / "checkpoints", learner).restore_last()


def _row(settings, learner, step, images_per_second):
    total, count = learner.totals.numpy()
    rate = float(learning_rate(settings, step - 1))
    return {"step": step, "loss": float(total / count), "learning_rate": rate, "images_per_second": images_per_second}


def _shown(row):
    """Returns a row of metrics.csv in words."""
    judged = [f"{name} {value:.1f}" for name, value in row.items() if name not in BEFORE]
    speed = [f"{row['images_per_second']:.0f} images/s"] if row["images_per_second"] else []
    return ", ".join([f"loss {row['loss']:.3f}", *speed, *judged])


def subset(count, percent, seed):
    """Draws `percent` of `count` images: ascending numbers, int64; a smaller percentage draws a part of them."""
    order = np.random.default_rng(seed).permutation(count)
    return np.sort(order[: max(1, round(percent / 100 * count))])
