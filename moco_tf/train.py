"""`python -m moco_tf.train --flagfile=configs/v1.flags`: pre-trains an encoder on images without labels.

Parses the flags, builds data and model, fits, saves. `--help` lists the flags.
"""

import contextlib
import logging
import shlex
import signal
import sys
import time

from moco_tf import config as config_lib
from moco_tf.config import ConfigError
from moco_tf.startup import load_tensorflow

log = logging.getLogger("moco_tf")


def main(arguments):
    """Runs the command; returns the process's exit status."""
    screen = logging.StreamHandler(sys.stdout)
    screen.setFormatter(logging.Formatter("%(message)s"))
    screen.setLevel(logging.INFO)
    log.handlers[:] = [screen]
    log.setLevel(logging.DEBUG)  # train.log has it all
    log.propagate = False
    try:
        return train(config_lib.parse(arguments))
    except config_lib.HelpAsked as help:
        print(f"{__doc__}\n{help}")
        return 0
    except ConfigError as error:
        print(f"moco_tf.train: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:  # outside training: nothing to save
        print("moco_tf.train: interrupted", file=sys.stderr)
        return 130


def train(config):
    """Trains, or goes on, in the config's run folder; returns the process's exit status."""
    load_tensorflow()  # takes seconds: wrong flags have been answered by now
    import tensorflow as tf

    from moco_tf import advice, build, callbacks
    from moco_tf.checkpoint import Checkpoints
    from moco_tf.data.check import reason
    from moco_tf.data.views import pairs
    from moco_tf.run_folder import RunFolder

    started = time.monotonic()
    found = build.find(config, config.train_split)
    run = RunFolder(config)
    run.open_log()
    source = build.check(config, found, run.path / "train_images.csv", run.begun)
    steps_per_epoch = build.steps_per_epoch(config, source.size)
    total = config.epochs * steps_per_epoch
    last = min(total, config.max_steps or total)
    task = build.task(config)
    model = build.model(config, steps_per_epoch)
    checkpoints = Checkpoints(run.checkpoints, model)
    step = checkpoints.restore_last() or 0
    if step >= last:
        log.info(f"{run.path} is finished, at step {step} of {total}; a larger --epochs or --max_steps goes on.")
        return 0

    run.begin(config, source.size)
    log.info(f"{run.path}: {config.arch} on {source.size} images ({source.name}), {steps_per_epoch} steps an epoch.")
    if config.dataset == "embedded":
        log.info("- These are the embedded images, a part of CIFAR-10; --dataset=DIR takes a folder of your own.")
    progress = callbacks.Progress(config)
    recorder = callbacks.Recorder(run, config)
    saver = callbacks.Saver(checkpoints, config.checkpoint_every)
    monitor = build.knn_monitor(config, source, run)
    for callback in filter(None, (recorder, monitor)):
        callback.set_model(model)  # they also serve before and after `fit`
    run.rewind(step, steps_per_epoch)
    try:
        if step:
            log.info(f"Going on from step {step} of {last}.")
            if step % steps_per_epoch:
                saver.keep_metrics()
                if cost := source.cost_of_entering(step % steps_per_epoch * config.batch_size):
                    log.info(f"- {cost}")
        else:
            for sentence in advice.before_training(config, source.size):
                log.info(f"- {sentence}")
            query, key = next(iter(pairs(source, task, min(8, config.batch_size), config.seed)))
            recorder.picture("views", callbacks.picture_of_pairs(query, key, task.preprocessing))
            if monitor:
                run.keep_baselines({"untrained": monitor.evaluate(), "raw pixels": monitor.evaluate_pixels()})
                log.info("kNN top-1 before training: " + _percents(run.baselines()))
        with _signals_to(saver):
            while step < last:
                # One `fit` an epoch, or for what is left of it: each begins exactly where the step counter stands.
                epoch, place = divmod(step, steps_per_epoch)
                steps = min(steps_per_epoch - place, last - step)
                evaluates = monitor and place + steps == steps_per_epoch
                model.fit(
                    pairs(source, task, config.batch_size, config.seed, step),
                    initial_epoch=epoch,
                    epochs=epoch + 1,
                    steps_per_epoch=steps,
                    callbacks=[callbacks.StopOnNaN(), progress, *([monitor] if evaluates else []), recorder, saver],
                    shuffle=False,
                    verbose=0,
                )
                step += steps
    except callbacks.TrainingStopped as stop:
        if stop.signal:
            flags = shlex.join([f"--flagfile={run.path}/config.flags", f"--run_dir={run.path}"])
            saved = checkpoints.path(int(model.step))
            log.error(f"Stopped by {stop}; saved {saved}. Go on with: python -m moco_tf.train {flags}")
            return 128 + stop.signal
        # The weights of the step before gave this loss; those of earlier steps gave finite ones.
        good = [checkpoints.path(s) for s in checkpoints.steps() if s < int(model.step) - 1]
        last_good = f"the last good checkpoint is {good[-1]}" if good else "there is no good checkpoint"
        log.error(f"Stopped: {stop}; {last_good}. Try a lower --lr in another --run_dir.")
        return 1
    except tf.errors.OpError as error:  # an image that changed after it was checked, say
        log.error(
            f"Stopped at step {int(model.step)}: {reason(error)}. The same command goes on from the last checkpoint; "
            "files that have changed are checked anew."
        )
        return 1

    log.info(f"Done: step {step} of {total}, {time.monotonic() - started:.0f} s. {checkpoints.path(step)}")
    if monitor:
        evaluated = [row for row in run.rows() if row["knn_top1"]]
        result = {f"epoch {row['epoch']}": float(row["knn_top1"]) for row in evaluated[-1:]}
        log.info("kNN top-1: " + _percents(run.baselines() | result))
    return 0


def _percents(accuracies):
    return ", ".join(f"{name} {value:.1f} %" for name, value in accuracies.items())


@contextlib.contextmanager
def _signals_to(saver):
    """The first Ctrl-C or SIGTERM ends the run after the step at hand; a second one ends it at once."""

    def note(number, frame):
        saver.signal = signal.Signals(number)
        signal.signal(number, signal.SIG_DFL)

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
