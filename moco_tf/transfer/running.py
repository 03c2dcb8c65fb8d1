"""Runs the commands of transfer: from settings to a trained network and a folder of results."""

import dataclasses
import functools
import hashlib
import logging
import os
import shlex
import time
from pathlib import Path

from moco_tf import command, files
from moco_tf.command import ConfigError
from moco_tf.run_folder import RunFolder
from moco_tf.startup import load_tensorflow
from moco_tf.transfer.settings import ENCODER_FLAGS

CLASSES = "classes.json"  # in the output: the class names, in order
SUMMARY = "summary.json"

log = logging.getLogger("moco_tf")


def run(program, doc, kind, work, arguments):
    """Calls `work(settings)` with resolved settings of the dataclass `kind`; returns the process's exit status."""
    command.log_to_screen()

    def call(words):
        settings = command.parse(kind, program, words).resolved()
        load_tensorflow(training=True)  # takes seconds; the flags are already checked
        from moco_tf.data import errors

        with errors.in_a_line(" The same command goes on from the last checkpoint."):
            return work(settings)

    return command.run(program, doc, call, arguments)


def train(settings, find, network, loss, view, judge):
    """Trains a head and its encoder as the settings say, judges, writes the results; returns the exit status.

    Args:
      find: (dataset, data_dir, split, max_bad_fraction, manifest) -> a source, such as `boxes.find` or `masks.find`.
      network: (settings, classes, start) -> (a model, its input format); start: as `trunk.of_run` takes it.
      loss: (model, batch) -> a scalar.
      view: (canvas, record, seed or None) -> a dict, such as `annotated_views.boxed` or `masked`.
      judge: a `judges.Judge`.
    """
    from moco_tf.checkpoint import steps_in
    from moco_tf.transfer import annotated_views, learning

    begun_at = time.monotonic()
    with RunFolder(settings, settings.read) as run, run.log():
        place = settings.dataset, settings.data_dir
        train, test = (
            find(*place, split, settings.max_bad_fraction, run.path / f"{name}_images.csv")
            for split, name in ((settings.train_split, "train"), (settings.eval_split, "eval"))
        )
        train, test = _as_used(settings, train, test)
        order = _order(train)
        run.check_images(train.size, order)
        _check_classes(run, train.class_names)
        model, inputs = network(settings, len(train.class_names), start=not steps_in(run.checkpoints))
        learner = learning.Learner(model, loss, settings)
        canvas = annotated_views.Canvas(inputs, settings.image_size, settings.ENLARGE)
        judging = judge(settings, model, test, canvas)
        _record(settings, run, train, order, judging.columns)
        varied = dataclasses.replace(canvas, scales=(settings.scale_min, settings.scale_max))
        batches_at = functools.partial(
            annotated_views.batches, train, functools.partial(view, varied), settings.batch_size, settings.seed
        )
        if not run.begun:
            (first,) = batches_at(0).take(1).as_numpy_iterator()
            judging.draw_training(run.path / "training.png", first)
        facts = {}

        def evaluate():
            row, found = judging.judge(run.path / "predictions.png")
            facts.update(row | found)
            return row

        status = learning.learn(settings, run, learner, batches_at, evaluate)
        if status == 0 and learner.steps_done == settings.steps and not (run.path / SUMMARY).exists():
            if not facts:  # the run was killed after its last checkpoint
                evaluate()
            of_run = {"init": settings.init, "labels": settings.labels, "seed": settings.seed}
            of_run |= {"train_images": train.size, "steps": learner.steps_done} | facts
            of_run["seconds"] = round(time.monotonic() - begun_at, 1)
            files.write_json(run.path / SUMMARY, of_run)
            shown = ", ".join(f"{name} {facts[name]:.1f}" for name in judging.columns)
            log.info(
                f"From {settings.init} weights on {train.size} images of {train.name}, judged on {test.name}: {shown}."
            )
            export = shlex.join([f"--run_dir={settings.output}", "--output=models/NAME"])
            log.info(f"{settings.output}; export it with: python -m moco_tf.transfer.export {export}")
    return status


def classes(output):
    """Returns the names of the classes of the run in this folder, a list."""
    return command.read_json(Path(output, CLASSES), list)


def _as_used(settings, train, test):
    """Returns the sources with the images that --labels chooses, and with the same classes in both sources.

    Raises:
      ConfigError: the classes differ, there are fewer images than a batch, or --labels cannot choose from a stream.
    """
    from moco_tf.data.annotated import with_more_classes
    from moco_tf.transfer.learning import subset

    if unknown := [name for name in test.class_names if name not in train.class_names]:
        raise ConfigError(
            f"--train_split must have all classes of --eval_split; {train.name} lacks {', '.join(unknown[:10])}, "
            f"which {test.name} has"
        )
    if test.class_names != train.class_names:
        renumbered = hasattr(test, "boxes")  # boxes name their classes, masks number them
        test = test.with_classes(train.class_names) if renumbered else with_more_classes(test, train.class_names)
    if settings.labels < 100:
        if not hasattr(train, "stand_ins"):  # a stream
            raise ConfigError(
                f"--labels={settings.labels:g} chooses among files; of a TFDS set name a part of the split in TFDS' "
                "language, such as --train_split=train[:10%]"
            )
        train = train.only(subset(train.size, settings.labels, settings.seed))
    if train.size < settings.batch_size:
        raise ConfigError(
            f"--batch_size={settings.batch_size} needs as many images, but {train.size} are used of {train.name}: "
            "take a smaller one, or a larger --labels"
        )
    return train, test


def _check_classes(run, names):
    """Refuses classes, or an order of classes, other than at the start of the run."""
    if run.begun and (run.path / CLASSES).exists() and classes(run.path) != list(names):
        raise ConfigError(
            f"a run goes on with the classes that it began with; {run.path} has {', '.join(classes(run.path)[:10])}, "
            f"--dataset has {', '.join(names[:10])}: bring them back, or choose another --output"
        )


def _record(settings, run, source, order, columns):
    """Records flags, the encoder's flags and the classes."""
    from moco_tf.transfer import learning

    config = settings.encoder_config()
    run.begin(settings, source.size, columns, learning.BEFORE, after=(), order=order)
    files.write_text(run.path / ENCODER_FLAGS, config.flag_lines(), errors="surrogateescape")
    files.write_json(run.path / CLASSES, list(source.class_names))


def _order(source):
    """Returns a hash of which image has which number, wherever their folder lies; "" for a stream, which is fixed."""
    if source.paths is None:
        return ""
    paths = source.paths.numpy().tolist()
    above = len(os.path.commonpath(paths))
    return hashlib.sha256(b"\0".join(path[above:] for path in paths)).hexdigest()
