"""The kNN monitor of training: a Keras callback for any `fit`, and a run's own, where its data has labels for it."""

import logging
import math
import time

import keras
import numpy as np
import tensorflow as tf

from moco_tf import build
from moco_tf.command import ConfigError
from moco_tf.data import dataset
from moco_tf.data.sources import Source, numbered_alike
from moco_tf.evaluate import nearest_neighbors
from moco_tf.evaluate.extract import extract, views_of

log = logging.getLogger("moco_tf")


class KNNMonitor(keras.callbacks.Callback):
    """Adds `knn_top1` (percent, of backbone features) to the logs of every `every`-th epoch.

    Args:
      bank, queries: labelled `Source`s: the images that serve as neighbours, and the images that are classified.
      every: epochs between evaluations.
      limit: the most images taken from each source, evenly spread, so that large data costs no more.
    """

    MOST_KEPT = 2**29  # the most bytes of a source's views that stay in memory between evaluations

    def __init__(self, bank, queries, every=1, limit=50_000):
        super().__init__()
        self.bank = bank
        self.queries = queries
        self.every = every
        self.limit = limit
        self.seconds = 0.0  # spent in evaluations
        self._kept, self._kept_for = {}, None

    def set_model(self, model):
        if self.model is not model:  # each `fit` sets it again; one trace is enough
            self._encode = tf.function(lambda images: model.encode(images)["features"])
        super().set_model(model)

    def on_epoch_end(self, epoch, logs=None):
        if (epoch + 1) % self.every == 0:
            logs["knn_top1"] = self.evaluate()

    def evaluate(self):
        """kNN top-1 of the model's features, in percent."""
        return self._accuracy(self._encode, self.model.preprocessing)

    def evaluate_plain(self):
        """{name: kNN top-1, in percent} of the inputs themselves: the pixels of small images, or the words."""
        name, inputs, encode = self.model.preprocessing.plain()
        return {name: self._accuracy(encode, inputs)}

    def _accuracy(self, encode, preprocessing):
        begun = time.perf_counter()
        bank, queries = (
            extract(encode, source, preprocessing, self.limit, True, self._views(source, preprocessing))
            for source in (self.bank, self.queries)
        )
        for source, (_, labels) in ((self.bank, bank), (self.queries, queries)):
            if not len(labels):
                raise ConfigError(
                    f"the kNN monitor takes {self.limit} evenly spread {source.unit}, and none of those of "
                    f"{source.name} has a label: train with --knn_every=0"
                )
        accuracy = nearest_neighbors.accuracy(*bank, *queries, len(self.bank.class_names))
        self.seconds += time.perf_counter() - begun
        return accuracy

    def _views(self, source, preprocessing):
        """Returns a source's central views, the same in each evaluation: traced once, and kept if they are small."""
        if preprocessing != self.model.preprocessing:  # the inputs themselves are evaluated only once
            return None
        if self._kept_for != preprocessing:
            self._kept, self._kept_for = {}, preprocessing
        if source not in self._kept:
            views = views_of(source, preprocessing, self.limit, labelled=True)
            spec = preprocessing.spec
            size = min(source.size, self.limit) * math.prod(spec.shape[1:]) * spec.dtype.size
            self._kept[source] = views.cache() if size <= self.MOST_KEPT else views
        return self._kept[source]


def of_run(config, train_source, run):
    """Returns the kNN monitor, or None if it is off or the data has no labels for it, with the reason logged."""
    if not config.knn_every:
        return None
    try:
        where = config.dataset, config.data_dir, config.eval_split
        channels = build.inputs(config).channels_of_files
        split = dataset.find(*where, config.max_bad_fraction, exif=config.exif, channels=channels)
        queries = build.read(config, split.open(run.path / "eval_images.csv", run.begun))
    except ConfigError as error:
        log.info(f"No kNN monitor: {error}")
        return None
    bank, queries = numbered_alike(train_source, queries)
    if reason := _means_nothing(bank, queries):
        log.info(f"No kNN monitor: {reason}.")
        return None
    return KNNMonitor(bank, queries, config.knn_every)


def _means_nothing(bank, queries):
    """Returns the reason why the kNN accuracy of `queries` among `bank` would mean nothing, or None."""
    if same := bank.shared_with(queries):
        return (
            f"{same} of the {queries.size} {queries.unit} of {queries.name} are trained on, and each would find itself"
        )
    for source in (bank, queries):
        if not source.labelled:
            return f"the {source.unit} of {source.name} have no labels"
    names = bank.class_names
    if isinstance(bank, Source):  # the labels of a stream come with its images
        names = [names[label] for label in sorted(_classes_in(bank) & _classes_in(queries))]
    if len(names) < 2:
        present = f"only {names[0]!r}" if names else "none"
        return (
            f"telling classes apart needs two with images in both {bank.name} and {queries.name}; there is {present}"
        )
    return None


def _classes_in(source):
    """Returns the class numbers of a `Source`'s decodable images, a set."""
    return set(np.unique(source.labels.numpy()[source.good]).tolist()) - {-1}
