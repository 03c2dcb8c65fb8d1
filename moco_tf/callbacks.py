"""Keras callbacks: what `moco_tf.train` shows and records of a run, and what stops one."""

import collections
import contextlib
import logging
import math
import statistics
import time

import keras
import tensorflow as tf
from tensorboard.plugins.image.metadata import create_summary_metadata

from moco_tf import advice, files, progress

log = logging.getLogger("moco_tf")


class TrainingStopped(Exception):
    """Ends a run early: on a signal, after its state is saved, or on a NaN or infinite loss (`signal` is None)."""

    def __init__(self, reason, signal=None):
        super().__init__(reason)
        self.signal = signal


class BeforeEpoch(keras.callbacks.Callback):
    """Calls the model's `before_epoch` at the start of each epoch, but not when a run resumes inside an epoch.

    Args:
      source: the source of the training records.
      steps_per_epoch: training steps in an epoch.
    """

    def __init__(self, source, steps_per_epoch):
        super().__init__()
        self.source = source
        self.steps_per_epoch = steps_per_epoch
        self.seconds = 0.0  # spent in `before_epoch`

    def on_epoch_begin(self, epoch, logs=None):
        if self.model.steps_done % self.steps_per_epoch == 0:
            begun = time.perf_counter()
            self.model.before_epoch(epoch, self.source)
            self.seconds += time.perf_counter() - begun


class StopOnNaN(keras.callbacks.Callback):
    """Stops the run after the step whose loss is NaN or infinite."""

    def on_train_batch_end(self, batch, logs=None):
        if not math.isfinite(logs["loss"]):
            rate = logs["learning_rate"]
            raise TrainingStopped(
                f"the loss is {logs['loss']} at step {self.model.steps_done}, learning rate {rate:g}"
            )


class GradientWatch(keras.callbacks.Callback):
    """Warns, once an epoch, of a spike of the gradient in the first block (MoCo v3, section 4.2)."""

    WINDOW, ENOUGH = 200, 20  # steps: the usual norm is the median of `WINDOW`; fewer than `ENOUGH` do not suffice

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.norms = collections.deque(maxlen=self.WINDOW)

    def on_epoch_begin(self, epoch, logs=None):
        self.warned = False

    def on_train_batch_end(self, batch, logs=None):
        first = logs.get("gradient_norm_first")
        if first is None or not math.isfinite(first):  # float16 skips steps whose gradient overflows
            return
        if len(self.norms) >= self.ENOUGH and not self.warned:
            usual = statistics.median(self.norms)
            for sentence in advice.after_step(
                self.config, self.model.steps_done, first, logs["gradient_norm_last"], usual
            ):
                log.warning("  %s", sentence)
                self.warned = True
        self.norms.append(first)


def _watched(model):
    """Returns a list of the model's first metric, to watch beside the loss; empty if the model has no metrics."""
    return list(model.METRICS)[:1]


class Progress(keras.callbacks.Callback):
    """Shows a bar with ETA on a terminal or in a notebook; elsewhere logs a line a minute.

    After the first steps of a process, it says how long an epoch and the rest of the run will take. It adds
    `images_per_second` to the epoch's logs.

    Args:
      total: steps of the whole run.
      steps_per_epoch: training steps in an epoch.
    """

    ENOUGH = 20, 5.0  # steps and seconds after which a step's time is known

    def __init__(self, config, total, steps_per_epoch):
        super().__init__()
        self.config = config
        self.total = total
        self.steps_per_epoch = steps_per_epoch
        self.estimated = False
        self.bar = None

    def on_epoch_begin(self, epoch, logs=None):
        self.started = self.rate = None
        self.bar = progress.bar(self.params["steps"], "steps", f"Epoch {epoch + 1}/{self.config.epochs}")

    def on_train_batch_end(self, batch, logs=None):
        now = time.perf_counter()
        if self.started is None:  # the first step also fills the pipeline and traces: it does not count
            self.started, self.minutes = now, progress.Minutes()
        self.rate = batch * self.config.batch_size / (now - self.started) if batch else None
        shown = {name: logs[name] for name in ("loss", *_watched(self.model))}
        if not self.bar.disable:
            speed = {"images/s": f"{self.rate:.0f}"} if self.rate else {}
            self.bar.set_postfix({name: f"{value:.3f}" for name, value in shown.items()} | speed, refresh=False)
            self.bar.update()
        elif self.minutes.passed():
            figures = ", ".join(f"{name} {value:.3f}" for name, value in shown.items())
            log.info(f"  step {self.model.steps_done}: {figures}, {self.rate:.0f} images/s")
        steps, seconds = self.ENOUGH
        if not self.estimated and batch >= steps and now - self.started >= seconds:
            self._estimate((now - self.started) / batch)

    def on_epoch_end(self, epoch, logs=None):
        self.bar.close()
        if self.rate is not None:
            logs["images_per_second"] = round(self.rate, 2)

    def close(self):
        """Removes the bar, wherever training ended."""
        if self.bar is not None:
            self.bar.close()

    def _estimate(self, step):
        """Logs how long an epoch and the rest of the run take, if a step takes `step` seconds."""
        self.estimated = True
        epoch, rest = step * self.steps_per_epoch, step * (self.total - self.model.steps_done)
        log.info(
            f"- A step takes {step:.2g} s: an epoch about {progress.duration(epoch)}, what is left of the run about "
            f"{progress.duration(rest)}, evaluation apart."
        )


class WallTime(keras.callbacks.Callback):
    """Tracks where a run's wall time goes, and adds `step_share` and `data_wait` to an epoch's logs.

    Both are shares of the wall time since the previous epoch was recorded, without evaluation. `step_share` is the
    share of the training steps, including their wait for images. `data_wait` is the share of that wait, which the
    model measures. The first step of a process counts as part of its start, because it traces.

    Args:
      started: when the run began, by `time.perf_counter`.
      before_epoch, monitor, saver: the callbacks that prepare epochs, evaluate (None: no evaluation) and save; each
        counts its own `seconds`.
    """

    def __init__(self, started, before_epoch, monitor, saver):
        super().__init__()
        self.started = started
        self.before_epoch = before_epoch
        self.monitor = monitor
        self.saver = saver
        self.start = None  # seconds until the first step was done, without evaluation
        self.steps = 0.0
        self.recorded = None  # (time, seconds of steps, of waiting, of evaluation) when the last epoch was recorded

    def on_train_batch_begin(self, batch, logs=None):
        self.begun = time.perf_counter()

    def on_train_batch_end(self, batch, logs=None):
        now = time.perf_counter()
        if self.start is None:
            self.start = now - self.started - self.evaluation - self.before_epoch.seconds
            self.waited_at_start = self.model.seconds_waited
            self.recorded = now, 0.0, self.waited_at_start, self.evaluation
            return
        self.steps += now - self.begun

    def on_epoch_end(self, epoch, logs=None):
        now = time.perf_counter(), self.steps, self.model.seconds_waited, self.evaluation
        before, self.recorded = self.recorded, now
        seconds, steps, waited, evaluation = (new - old for new, old in zip(now, before, strict=True))
        if steps:
            logs["step_share"] = round(steps / (seconds - evaluation), 4)
            logs["data_wait"] = round(waited / (seconds - evaluation), 4)

    @property
    def evaluation(self):
        return self.monitor.seconds if self.monitor else 0.0

    def __str__(self):
        """Returns a sentence with the seconds spent on each part of the run."""
        whole = time.perf_counter() - self.started
        waited = self.model.seconds_waited - self.waited_at_start
        parts = {
            "start": self.start or 0.0,
            **({"preparing epochs": self.before_epoch.seconds} if self.before_epoch.seconds >= 0.05 else {}),
            "steps": self.steps - waited,
            "waiting for images": waited,
            "evaluation": self.evaluation,
            "saving": self.saver.seconds,
        }
        parts["other"] = whole - sum(parts.values())
        return f"{whole:.0f} s: " + ", ".join(f"{name} {seconds:.1f}" for name, seconds in parts.items())


class Recorder(keras.callbacks.Callback):
    """Writes figures to metrics.csv, TensorBoard, the log and the screen, with advice if it applies."""

    TENSORBOARD_EVERY = 100  # steps; the values are means since the epoch began

    def __init__(self, run, config):
        super().__init__()
        self.run = run
        self.config = config
        self.told_of_waiting = False  # once is enough
        files.make_folder(run.tensorboard)
        self.writer = tf.summary.create_file_writer(files.for_tensorflow(run.tensorboard))

    def close(self):
        """Closes TensorBoard's file. Each epoch flushed its figures; if that failed, the run has reported it."""
        with contextlib.suppress(tf.errors.OpError):
            self.writer.close()

    def on_train_batch_end(self, batch, logs=None):
        if self.model.steps_done % self.TENSORBOARD_EVERY == 0:
            self._write_scalars(logs)

    def on_epoch_end(self, epoch, logs=None):
        best = max((float(r["knn_top1"]) for r in self.run.rows() if r["knn_top1"]), default=None)
        step = self.model.steps_done
        self.run.add_row({"epoch": epoch + 1, "step": step} | logs)
        self._write_scalars(logs)
        figures = ", ".join(f"{name} {logs[name]:.3f}" for name in ("loss", *_watched(self.model)))
        text = f"Epoch {epoch + 1}/{self.config.epochs}, step {step}: {figures}"
        if "knn_top1" in logs:
            text += f", kNN top-1 {logs['knn_top1']:.1f} %"
        if "images_per_second" in logs:
            text += f", {logs['images_per_second']:.0f} images/s"
        log.info(text)
        features = self.model.query_encoder.output["features"].shape[-1]
        on_waiting = [] if self.told_of_waiting else list(advice.on_waiting(self.config, logs.get("data_wait", 0)))
        self.told_of_waiting = self.told_of_waiting or bool(on_waiting)
        for sentence in (*advice.after_epoch(self.config, logs, best, features), *on_waiting):
            log.warning("  %s", sentence)

    def picture(self, name, image):
        """Shows a uint8 image (H, W, 3) in TensorBoard, and as a PNG in the run folder."""
        height, width, _ = image.shape
        png = tf.io.encode_png(image, compression=1)  # TensorFlow's default takes six times as long
        files.write_bytes(self.run.path / f"{name}.png", png.numpy())
        with self.writer.as_default(step=self.model.steps_done):  # `tf.summary.image` would encode it again
            tf.summary.write(name, [str(width), str(height), png], metadata=create_summary_metadata(name, ""))

    def lines(self, name, lines):
        """Shows lines of text in TensorBoard, and in a file of the run folder."""
        files.write_text(self.run.path / f"{name}.txt", "\n".join(lines) + "\n")
        with self.writer.as_default(step=self.model.steps_done):
            tf.summary.text(name, lines)

    def _write_scalars(self, logs):
        with self.writer.as_default(step=self.model.steps_done):
            for name, value in logs.items():
                tf.summary.scalar(name, value)
        self.writer.flush()


class Saver(keras.callbacks.Callback):
    """Saves every `every` steps, at the end of each epoch, and before it stops the run on a signal.

    Put it last, so that it saves an epoch's end only after everything about the epoch is recorded.
    """

    def __init__(self, checkpoints, every):
        super().__init__()
        self.checkpoints = checkpoints
        self.every = every
        self.seconds = 0.0  # spent in saving
        self.kept = None
        self.signal = None  # set by a signal handler

    def keep_totals(self):
        """Keeps the running diagnostics for the next `fit`, which resets them at the start of its epoch."""
        self.kept = self.checkpoints.model.totals.numpy()

    def on_epoch_begin(self, epoch, logs=None):
        if self.kept is not None:
            self.model.totals.assign(self.kept)
            self.kept = None

    def on_train_batch_end(self, batch, logs=None):
        if batch + 1 < self.params["steps"] and (self.signal or self.model.steps_done % self.every == 0):
            self._save()

    def on_epoch_end(self, epoch, logs=None):
        self._save()

    def _save(self):
        begun = time.perf_counter()
        self.checkpoints.save()
        self.seconds += time.perf_counter() - begun
        if self.signal:
            raise TrainingStopped(self.signal.name, self.signal)
