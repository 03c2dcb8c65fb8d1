"""`python -m moco_tf.train --flagfile=configs/v1.flags`: pre-trains an encoder on images without labels.

Parses the flags, builds data and model, fits, saves. `--help` lists the flags.
"""

import contextlib
import logging
import shlex
import sys
import time
from pathlib import Path

from moco_tf import command, files
from moco_tf import config as config_lib
from moco_tf.command import ConfigError
from moco_tf.startup import computes_bfloat16, load_tensorflow

ENCODER = "encoder.keras"  # in a run folder
SHOWN = 5  # the most layers that a log line names
LOST = "another machine no longer answers: start all again, they go on from the last checkpoint"

log = logging.getLogger("moco_tf")


def main(arguments):
    """Runs the command; returns the process's exit status."""
    command.log_to_screen()
    return command.run("moco_tf.train", __doc__, lambda words: train(config_lib.parse(words)), arguments)


def train(config):
    """Trains or resumes in the config's run folder; returns the process's exit status.

    However training ends, the folder, its log and TensorBoard's file are free for the next call in the same process.
    """
    with contextlib.ExitStack() as open_until_the_end:
        try:
            return _train(config, open_until_the_end)
        except Exception as error:  # machines already exchange weights while they build the model
            if not _is_of_another_machine(error):
                raise
            from moco_tf.data.errors import reason

            log.debug("Where it stopped:", exc_info=True)
            log.error(f"Stopped before the first step: {reason(error)}; {LOST}.")
            return 1


def _train(config, open_until_the_end):
    started = time.perf_counter()
    load_tensorflow(config.virtual_replicas, training=True)  # takes seconds; wrong flags were refused before
    from moco_tf import build, callbacks, run_folder
    from moco_tf.checkpoint import Checkpoints
    from moco_tf.data import dataset
    from moco_tf.data.errors import ERRORS
    from moco_tf.evaluate import knn_monitor

    strategy = build.strategy(config)
    chief = build.is_chief(strategy)
    recorded = run_folder.recorded(config.run_dir)
    config = config.on_replicas(strategy.num_replicas_in_sync, recorded)
    begun = recorded is not None
    where = config.dataset, config.data_dir, config.train_split
    channels = build.inputs(config).channels_of_files
    split = dataset.find(*where, config.max_bad_fraction, begun, config.exif, channels)
    run = None
    if chief:
        run = open_until_the_end.enter_context(run_folder.RunFolder(config))
        open_until_the_end.enter_context(run.log())
    manifest = Path(config.run_dir) / "train_images.csv"
    source = build.read(config, split.open(manifest, begun, writes=chief))
    records = build.records(config, source)  # what the pretext task makes views of
    if chief:
        run.check_images(records.size)
    steps_per_epoch = build.steps_per_epoch(config, records.size)
    total = config.epochs * steps_per_epoch
    last = min(total, config.max_steps or total)
    given = _encoder_to_start_from(config)  # outside of the strategy: another run has BN groups for other replicas
    with strategy.scope():
        model = build.model(config, records)
        checkpoints = Checkpoints(Path(config.run_dir) / "checkpoints", model, writes=chief)
        restored = checkpoints.restore_last()
        step = restored or 0  # a converted checkpoint stands at step 0
        if restored is None and given:
            _start_from(config, given, model)
        given = None  # its memory is free again
        _check_that_all_begin_alike(strategy, step, records.size)
    if step >= last:
        checkpoints.tidy()
        log.info(f"{config.run_dir} is finished, at step {step} of {total}; a larger --epochs or --max_steps goes on.")
        if chief and not _encoder_is_kept(config, checkpoints.path(step)):
            _keep_encoder(config, model, records)
        return 0

    def batches_at(step):
        """Returns endless batches from a step on, with views of that step's size."""
        size = config.size_at(step // steps_per_epoch)
        if config.growing_sizes:
            model.views_become(build.on_device(config, size))
        return build.batches(config, strategy, records, build.task(config, size), step, model)

    own = _own_callbacks(config) if chief else []
    before_epoch = callbacks.BeforeEpoch(records, steps_per_epoch)
    batches = batches_at(step)  # refuses views that the model does not take
    saver = callbacks.Saver(checkpoints, config.checkpoint_every)
    progress = recorder = monitor = watch = wall_time = None
    try:
        if chief:
            run.begin(config, records.size, model.columns())
            _introduce(config, strategy, records, steps_per_epoch, model)
            progress = callbacks.Progress(config, last, steps_per_epoch)
            open_until_the_end.callback(progress.close)
            watch = callbacks.GradientWatch(config)
            recorder = callbacks.Recorder(run, config)
            open_until_the_end.callback(recorder.close)
            monitor = knn_monitor.of_run(config, source, run)
            wall_time = callbacks.WallTime(started, before_epoch, monitor, saver)
            run.rewind(step, steps_per_epoch)
        else:
            log.info("This machine trains along. The chief writes the run folder; the others wait while it evaluates.")
        if step:
            log.info(f"Going on from step {step} of {last}.")
            if step % steps_per_epoch:
                saver.keep_totals()
                if cost := records.cost_of_entering(step % steps_per_epoch * config.batch_size):
                    log.info(f"- {cost}")
        elif chief:
            start = "untrained" if restored is None else "as converted"
            _look_before_training(config, records, model, run, recorder, monitor, start)
        with command.signals_to(saver):
            for first, epochs, steps in calls_of_fit(config, step, last, steps_per_epoch):
                ends_an_epoch = (first + steps) % steps_per_epoch == 0
                seen = [before_epoch, wall_time, callbacks.StopOnNaN(), progress, watch]
                seen += [monitor if ends_an_epoch else None, recorder, *own, saver]
                model.fit(
                    batches if first == step else batches_at(first),
                    initial_epoch=first // steps_per_epoch,
                    epochs=first // steps_per_epoch + epochs,
                    steps_per_epoch=steps,
                    callbacks=[callback for callback in seen if callback is not None],
                    shuffle=False,
                    verbose=0,
                )
                if model.stop_training:  # a callback of the user's
                    break
        log.info(f"Done: step {model.steps_done} of {total}. {checkpoints.path(model.steps_done)}")
        if monitor:
            evaluated = [row for row in run.rows() if row["knn_top1"]]
            result = {f"epoch {row['epoch']}": float(row["knn_top1"]) for row in evaluated[-1:]}
            log.info("kNN top-1: " + _percents(run.baselines() | result))
        if wall_time:
            log.info(f"Wall time {wall_time}.")
        if chief:
            _keep_encoder(config, model, records)
    except callbacks.TrainingStopped as stop:
        return _report(stop, config, checkpoints, model.steps_done)
    except (OSError, *ERRORS) as error:  # a full disk, an image that changed meanwhile, another machine that is gone
        return _stopped(error, model)
    return 0


def calls_of_fit(config, step, last, steps_per_epoch):
    """Yields (first step, epochs, steps of each) of the calls of `fit` that lead from a step to the last one.

    One covers the rest of a started epoch, one all whole epochs of a size, with batches from one pipeline, and one a
    part of an epoch at the end.
    """
    while step < last:
        epoch, place = divmod(step, steps_per_epoch)
        steps = min(steps_per_epoch - place, last - step)
        epochs = (last - step) // steps if steps == steps_per_epoch else 1
        size = config.size_at(epoch)
        epochs = next((e for e in range(1, epochs) if config.size_at(epoch + e) != size), epochs)
        yield step, epochs, steps
        step += epochs * steps


def _own_callbacks(config):
    """Returns the Keras callbacks that --callbacks names, a list; refuses a function that returns anything else."""
    if not config.callbacks:
        return []
    import keras

    module, colon, name = config.callbacks.partition(":")
    try:
        made = getattr(config_lib.import_own("callbacks", module), name)(config) if module and colon and name else None
    except Exception as error:  # a user's own module may raise anything
        raise ConfigError(f"--callbacks={config.callbacks}: {type(error).__name__}: {error}") from error
    if not isinstance(made, list) or not all(isinstance(one, keras.callbacks.Callback) for one in made):
        raise ConfigError(
            "--callbacks=module:function names a function of a run's settings that returns a list of Keras callbacks; "
            f"{config.callbacks!r} gives {type(made).__name__}"
        )
    return made


def _encoder_to_start_from(config):
    """Returns the encoder that --start_from names; None without it, and for a run that has checkpoints."""
    from moco_tf.checkpoint import steps_in

    if not config.start_from or steps_in(Path(config.run_dir, "checkpoints")):
        return None
    from moco_tf import start_from

    return start_from.encoder(config.start_from, "--start_from")


def _start_from(config, given, model):
    """Gives the model the weights of the encoder `given`; logs how many layers took weights, and which did not."""
    from moco_tf import start_from
    from moco_tf.methods.ema import copy_weights

    taken = start_from.copy_by_name(given, model.backbone)
    if not taken.layers:
        raise ConfigError(
            f"--start_from={config.start_from} has layers of this run's encoder, by their names; {taken.left[0]}, nor "
            "does another fit: take an encoder of the same --arch"
        )
    if hasattr(model, "key_encoder"):
        copy_weights(model.query_encoder, model.key_encoder)
    log.info(f"Starts from {config.start_from}: {len(taken.layers)} layers of the encoder.")
    for sentence in taken.adapted:
        log.info(f"- {sentence}.")
    if taken.left:
        log.warning(f"- Not taken: {'; '.join(taken.left[:SHOWN])}{'; ...' if len(taken.left) > SHOWN else ''}")


def _encoder_is_kept(config, checkpoint):
    """Whether the Keras file is there, and not from an earlier end of the run, before `checkpoint`."""
    kept = Path(config.run_dir) / ENCODER
    return kept.exists() and kept.stat().st_mtime >= checkpoint.stat().st_mtime


def _keep_encoder(config, model, records):
    """Keeps the trained backbone as a Keras file, and logs the commands that come next."""
    kept = Path(config.run_dir) / ENCODER
    with files.aside(kept) as writing:
        model.backbone.save(files.for_tensorflow(writing))
    log.info(f"Encoder: {kept}, {records.unit} -> features, a Keras model. Next:")
    run = f"--encoder={config.run_dir}"
    commands = {
        "images": (["moco_tf.evaluate.look", run], ["moco_tf.search.build", run, "--images=DIR", "--output=INDEX"]),
        "sentences": (["moco_tf.evaluate.sts", run, "--pairs=FILE"],),
    }
    export = ["moco_tf.serving.export", f"--run_dir={config.run_dir}", "--output=models/encoder"]
    for words in (*commands.get(records.unit, commands["images"]), export):
        log.info(f"  python -m {shlex.join(words)}")


def _check_that_all_begin_alike(strategy, step, size):
    """Raises if workers disagree on the step or on the images; they would diverge silently."""
    import tensorflow as tf

    from moco_tf import replicas

    if not isinstance(strategy, tf.distribute.MultiWorkerMirroredStrategy):
        return
    here = tf.constant([[step, size]], tf.int64)
    everyone = strategy.run(tf.function(lambda: replicas.gather(here), autograph=False))
    everyone = strategy.experimental_local_results(everyone)[0].numpy().tolist()
    if any(other != everyone[0] for other in everyone):
        raise ConfigError(
            "all machines begin at one step with as many images; theirs, one by one, are "
            f"{', '.join(f'step {s} with {n}' for s, n in everyone)}: put --run_dir and --dataset on storage that "
            "they share"
        )


def _introduce(config, strategy, records, steps_per_epoch, model):
    replicas = strategy.num_replicas_in_sync
    on = f" on {replicas} replicas" if replicas > 1 else ""
    trained_on = f"{records.size} {records.unit} ({records.name})"
    what = model.backbone.name if records.unit == "sentences" else config.arch
    log.info(f"{config.run_dir}: {what}{on}, {trained_on}, {steps_per_epoch} steps an epoch.")
    if config.dataset == "embedded":
        log.info("- These are the embedded images, a part of CIFAR-10; --dataset=DIR takes a folder of your own.")
    if model.in_xla:
        log.info("- XLA compiles the training step first, which takes its time; --xla=off does without.")


def _look_before_training(config, records, model, run, recorder, monitor, start):
    """Logs advice, shows a picture of views, and measures the accuracies that are the baselines of training."""
    from moco_tf import advice, build
    from moco_tf.data.views import first

    for sentence in advice.before_training(config, records.size, computes_bfloat16()):
        log.info(f"- {sentence}")
    for callback in filter(None, (recorder, monitor)):
        callback.set_model(model)  # `fit` has not done so yet
    task = build.task(config, config.size_at(0))
    views = first(records, task, min(8, config.batch_size), config.seed, model.on_device)
    if records.unit == "sentences":
        texts = [record["text"].numpy() for _, record in records.shuffled(config.seed).take(len(views[0]))]
        recorder.lines("views", model.preprocessing.lines(texts, views))
    else:
        recorder.picture("views", build.picture(config, views))
    if monitor:
        run.keep_baselines({start: monitor.evaluate()} | monitor.evaluate_plain())
        log.info("kNN top-1 before training: " + _percents(run.baselines()))


def _report(stop, config, checkpoints, step):
    """Says why a run was stopped at a step and how to go on; returns the exit status."""
    if stop.signal:
        flags = shlex.join([f"--flagfile={config.run_dir}/config.flags", f"--run_dir={config.run_dir}"])
        saved = f"saved {checkpoints.path(step)}" if checkpoints.writes else "the chief saves"
        log.error(f"Stopped by {stop}; {saved}. Go on with: python -m moco_tf.train {flags}")
        return 128 + stop.signal
    # The weights of the previous step gave this loss; the weights of earlier steps gave finite losses.
    good = [checkpoints.path(s) for s in checkpoints.steps() if s < step - 1]
    last_good = f"the last good checkpoint is {good[-1]}" if good else "there is no good checkpoint"
    log.error(f"Stopped: {stop}; {last_good}. Try a lower --lr in another --run_dir.")
    return 1


def _is_of_another_machine(error):
    """Whether TensorFlow raised this error because a machine that trains along is gone."""
    import tensorflow as tf

    lost = tf.errors.UnavailableError, tf.errors.AbortedError, tf.errors.CancelledError
    return isinstance(error, lost) or (isinstance(error, tf.errors.OpError) and "ollective" in str(error))


def _stopped(error, model):
    """Says what in the machine, its storage or another machine ended a run, and the way out; returns the status."""
    import tensorflow as tf

    from moco_tf.data.errors import reason

    log.debug("Where it stopped:", exc_info=True)  # train.log has it
    goes_on = "the same command goes on from the last checkpoint"
    if isinstance(error, OSError):
        advised = goes_on
    elif _is_of_another_machine(error):
        advised = LOST
    elif isinstance(error, tf.errors.ResourceExhaustedError):
        advised = "memory or storage has run out: go on from the last checkpoint on a machine with more of it"
    elif model.in_xla:
        advised = f"{goes_on}; with --xla=off it does so without XLA"
    else:
        advised = f"{goes_on}; files that have changed are checked anew"
    cause = files.fault(error) if isinstance(error, OSError) else reason(error)
    log.error(f"Stopped at step {model.steps_done}: {cause}; {advised}.")
    return 1


def _percents(accuracies):
    return ", ".join(f"{name} {value:.1f} %" for name, value in accuracies.items())


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
