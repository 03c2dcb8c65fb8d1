"""Clusters: in which group of images is this one? (DeepCluster, Caron et al. 2018, arXiv:1807.05520)

Before each epoch k-means groups the features of all images, and the classifier starts again. In the epoch the encoder
learns to tell the groups apart. Without care it would put all images into one group. So the weight of an image is the
inverse of its group's size, which has the same effect as drawing images evenly from all groups.

Axes: R records, n images of this replica, D features, k groups.
"""

import keras
import numpy as np
import tensorflow as tf

from moco_tf import encoders
from moco_tf.command import ConfigError
from moco_tf.data.views import central
from moco_tf.methods.bank import numbers_of
from moco_tf.methods.classification import Classification
from moco_tf.methods.keras_internals import of_several_machines
from moco_tf.optimizers import forget

ITERATIONS = 20  # of k-means, in the paper


def model(config, options, inputs, source):
    """The `Cluster` of a run.

    Raises:
      ConfigError: the run trains on several machines, which would round the features, and so group them, differently.
    """
    if of_several_machines(tf.distribute.get_strategy()):
        raise ConfigError("--pretext=cluster finds its groups on one machine, and TF_CONFIG names several")
    return Cluster(
        encoders.of_config(config),
        records=source.size,
        clusters=options.clusters,
        components=options.components,
        bn_groups=options.bn_groups,
        preprocessing=inputs,
        seed=config.seed,
    )


@keras.saving.register_keras_serializable("moco_tf")
class Cluster(Classification):
    """A batch is {"views": (images,), "id": numbers of the records}. See `Classification`.

    Args:
      records: R.
      clusters: k.
      components: number of dimensions in which k-means finds the groups.

    Attributes:
      groups: int64 variable (R,), the group of each record.
      shares: float variable (k,), the weight of an image of each group, 1 on average, see `shares`.
    """

    def __init__(self, backbone, records, clusters=100, components=64, **settings):
        super().__init__(backbone, answers=clusters, **settings)
        self.records = records
        self.clusters = clusters
        self.components = components
        kept = {"trainable": False, "autocast": False}
        self.groups = self.add_weight(name="groups", shape=(records,), initializer="zeros", dtype="int64", **kept)
        self.shares = self.add_weight(name="shares", shape=(clusters,), initializer="ones", **kept)

    def before_epoch(self, epoch, source):
        """Finds the groups of a source's images, and restarts the classifier."""
        from threadpoolctl import threadpool_limits

        with threadpool_limits(1):  # several threads add up in no fixed order
            points = whitened(self.features_of(source), self.components)
            groups = k_means(points, self.clusters, self.seed + epoch)
        self.groups.assign(groups)
        self.shares.assign(shares(groups, self.clusters))
        begin_anew(self.classifier.get_layer("logits"), self.optimizer, (self.seed, epoch))

    def features_of(self, source):
        """The features of the central views of all records, (R, D)."""
        views = central(source.unchecked(), self.preprocessing)
        return np.concatenate([self._at_rest(images).numpy() for images, *_ in views])

    @tf.function(autograph=False, reduce_retracing=True)  # traced once, not in each epoch
    def _at_rest(self, images):
        return tf.cast(self.query_encoder(images, training=False)["features"], tf.float32)

    def pictures(self, batch):
        (images,) = batch["views"]
        return images[:, tf.newaxis]

    def questions(self, features, batch, training):
        return features, self._groups_of(batch)[:, tf.newaxis]

    def weights_of(self, batch):
        return tf.gather(self.shares.value, self._groups_of(batch))

    def _groups_of(self, batch):
        return tf.gather(self.groups.value, numbers_of(batch, self.records, "Cluster"))

    def get_config(self):
        return super().get_config() | {
            "records": self.records,
            "clusters": self.clusters,
            "components": self.components,
        }


def whitened(features, components):
    """Projects features (R, D) on their first principal components, with unit variance, then unit length: (R, C)."""
    from sklearn.decomposition import PCA

    components = min(components, *features.shape)
    points = PCA(components, whiten=True, svd_solver="covariance_eigh").fit_transform(features)  # uses D x D more
    return points / np.maximum(np.linalg.norm(points, axis=1, keepdims=True), 1e-12)


def k_means(points, clusters, seed):
    """Finds the group of each point (R, C), int64 (R,); scikit-learn fills an empty group with the furthest points."""
    from sklearn.cluster import KMeans

    of_points = KMeans(clusters, n_init=1, max_iter=ITERATIONS, random_state=seed).fit_predict(points)
    return of_points.astype(np.int64)


def shares(groups, clusters):
    """Returns the weight of an image of each group, (k,): 1 / size, scaled so that the mean over the images is 1."""
    sizes = np.bincount(groups, minlength=clusters)
    return np.where(sizes > 0, len(groups) / (np.count_nonzero(sizes) * np.maximum(sizes, 1)), 0.0)


def begin_anew(layer, optimizer, seed):
    """Draws a linear layer's kernel from N(0, 0.01), and sets its biases and the optimizer's velocity of both to 0."""
    layer.kernel.assign(0.01 * tf.random.stateless_normal(layer.kernel.shape, seed, alg="philox"))
    layer.bias.assign(tf.zeros_like(layer.bias))
    for variable in (layer.kernel, layer.bias):
        forget(optimizer, variable)
