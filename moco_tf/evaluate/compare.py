"""`python -m moco_tf.evaluate.compare --encoder=RUN`: an encoder between its floor and its ceiling.

Judges three encoders of one architecture by kNN (k 200, t 0.1) and by a linear probe (--lr=auto): one with fresh
weights, the pre-trained one, and one trained with all labels from random weights. Prints one table and writes it
(metrics.csv, compare.png, summary.json). Each probe and the supervised training write their own results into folders
beside it.
"""

import dataclasses
import logging
import sys
from pathlib import Path

from moco_tf import command, files
from moco_tf.command import ConfigError
from moco_tf.evaluate import finetune, linear_probe
from moco_tf.evaluate import settings as common

log = logging.getLogger("moco_tf")


@dataclasses.dataclass(frozen=True)
class Settings(common.Encoding):
    supervised: str = command.flag(
        "",
        "A folder of `moco_tf.evaluate.finetune --init=random` to take as the ceiling; '': trains one, in the folder "
        "of the results.",
        path=True,
    )
    epochs: int = command.flag(30, "Passes over the training images of the supervised training.")

    NAME = "compare"
    RUNS_ONLY = True

    def __post_init__(self):
        super().__post_init__()
        command.require(self, self.epochs > 0, "epochs", "is more than 0")
        if self.supervised and not (Path(self.supervised) / "model.keras").exists():
            raise ConfigError(
                f"--supervised={self.supervised} has no model.keras, which moco_tf.evaluate.finetune writes"
            )


def main(arguments):
    """Runs the command; returns the process's exit status."""
    return common.run("moco_tf.evaluate.compare", __doc__, Settings, judge, arguments, training=True)


def judge(settings):
    """Judges the three encoders and writes the table; returns its rows, a list of dicts."""
    from moco_tf.evaluate import nearest_neighbors, plots, scores, subject

    output = Path(settings.output)
    encoder, _ = subject.encoder(settings)  # refuses a run that cannot be judged, before the work starts
    subject.check_images(encoder.preprocessing)
    train, test = subject.labelled(settings, encoder.preprocessing)
    shared = {field.name: getattr(settings, field.name) for field in dataclasses.fields(common.Settings)}
    supervised = Path(settings.supervised or output / "supervised")
    if not settings.supervised:
        own = shared | {"output": str(supervised), "init": "random", "epochs": settings.epochs}
        supervised.mkdir(exist_ok=True)
        finetune.train_and_judge(finetune.Settings(**own), train, test)
    own = command.read_json(supervised / "summary.json")
    _check_supervised(settings, supervised, own)
    rows = []
    for name, encoder in _encoders(settings, supervised):
        encoder = subject.by_engine(settings, encoder, train, test)
        bank, queries = (subject.features(settings, encoder, images) for images in (train, test))
        knn = nearest_neighbors.accuracy(*bank, *queries, len(train.class_names))
        folder = output / f"probe-{name}"
        folder.mkdir(exist_ok=True)
        of_probe = linear_probe.Settings(**shared | {"output": str(folder)})
        probe = linear_probe.probe(of_probe, encoder, train, test, learning=bank, evaluation=queries)
        rows.append({"encoder": name, "knn_top1": round(knn, 4), "probe_top1": round(probe.top1, 4)})
    rows.append({"encoder": "supervised, its own classifier", "knn_top1": "", "probe_top1": own["top1"]})
    scores.write_rows(output / "metrics.csv", rows)
    series = {word: [row[f"{word.lower()}_top1"] for row in rows[:3]] for word in ("kNN", "probe")}
    plots.bars(output / "compare.png", [row["encoder"] for row in rows[:3]], series)
    summary = {"command": settings.NAME, "images_of": settings.images, "rows": rows}
    summary["settings"] = dataclasses.asdict(settings)
    files.write_json(output / "summary.json", summary)
    log.info(f"{'encoder':32} kNN top-1, %  linear probe top-1, %")
    for row in rows:
        knn = f"{row['knn_top1']:.1f}" if row["knn_top1"] != "" else ""
        log.info(f"{row['encoder']:32} {knn:>12} {row['probe_top1']:>22.1f}")
    return rows


def _check_supervised(settings, folder, summary):
    """Refuses a fine-tuning that is not of random weights, with all labels of the images that are judged here."""
    wanted = {"images_of": settings.images, "init": "random", "labels": 100.0}
    wanted |= {name: getattr(settings, name) for name in ("train_split", "eval_split", "exif", "limit")}
    trained = {"images_of": summary.get("images_of")} | summary.get("settings", {})
    for name, value in files.as_text(wanted).items():
        if trained.get(name) != value:
            what = "on" if name == "images_of" else f"with --{name} ="
            raise ConfigError(
                f"--supervised={folder} was trained {what} {trained.get(name)}, and this comparison wants {value}: "
                "leave the flag out, and one is trained"
            )


def _encoders(settings, supervised):
    """Yields the (name, `Encoder`) of the three encoders, one after the other."""
    import keras

    from moco_tf import build, frozen, run_folder

    config = run_folder.recorded(settings.encoder)
    data = run_folder.data(settings.encoder)
    yield "untrained", frozen.of_model(build.model(config, data or run_folder.Data(config.batch_size)))
    model = build.trained(settings.encoder)
    yield "pre-trained", frozen.of_model(model)
    file = files.for_tensorflow(supervised / "model.keras")
    classifier = keras.models.load_model(file, compile=False, safe_mode=True)
    if classifier.input_shape[1:] != model.backbone.input_shape[1:]:
        raise ConfigError(
            f"--supervised={supervised} takes images of {classifier.input_shape[1:]}, and the run's encoder takes "
            f"{model.backbone.input_shape[1:]}: leave the flag out, and one is trained"
        )
    backbone = keras.Model(classifier.input, classifier.layers[-2].input)  # ends before the classifier's normalisation
    yield "supervised", frozen.of_model(backbone, model.preprocessing)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
