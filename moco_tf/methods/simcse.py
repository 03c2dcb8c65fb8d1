"""SimCSE: a sentence passes an encoder twice, and dropout makes the two views (Gao et al. 2021, arXiv:2104.08821).

Each first pass looks for its second pass among those of the batch. A head follows in training only; the features are
the encoder's output. Two frames:

  in_batch  SimCSE's: gradients go to both passes, and the negatives are the other sentences of the batch;
  queue     MoCo's: a momentum encoder makes keys without dropout, and a short queue adds keys to the batch's (MoCoSE,
            Cao et al. 2022, and ESimCSE, Wu et al. 2021, arXiv:2109.04380, found this best).

Differs from the papers: features are the mean over the words, not the [CLS] token's features. With a queue, all keys
come from the momentum encoder; ESimCSE takes the batch's own keys from the query encoder, and MoCoSE has a predictor
and shared embeddings. The attention weights have no dropout.

Axes: n sentences of this replica, N of the global batch, L words, D features.
"""

import warnings

import keras
import numpy as np
import tensorflow as tf

from moco_tf import replicas
from moco_tf.data.inputs.text import Words
from moco_tf.encoders import heads, text
from moco_tf.methods import backbones, keras_internals
from moco_tf.methods.dictionary import look_up
from moco_tf.methods.ema import ema_update, rise_steps
from moco_tf.methods.flags import FRAMES
from moco_tf.methods.losses import batch_info_nce, unit_length
from moco_tf.methods.pretrainer import CONTRAST_METRICS
from moco_tf.methods.queue import Queue
from moco_tf.methods.queue_frame import QueueFrame


def backbone(config, options, inputs):
    """The backbone of a run."""
    return text.transformer(inputs, config.width, options.depth, options.attention_heads, options.dropout)


def model(config, options, inputs, source):
    """The `SimCSE` of a run."""
    return SimCSE(
        backbone(config, options, inputs),
        frame=options.frame,
        queue_size=options.queue_size,
        momentum=options.momentum,
        momentum_rise_steps=rise_steps(config, options, source),
        temperature=config.temperature,
        preprocessing=inputs,
        seed=config.seed,
    )


@keras.saving.register_keras_serializable("moco_tf")
class SimCSE(QueueFrame):
    """Learns an encoder of sentences: a batch is two tensors of words, int32 (N, L), of the same sentences.

    Args:
      backbone: a Keras model of words, int32 (N, L), L fixed -> (N, D). Its dropout makes the views. With
        `text.Dropout` the dropout is a function of seed and step, so that a run resumes bit for bit; with Keras' own
        dropout it is not.
      frame: "in_batch" or "queue".
      queue_size, momentum, momentum_rise_steps: for the queue's frame, as in `MoCo`; ESimCSE has 160 (2.5 batches) and
        0.995.
      temperature: T; 0.05 in the paper.
      preprocessing: a `Words`: how `predict`, kNN and export make the backbone's numbers from texts. None: `Words` of
        the backbone's length. A backbone with its own vocabulary trains on batches of its own numbers, and keeps its
        own conversion from texts to numbers.
      seed: seed of dropout and of the queue's first keys.

    Attributes:
      query_encoder: a model of words -> {"features", "projection"}; the projection is for training. The queue's frame
        has a key_encoder too.
    """

    METRICS = CONTRAST_METRICS
    VIEWS = (2, 2)

    def __init__(
        self,
        backbone,
        frame="in_batch",
        queue_size=160,
        momentum=0.995,
        momentum_rise_steps=None,
        temperature=0.05,
        preprocessing=None,
        seed=0,
        **kwargs,
    ):
        if frame not in FRAMES or not queue_size > 0 or not temperature > 0 or not 0 <= momentum <= 1:
            raise ValueError(
                f"SimCSE needs frame of {', '.join(FRAMES)}, queue_size > 0, temperature > 0 and 0 <= momentum <= 1, "
                f"not frame={frame!r}, queue_size={queue_size}, temperature={temperature}, momentum={momentum}"
            )
        shape = backbone.input_shape[1:]
        super().__init__(shape, preprocessing or Words(length=shape[0]), **kwargs)
        self.frame = frame
        self.queue_size = queue_size
        self.momentum = momentum
        self.momentum_rise_steps = momentum_rise_steps
        self.temperature = temperature
        self.seed = seed
        self.query_encoder = heads.encoder_of_text(backbone, shape)
        self._check_dropout()
        if frame == "queue":
            self.key_encoder = heads.encoder_of_text(backbones.clone(backbone), shape)
            backbones.start_key_encoder(self.query_encoder, self.key_encoder)
            self.queue = Queue(queue_size, backbone.output_shape[-1], seed=seed, name="queue")

    def _check_dropout(self):
        """Warns if two passes give the same features."""
        if not tf.executing_eagerly() or replicas.count() > 1:
            return
        words = 1 + tf.zeros((1, self.preprocessing.length), tf.int32)
        one, other = (self._pass(words, training=True, second=second).numpy() for second in (False, True))
        if np.array_equal(one, other):
            warnings.warn(
                "Two passes of one sentence give the same features, bit for bit: without dropout, or with a fixed "
                "seed of it, there is nothing to learn from a sentence unless its two copies differ.",
                stacklevel=3,
            )

    def backbones_for_xla(self):
        return []  # both passes of a step would draw the dropout of the first

    def prepare(self, batch, training=True):
        """In the queue's frame, moves the momentum encoder; returns keys (N, D) of second copies, without dropout."""
        if self.frame == "in_batch":
            return ()
        if training:
            ema_update(self.query_encoder, self.key_encoder, self._momentum())
        return replicas.gather(unit_length(self.key_encoder(batch["views"][1], training=False)["projection"]))

    def objective(self, batch, context, training=True):
        """Each sentence's first pass looks for its key among those of the batch, and in the queue."""
        queries = self._pass(batch["views"][0], training)  # n x D
        if self.frame == "in_batch":
            keys = replicas.gather(self._pass(batch["views"][1], training, second=True))  # N x D
            keys = tf.ensure_shape(keys, (None, queries.shape[-1]))
        else:
            keys = tf.concat([context, look_up(self.queue.keys.value, tf.range(self.queue_size))], axis=0)
        rows = replicas.own(tf.range(tf.shape(queries)[0] * replicas.count()))
        return batch_info_nce(queries, keys, rows, self.temperature)

    def finish(self, batch, context, terms):
        """In the queue's frame the keys enter the queue."""
        if self.frame == "queue":
            self.queue.enqueue(context)

    def encode(self, words):
        """Returns the features, and as embedding the features scaled to unit length; leaves out the head."""
        features = self.query_encoder(words, training=False)["features"]
        return {"features": features, "embedding": unit_length(features)}

    def predict(self, x, *args, **kwargs):
        """Returns features (N, D), a NumPy array, of texts: a list, an array or a dataset of batches of strings.

        Raises:
          ValueError: x is something else.
        """
        if not isinstance(x, tf.data.Dataset):
            texts = np.asarray(x)
            if texts.ndim != 1 or (texts.size and texts.dtype.kind not in "OSU"):
                raise ValueError(f"predict takes a list of texts, or an array of them, (N,); got {x!r:.60}")
            if not texts.size:
                return np.zeros((0, self.query_encoder.output["features"].shape[-1]), self.totals.dtype)
            texts = tf.constant(texts.tolist(), tf.string)
            x = tf.data.Dataset.from_tensor_slices(texts).batch(kwargs.pop("batch_size", 256))
        return keras.Model.predict(self, x, *args, **kwargs)

    def _pass(self, words, training, second=False):
        """Returns projections (n, D) of unit length; each pass has its own dropout masks."""
        seed = lambda: tf.stack([tf.constant(2 * self.seed + second, tf.int64), self.step.value])  # noqa: E731
        with text.drawing_from(keras_internals.layers_of(self.query_encoder), seed):
            return unit_length(self.query_encoder(words, training=training)["projection"])
