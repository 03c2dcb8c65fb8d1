"""The memory bank, the second of the mechanisms that MoCo is compared with: it keeps a key for each record of data.

Wu et al. 2018, "Unsupervised Feature Learning via Non-Parametric Instance Discrimination" (arXiv:1805.01978), as He et
al. 2020 (arXiv:1911.05722) describe it in section 3.2 and figure 2b. A query's key is the bank's key of its record.
Negatives are drawn from the bank. A key comes from the query encoder as it was when it last saw the record, up to an
epoch ago. There is no momentum encoder, but each key has a momentum.

Differs from instance discrimination in one thing: all queries of a batch share the K negatives, as MoCo's mini-batches
share a dictionary. This costs K C numbers, and not N K C; each query still has K negatives.

Axes: n images of this replica, N of the global batch, H W image, C length of the projection, K negatives, R records.
"""

from typing import NamedTuple

import keras
import tensorflow as tf

from moco_tf import encoders, replicas
from moco_tf.encoders import heads
from moco_tf.methods import backbones
from moco_tf.methods.bank import Bank, normalizer, numbers_of
from moco_tf.methods.flags import LOSSES_OF_BANKS
from moco_tf.methods.losses import info_nce, nce, unit_length
from moco_tf.methods.pretrainer import CONTRAST_METRICS, Pretrainer
from moco_tf.methods.shuffle_bn import groups_here, set_groups


class FromBank(NamedTuple):
    """The values that a step reads from the bank."""

    keys: tf.Tensor  # n x C, of the queries' records
    negatives: tf.Tensor  # K x C
    numbers: tf.Tensor  # N, the records of the global batch


def model(config, options, inputs, source):
    """The `MemoryBank` of a run.

    Raises:
      ConfigError: the data has too few images outside a batch, or the bank needs over a third of the machine's memory.
    """
    config.check_bank(source.size)
    return MemoryBank(
        encoders.of_config(config),
        source.size,
        dim=config.dim,
        head=options.head,
        hidden_dim=config.hidden_dim or None,
        queue_size=options.queue_size,
        bank_momentum=options.bank_momentum,
        loss=options.loss,
        temperature=config.temperature,
        bn_groups=options.bn_groups,
        preprocessing=inputs,
        seed=config.seed,
    )


@keras.saving.register_keras_serializable("moco_tf")
class MemoryBank(Pretrainer):
    """Learns an image encoder from numbered images: `fit` takes a dataset of (images, numbers) batches.

    Images are views, float32 (N, H, W, 3), normalised as the backbone expects. Numbers are int64 (N,), 0 to R - 1,
    the same for a record in every epoch. A batch may also be a dict {"views": (images,), "id": numbers}.
    `evaluate` also takes (query, key) pairs, even of other images: the key's embedding then replaces the bank's key.

    Args:
      backbone, dim, head, hidden_dim, preprocessing: as in `MoCo`.
      records: R, the number of images in the data.
      queue_size: K, the negatives of a step.
      bank_momentum: how much of a record's key stays when the record is seen; 0.5 in instance discrimination.
      loss: "infonce": the negatives are K different records outside the batch; or "nce": the negatives are noise, K
        records drawn from all with replacement, and the normaliser is estimated on the first batch (section 3.2).
      temperature: T of the loss; 0.07 in both papers.
      bn_groups: equal parts of the global batch that BatchNorm normalises separately, as in `MoCo`.
      seed: seed of the bank's first keys and of the negatives.

    Attributes:
      query_encoder: a model of normalised images -> {"features", "projection"}.
      bank: the `Bank`, the same on all replicas.
    """

    METRICS = CONTRAST_METRICS
    VIEWS = (1, 2)  # the second in evaluation only
    TAKES = 1

    def __init__(
        self,
        backbone,
        records,
        dim=128,
        head="linear",
        hidden_dim=None,
        queue_size=65536,
        bank_momentum=0.5,
        loss="infonce",
        temperature=0.07,
        bn_groups=None,
        preprocessing=None,
        seed=0,
        **kwargs,
    ):
        positive = records > 0 and queue_size > 0 and temperature > 0
        if not (positive and 0 <= bank_momentum <= 1 and loss in LOSSES_OF_BANKS):
            raise ValueError(
                "MemoryBank needs records, queue_size and temperature > 0, 0 <= bank_momentum <= 1 and loss of "
                f"{', '.join(LOSSES_OF_BANKS)}, not records={records}, queue_size={queue_size}, "
                f"temperature={temperature}, bank_momentum={bank_momentum}, loss={loss!r}"
            )
        backbone = backbones.of_one_output(backbone)
        image_shape = backbones.image_shape(backbone, preprocessing)
        super().__init__(image_shape, preprocessing, **kwargs)
        self.dim = dim
        self.head = head
        self.hidden_dim = hidden_dim
        self.queue_size = queue_size
        self.bank_momentum = bank_momentum
        self.loss_kind = loss
        self.temperature = temperature
        self.bn_groups = bn_groups
        self.groups_here = groups_here(bn_groups)
        self.seed = seed
        self.supports_jit = loss != "infonce"  # XLA knows no `index_shuffle`

        self.query_encoder = heads.encoder(backbone, image_shape, head, dim, hidden_dim)
        set_groups(self.query_encoder, self.groups_here)
        self.bank = Bank(records, dim, seed=seed, name="bank")
        if loss == "nce":
            self.log_z = self.add_weight(
                name="log_z",
                shape=(),
                initializer="zeros",
                dtype=self.bank.keys.dtype,
                trainable=False,
                autocast=False,
            )

    def prepare(self, batch, training=True):
        """Returns the bank's keys of the batch's records, n x C, and the step's negatives, K x C."""
        if not training and len(batch["views"]) == 2:  # pairs of views, with no place in the bank
            images = batch["views"][1]
            keys = unit_length(self.query_encoder(images, training=False)["projection"])
            return FromBank(keys, self._draw(tf.zeros((0,), tf.int64)), None)
        numbers = numbers_of(batch, self.bank.records)  # n
        everyone = replicas.gather(numbers)  # N
        return FromBank(self.bank.look_up(numbers), self._draw(everyone), everyone)

    def objective(self, batch, context, training=True):
        """Queries tell their record's key from the negatives, by InfoNCE or by noise-contrastive estimation."""
        queries = unit_length(self.query_encoder(batch["views"][0], training=training)["projection"])  # n x C
        if self.loss_kind == "infonce":
            return info_nce(queries, context.keys, context.negatives, self.temperature)
        if training:
            everyone = tf.stop_gradient(replicas.gather(queries))
            of_bank = self.temperature, self.bank.records
            self.log_z.assign(normalizer(self.log_z.value, self.step.value, everyone, context.negatives, *of_bank))
        log_z = self.log_z.value
        return nce(queries, context.keys, context.negatives, self.temperature, log_z, self.bank.records)

    def finish(self, batch, context, terms):
        """Moves the batch's keys in the bank towards the new features."""
        features = replicas.gather(tf.stop_gradient(terms.queries))  # N x C
        self.bank.update(context.numbers, features, self.bank_momentum)

    def _draw(self, numbers):
        """The step's negatives (K, C), the same on all replicas; numbers: (N,), the records of the global batch."""
        seed = (self.seed, self.step.value)
        return self.bank.look_up(self.bank.draw_negatives(self.loss_kind, self.queue_size, numbers, seed))

    def get_config(self):
        return super().get_config() | {
            "records": self.bank.records,
            "dim": self.dim,
            "head": self.head,
            "hidden_dim": self.hidden_dim,
            "queue_size": self.queue_size,
            "bank_momentum": self.bank_momentum,
            "loss": self.loss_kind,
            "temperature": self.temperature,
            "bn_groups": self.bn_groups,
            "seed": self.seed,
        }
