"""Contrastive multiview coding: an image without its colours, and its colours, learn to find each other.

Tian, Krishnan and Isola 2019, "Contrastive Multiview Coding" (arXiv:1906.05849). Luminance and colour of a crop, or
the crop and its depth, are two modalities. Each modality has an encoder and a head. Its embedding looks for the other
modality's embedding of the same image among those of other images.

Three frames:

  memory_bank  the paper's: a bank for each modality keeps keys of the other images; the loss is NCE or a softmax;
  in_batch     the other images are those of the batch, and gradients go to both sides;
  queue        MoCo's: momentum encoders make keys of a second crop, and each modality has a queue (CMC-MoCo of
               github.com/HobbitLong/PyContrast).

With a memory bank all images of a batch share the negatives, as in `memory_bank.py`; the paper draws them for each
image.

Axes: n images of this replica, N of the global batch, C length of a modality's projection, D of its features, K
negatives, R records.
"""

import keras
import tensorflow as tf

from moco_tf import encoders, replicas
from moco_tf.encoders import heads, two_modalities
from moco_tf.methods import backbones
from moco_tf.methods.bank import Bank, normalizer, numbers_of
from moco_tf.methods.ema import ema_update, rise_steps
from moco_tf.methods.flags import FRAMES_OF_CMC, LOSSES_OF_BANKS
from moco_tf.methods.losses import batch_info_nce, info_nce, nce, together, unit_length
from moco_tf.methods.pretrainer import CONTRAST_METRICS
from moco_tf.methods.queue import Queue
from moco_tf.methods.queue_frame import QueueFrame
from moco_tf.methods.shuffle_bn import groups_here, set_groups, shuffle_key_images


def backbone(config, options, inputs, any_size=None):
    """The backbone of a run: each of its two encoders has half of the run's width; any_size: as for `of_config`."""

    def make(channels):
        return encoders.of_config(config, any_size=any_size, channels=channels, width=config.width // 2)

    if options.modalities == "rgb,depth":
        return two_modalities.of_image_and_depth(make)
    return two_modalities.of_two_colors(make, options.color_space, inputs)


def model(config, options, inputs, source):
    """The `CMC` of a run; refuses memory banks as `memory_bank.model` does."""
    if options.frame == "memory_bank":
        config.check_bank(source.size)
    return CMC(
        backbone(config, options, inputs),
        modalities=tuple(options.modalities.split(",")),
        dim=config.dim,
        head=options.head,
        hidden_dim=config.hidden_dim or None,
        frame=options.frame,
        queue_size=options.queue_size,
        momentum=options.momentum,
        momentum_rise_steps=rise_steps(config, options, source),
        records=source.size,
        bank_momentum=options.bank_momentum,
        loss=options.loss,
        temperature=config.temperature,
        shuffle_bn=options.shuffle_bn,
        bn_groups=options.bn_groups,
        preprocessing=inputs,
        seed=config.seed,
    )


@keras.saving.register_keras_serializable("moco_tf")
class CMC(QueueFrame):
    """Learns two encoders, for example of luminance and of colour, and joins their features and their embeddings.

    Args:
      backbone: a Keras model of images (N, H, W, 3) -> (N, 2D), the first half of luminance, the other of colour, as
        `encoders/two_modalities.py` builds it; or of images with depth, (N, H, W, 4).
      modalities: names of the two modalities.
      dim: C.
      head: "linear" or "mlp"; each modality has a head.
      hidden_dim: width of an MLP head's hidden layer; None: D.
      frame: "in_batch": a batch is (images,); "queue": (images of queries, images of keys); or "memory_bank":
        {"views": (images,), "id": numbers}, as in `MemoryBank`. Without a queue, evaluation is as with "in_batch".
      queue_size, momentum, momentum_rise_steps: for the queue's frame, as in `MoCo`.
      records, bank_momentum, loss: for the memory bank's frame, as in `MemoryBank`; records is R, queue_size its K.
      temperature: T; 0.07 in the paper.
      shuffle_bn, bn_groups, preprocessing, seed: as in `MoCo`.

    Attributes:
      query_encoder: a model of normalised images -> {"features" (N, 2D), "projection" (N, 2C)}; the queue's
        frame has a key_encoder too.
      luminance_queue, color_queue (or the other modalities' names): each modality's `Queue` of keys, in the queue's
        frame.
      luminance_bank, color_bank: each modality's `Bank` of keys, in the memory bank's frame.
    """

    METRICS = CONTRAST_METRICS

    def __init__(
        self,
        backbone,
        modalities=("luminance", "color"),
        dim=128,
        head="linear",
        hidden_dim=None,
        frame="in_batch",
        queue_size=16384,
        momentum=0.999,
        momentum_rise_steps=None,
        records=None,
        bank_momentum=0.5,
        loss="infonce",
        temperature=0.07,
        shuffle_bn=True,
        bn_groups=None,
        preprocessing=None,
        seed=0,
        **kwargs,
    ):
        if head not in ("linear", "mlp"):
            raise ValueError(f"CMC's head is 'linear' or 'mlp', not {head!r}")
        if frame not in FRAMES_OF_CMC or not queue_size > 0 or not temperature > 0 or not 0 <= momentum <= 1:
            raise ValueError(
                f"CMC needs frame of {', '.join(FRAMES_OF_CMC)}, queue_size > 0, temperature > 0 and 0 <= momentum "
                f"<= 1, not frame={frame!r}, queue_size={queue_size}, temperature={temperature}, momentum={momentum}"
            )
        if frame == "memory_bank" and not (records and loss in LOSSES_OF_BANKS and 0 <= bank_momentum <= 1):
            raise ValueError(
                f"CMC's memory banks need records > 0, loss of {', '.join(LOSSES_OF_BANKS)} and 0 <= bank_momentum "
                f"<= 1, not records={records}, loss={loss!r}, bank_momentum={bank_momentum}"
            )
        image_shape = backbones.image_shape(backbone, preprocessing)
        super().__init__(image_shape, preprocessing, **kwargs)
        self.modalities = tuple(modalities)
        self.dim = dim
        self.head = head
        self.hidden_dim = hidden_dim
        self.frame = frame
        self.queue_size = queue_size
        self.momentum = momentum
        self.momentum_rise_steps = momentum_rise_steps
        self.records = records
        self.bank_momentum = bank_momentum
        self.loss_kind = loss
        self.temperature = temperature
        self.shuffle_bn = shuffle_bn
        self.bn_groups = bn_groups
        self.groups_here = groups_here(bn_groups)
        self.seed = seed
        self.VIEWS = (2, 2) if frame == "queue" else (1, 1)
        self.supports_jit = not (frame == "memory_bank" and loss == "infonce")  # XLA knows no `index_shuffle`

        self.query_encoder = heads.encoder_of_halves(backbone, image_shape, head, dim, hidden_dim)
        set_groups(self.query_encoder, self.groups_here)
        if frame == "queue":
            self.key_encoder = heads.encoder_of_halves(backbones.clone(backbone), image_shape, head, dim, hidden_dim)
            set_groups(self.key_encoder, self.groups_here)
            backbones.start_key_encoder(self.query_encoder, self.key_encoder)
            for place, name in enumerate(self.modalities):  # an attribute each: checkpoints find no layers in a list
                setattr(self, f"{name}_queue", Queue(queue_size, dim, seed=seed + place, name=f"{name}_queue"))
        elif frame == "memory_bank":
            for place, name in enumerate(self.modalities):
                setattr(self, f"{name}_bank", Bank(records, dim, seed=seed + place, name=f"{name}_bank"))
            kept = {"shape": (2,), "initializer": "zeros", "trainable": False, "autocast": False}
            self.log_z = self.add_weight(name="log_z", dtype=self.banks[0].keys.dtype, **kept)

    def prepare(self, batch, training=True):
        """Returns the keys of both modalities, N x C each; with memory banks, places in the banks, n, N and K.

        Moves the momentum encoders first, then encodes the keys with them.
        """
        if self.frame == "in_batch" or (self.frame == "memory_bank" and not training):
            return ()
        if self.frame == "memory_bank":
            numbers = numbers_of(batch, self.records)
            everyone = replicas.gather(numbers)
            seed = (self.seed, self.step.value)
            drawn = self.banks[0].draw_negatives(self.loss_kind, self.queue_size, everyone, seed)
            return numbers, everyone, drawn
        if not training:
            return self._both(self.key_encoder, batch["views"][1], training)
        ema_update(self.query_encoder, self.key_encoder, self._momentum())
        seed = (self.seed, self.step.value)
        images, permutation = shuffle_key_images(batch["views"][1], self.shuffle_bn, self.groups_here, seed)
        keys = tf.concat(self._both(self.key_encoder, images, training), axis=1)  # n x 2C
        keys = replicas.gather(keys) if permutation is None else replicas.unshuffle(keys, permutation)
        return tf.split(keys, 2, axis=1)

    def objective(self, batch, context, training=True):
        """Each modality looks for the other modality of its image; the loss is the sum of both losses."""
        queries = self._both(self.query_encoder, batch["views"][0], training)  # two of n x C
        if self.frame == "queue":
            keys = [replicas.own(k) if training else k for k in context]
            contrasts = [
                info_nce(queries[place], keys[1 - place], self.queues[1 - place].keys.value, self.temperature)
                for place in range(2)
            ]
        elif self.frame == "memory_bank" and training:
            contrasts = self._from_banks(queries, *context)
        else:
            everything = replicas.gather(tf.concat(queries, axis=1))  # N x 2C
            everything = tf.split(tf.ensure_shape(everything, (None, 2 * self.dim)), 2, axis=1)
            rows = replicas.own(tf.range(tf.shape(everything[0])[0]))
            contrasts = [
                batch_info_nce(queries[place], everything[1 - place], rows, self.temperature) for place in range(2)
            ]
        return together(contrasts, times=2)

    def finish(self, batch, context, terms):
        """Puts each modality's keys in its queue, or moves its bank's keys of the batch's records towards them."""
        if self.frame == "queue":
            for queue, keys in zip(self.queues, context, strict=True):
                queue.enqueue(keys)
        elif self.frame == "memory_bank":
            _, everyone, _ = context
            both = tf.concat(tf.split(tf.stop_gradient(terms.queries), 2), axis=1)  # n x 2C
            for bank, features in zip(self.banks, tf.split(replicas.gather(both), 2, axis=1), strict=True):
                bank.update(everyone, features, self.bank_momentum)

    def _from_banks(self, queries, numbers, everyone, drawn):
        """The contrasts of both directions with the keys of the batch's records and the drawn negatives."""
        contrasts, log_z = [], []
        for place, bank in enumerate(reversed(self.banks)):  # the first looks for the second
            keys, negatives = bank.look_up(numbers), bank.look_up(drawn)
            if self.loss_kind == "infonce":
                contrasts.append(info_nce(queries[place], keys, negatives, self.temperature))
                continue
            whole = tf.stop_gradient(replicas.gather(queries[place]))
            of_bank = self.temperature, self.records
            log_z.append(normalizer(self.log_z.value[place], self.step.value, whole, negatives, *of_bank))
            contrasts.append(nce(queries[place], keys, negatives, self.temperature, log_z[-1], self.records))
        if log_z:
            self.log_z.assign(tf.stack(log_z))
        return contrasts

    def encode(self, images):
        """Returns both modalities' features, joined, and their embeddings, joined to one of unit length."""
        outputs = self.query_encoder(images, training=False)
        embeddings = [unit_length(half) for half in tf.split(outputs["projection"], 2, axis=1)]
        return {"features": outputs["features"], "embedding": tf.concat(embeddings, axis=1) / 2**0.5}

    @property
    def queues(self):
        return tuple(getattr(self, f"{name}_queue") for name in self.modalities)

    @property
    def banks(self):
        return tuple(getattr(self, f"{name}_bank") for name in self.modalities)

    def _both(self, encoder, images, training):
        """Embeddings of the two modalities, (n, C) each, of unit length."""
        projections = tf.split(encoder(images, training=training)["projection"], 2, axis=1)
        return [unit_length(half) for half in projections]

    def get_config(self):
        return super().get_config() | {
            "modalities": self.modalities,
            "dim": self.dim,
            "head": self.head,
            "hidden_dim": self.hidden_dim,
            "records": self.records,
            "bank_momentum": self.bank_momentum,
            "loss": self.loss_kind,
            "shuffle_bn": self.shuffle_bn,
            "bn_groups": self.bn_groups,
        }
