"""`python -m moco_tf.evaluate.look --encoder=RUN`: shows what an encoder has learnt.

Writes report.html, one file that opens from disk. It shows training curves, the accuracies of the evaluations in the
run's folder, a map of --eval_split (t-SNE of the features), and the nearest neighbours of some images. Labels serve
for colours and captions only. The command also writes TensorBoard's projector files beside the report:
`tensorboard --logdir=OUTPUT`.
"""

import dataclasses
import logging
import sys
from pathlib import Path

from moco_tf import command, files
from moco_tf.command import ConfigError
from moco_tf.evaluate import settings as common

SPRITE_SIDE = 8192  # pixels: TensorBoard takes no sprite with a longer side

log = logging.getLogger("moco_tf")


@dataclasses.dataclass(frozen=True)
class Settings(common.Encoding):
    limit: int = command.flag(
        2000, "Images on the map, evenly spread over --eval_split; t-SNE's time grows with them."
    )
    queries: int = command.flag(16, "Images whose neighbours are shown.")
    neighbours: int = command.flag(10, "Neighbours of each.")
    thumbnail: int = command.flag(48, "Side of the small pictures, in pixels.")
    perplexity: float = command.flag(30.0, "t-SNE's: about how many neighbours an image has.")

    eval_split_given: bool = False  # set by `resolved`

    NAME = "look"

    def __post_init__(self):
        super().__post_init__()
        for name in ("limit", "queries", "neighbours", "thumbnail", "perplexity"):
            command.require(self, getattr(self, name) > 0, name, "is more than 0")
        if (-(-(self.limit**0.5) // 1)) * self.thumbnail > SPRITE_SIDE:
            raise ConfigError(
                f"--limit={self.limit} pictures of --thumbnail={self.thumbnail} pixels do not fit into TensorBoard's "
                f"{SPRITE_SIDE} x {SPRITE_SIDE}: choose fewer or smaller ones"
            )

    def resolved(self):
        return dataclasses.replace(super().resolved(), eval_split_given=bool(self.eval_split))


def main(arguments):
    """Runs the command; returns the process's exit status."""
    return common.run("moco_tf.evaluate.look", __doc__, Settings, look, arguments)


def look(settings):
    """Writes the report and the projector files that the settings describe."""
    try:
        import matplotlib  # noqa: F401
        import sklearn  # noqa: F401
    except ImportError as error:
        raise ConfigError(f"a look needs {error.name}: pip install 'moco_tf[eval]'") from None
    from moco_tf.data.sources import evenly_spread
    from moco_tf.evaluate import nearest_neighbors, planar_map, plots, projector, report, subject

    output = Path(settings.output)
    encoder, _ = subject.encoder(settings)
    subject.check_images(encoder.preprocessing)
    source = _shown(settings, encoder.preprocessing)
    encoder = subject.by_engine(settings, encoder, source)
    features, labels, pictures = _encoded(settings, encoder, source)
    if len(features) < 3:
        raise ConfigError(f"a map needs at least 3 images; {source.name} has {len(features)}")
    subject.check_finite(features)
    names = [source.class_names[label] if label >= 0 else "no label" for label in labels]

    places = planar_map.tsne(features, settings.seed, settings.perplexity)
    plots.points(output / "map.png", places, labels, source.class_names)

    some = evenly_spread(len(features), settings.queries)
    cosines, numbers = nearest_neighbors.nearest(
        features, features[some], settings.neighbours + 1
    )  # the query is one of its own neighbours
    neighbours = []
    for query, similar, nearest in zip(some, cosines, numbers, strict=True):
        others = [(int(n), float(c)) for n, c in zip(nearest, similar, strict=True) if n != query]
        neighbours.append((int(query), others[: settings.neighbours]))

    summary = {"command": settings.NAME, "images_of": settings.images, "settings": dataclasses.asdict(settings)}
    files.write_json(output / "summary.json", summary)
    projector.write(output, features, names, pictures)
    report.write(output / "report.html", settings, source.name, names, labels, pictures, neighbours)
    log.info(
        f"{len(features)} images of {source.name}: {output / 'report.html'}; "
        f"tensorboard --logdir={output} shows them in its projector."
    )


def _shown(settings, preprocessing):
    """Returns the images of --eval_split, or of --train_split if the default --eval_split cannot be used."""
    from moco_tf.evaluate import subject

    try:
        return subject.source(settings, settings.eval_split, preprocessing)
    except ConfigError:
        if settings.eval_split_given:
            raise
        try:
            source = subject.source(settings, settings.train_split, preprocessing)
        except ConfigError:
            source = None
        if source is None:
            raise
        log.info(f"There is no split {settings.eval_split!r}: the images of {settings.train_split!r} are shown.")
        return source


def _encoded(settings, encoder, source):
    """Returns features (N, D), labels (N,) and small pictures uint8 (N, T, T, 3) of at most --limit images."""
    import numpy as np
    import tensorflow as tf

    from moco_tf.data.encoded import pixels
    from moco_tf.data.inputs.image import Preprocessing
    from moco_tf.data.pipeline import parallel_map
    from moco_tf.evaluate.extract import extract

    features, labels = extract(lambda x: encoder.encode(x)["features"], source, encoder.preprocessing, settings.limit)
    small = Preprocessing(settings.thumbnail, 1.0)

    def picture(record):
        image = encoder.preprocessing.shown(pixels(record["image"]))
        view = small.denormalize(small(image[None])[0])
        return tf.cast(tf.clip_by_value(tf.round(view), 0, 255), tf.uint8)

    pictures = parallel_map(source.in_order(settings.limit), picture)
    return features, labels, np.stack(list(pictures.as_numpy_iterator()))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
