"""Clusters: in which group of images is this one? The groups are found anew in each epoch (arXiv:1807.05520).

Data: images. Supervision: only what the encoder itself finds similar. Source: DeepCluster (Caron et al. 2018).
"""

import dataclasses

from moco_tf import command
from moco_tf.command import ConfigError
from moco_tf.methods import flags
from moco_tf.pretext import crops
from moco_tf.recorded import flag

views, at_once, on_device = crops.plain_views, crops.plain_at_once, crops.plain_on_device

UNUSED = ("dim", "hidden_dim", "temperature")


@dataclasses.dataclass(frozen=True)
class Options(flags.BNGroups, crops.PlainCropping):
    """How many groups there are, in how many components k-means finds them, and how an image is cropped."""

    clusters: int = flag(100, "k: groups of images. DeepCluster: 10000 for 1000 classes, ten times as many.")
    components: int = flag(
        64, "Principal components, whitened, in which groups are found; at most as many as features. DeepCluster: 256."
    )

    def check(self):
        command.require(self, self.clusters >= 2, "clusters", "is 2 or more")
        command.require(self, self.components >= 1, "components", "is 1 or more")
        if self.optimizer == "adamw":
            raise ConfigError(
                "--pretext=cluster lets its classifier begin anew in each epoch, which AdamW's counted steps do not; "
                "got --optimizer=adamw: take sgd, as DeepCluster does, or lars"
            )


def records(source, options):
    """Returns the source, if it can be read by number and has more images than groups.

    Raises:
      ValueError: the source is a stream or has too few images, or scikit-learn is missing.
    """
    from moco_tf.data.sources import Source

    if not isinstance(source, Source):
        raise ValueError(f"groups are found among all images by their numbers; {source.name} is a stream")
    if source.size <= options.clusters:
        raise ValueError(
            f"--clusters={options.clusters} groups are found among more images than that; {source.name} has "
            f"{source.size}"
        )
    try:
        import sklearn  # noqa: F401
    except ImportError:
        raise ValueError("k-means is scikit-learn's: pip install 'moco_tf[eval]'") from None
    return source


def model(config, options, inputs, source):
    """The `Cluster` of a run."""
    from moco_tf.methods import cluster

    return cluster.model(config, options, inputs, source)
