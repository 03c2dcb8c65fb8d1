"""End-to-end contrast, the first of the mechanisms that MoCo is compared with: keys come from the batch.

He et al. 2020 (arXiv:1911.05722), section 3.2 and figure 2a: back-propagation goes into the query encoder and into the
key encoder, which may be the same. The negatives are the batch's other images: a large dictionary needs a large batch.
With one encoder, an MLP head and the loss "nt_xent" it is SimCLR (Chen et al. 2020, arXiv:2002.05709).

Axes: n images of this replica, N of the global batch, H W image, C length of the projection.
"""

import keras
import tensorflow as tf

from moco_tf import encoders, replicas
from moco_tf.encoders import heads
from moco_tf.methods import backbones
from moco_tf.methods.ema import copy_weights
from moco_tf.methods.flags import LOSSES_OF_PAIRS, SHARED
from moco_tf.methods.losses import batch_info_nce, unit_length
from moco_tf.methods.pretrainer import CONTRAST_METRICS, Pretrainer
from moco_tf.methods.shuffle_bn import groups_here, set_groups, shuffle_key_images


def model(config, options, inputs, source):
    """The `EndToEnd` of a run."""
    return EndToEnd(
        encoders.of_config(config),
        dim=config.dim,
        head=options.head,
        hidden_dim=config.hidden_dim or None,
        shared=options.shared,
        loss=options.loss,
        temperature=config.temperature,
        shuffle_bn=options.shuffle_bn,
        bn_groups=options.bn_groups,
        preprocessing=inputs,
        seed=config.seed,
    )


@keras.saving.register_keras_serializable("moco_tf")
class EndToEnd(Pretrainer):
    """Learns an image encoder from pairs of views: `fit` takes a dataset of (query, key) image batches.

    Args:
      backbone, dim, head, hidden_dim, preprocessing: as in `MoCo`.
      shared: what the encoders of queries and keys have in common. "encoder": they are one; "trunk": each has its
        own head; "none": two encoders that begin with equal weights (section 3.2 allows all three).
      loss: "infonce": a query looks among the keys, with N - 1 negatives; or "nt_xent": each of the 2N views looks
        among all others, with 2N - 2 negatives.
      temperature: T of the loss; 0.07 in MoCo v1, 0.1 in SimCLR.
      shuffle_bn: encode keys in another order than queries, so that BatchNorm does not leak which key belongs to which
        query (section 3.3). Gradients flow back through the shuffle. Has an effect with `bn_groups` > 1.
      bn_groups: equal parts of the global batch that BatchNorm normalises separately, as in `MoCo`.
      seed: seed of the shuffles.

    Attributes:
      query_encoder, key_encoder: models of normalised images -> {"features", "projection"}.
    """

    METRICS = CONTRAST_METRICS
    VIEWS = (2, 2)

    def __init__(
        self,
        backbone,
        dim=128,
        head="linear",
        hidden_dim=None,
        shared="encoder",
        loss="infonce",
        temperature=0.07,
        shuffle_bn=True,
        bn_groups=None,
        preprocessing=None,
        seed=0,
        **kwargs,
    ):
        if shared not in SHARED or loss not in LOSSES_OF_PAIRS or not temperature > 0:
            raise ValueError(
                f"EndToEnd needs shared of {', '.join(SHARED)}, loss of {', '.join(LOSSES_OF_PAIRS)} and temperature "
                f"> 0, not shared={shared!r}, loss={loss!r}, temperature={temperature}"
            )
        backbone = backbones.of_one_output(backbone)
        image_shape = backbones.image_shape(backbone, preprocessing)
        super().__init__(image_shape, preprocessing, **kwargs)
        self.dim = dim
        self.head = head
        self.hidden_dim = hidden_dim
        self.shared = shared
        self.loss_kind = loss
        self.temperature = temperature
        self.shuffle_bn = shuffle_bn
        self.bn_groups = bn_groups
        self.groups_here = groups_here(bn_groups)
        self.seed = seed

        self.query_encoder = heads.encoder(backbone, image_shape, head, dim, hidden_dim)
        if shared == "encoder":
            self.key_encoder = self.query_encoder
        else:
            trunk = backbone if shared == "trunk" else backbones.clone(backbone)
            self.key_encoder = heads.encoder(trunk, image_shape, head, dim, hidden_dim)
            copy_weights(self.query_encoder, self.key_encoder)
            backbones.check_copied(self.query_encoder, self.key_encoder)
        for encoder in (self.query_encoder, self.key_encoder):
            set_groups(encoder, self.groups_here)

    def prepare(self, batch, training=True):
        """Returns this replica's key images in another order and the permutation; or in the same order, and None."""
        _, key_images = batch["views"]
        if not training:
            return key_images, None
        return shuffle_key_images(key_images, self.shuffle_bn, self.groups_here, (self.seed, self.step.value))

    def objective(self, batch, context, training=True):
        """Queries look for their keys among the batch's keys; with NT-Xent each view looks among all views."""
        (query_images, _), (key_images, permutation) = batch["views"], context
        queries = unit_length(self.query_encoder(query_images, training=training)["projection"])  # n x C
        keys = unit_length(self.key_encoder(key_images, training=training)["projection"])  # n x C, in shuffled order
        symmetric = self.loss_kind == "nt_xent"
        # One gather brings all replicas' embeddings.
        everything = replicas.gather(tf.concat([queries, keys], axis=1) if symmetric else keys)
        all_keys = everything[:, -self.dim :]  # N x C
        if permutation is not None:
            all_keys = tf.gather(all_keys, tf.math.invert_permutation(permutation))
        count = tf.shape(all_keys)[0]
        rows = replicas.own(tf.range(count))  # n: replica r's images are rows r * n to (r + 1) * n
        if not symmetric:
            return batch_info_nce(queries, all_keys, rows, self.temperature)
        views = tf.concat([everything[:, : self.dim], all_keys], axis=0)
        views = tf.ensure_shape(views, (None, self.dim))  # 2N x C; the gather forgets C
        partners = tf.concat([rows + count, rows], axis=0)
        rows = tf.concat([rows, rows + count], axis=0)
        queries = tf.gather(views, rows)  # 2n x C
        return batch_info_nce(queries, views, partners, self.temperature, itself=rows)

    def get_config(self):
        return super().get_config() | {
            "dim": self.dim,
            "head": self.head,
            "hidden_dim": self.hidden_dim,
            "shared": self.shared,
            "loss": self.loss_kind,
            "temperature": self.temperature,
            "shuffle_bn": self.shuffle_bn,
            "bn_groups": self.bn_groups,
            "seed": self.seed,
        }
