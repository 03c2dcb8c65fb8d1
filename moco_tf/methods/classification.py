"""The base class of pretext tasks that classify: they answer a question about a record's encoded pictures.

Each task defines its own pictures and questions: `rotation.py`, `position.py`, `jigsaw.py`, `exemplar.py`,
`cluster.py`.

Axes: n images of this replica, M pictures of each, D features, Q questions about each, A possible answers.
"""

from typing import ClassVar, NamedTuple

import tensorflow as tf

from moco_tf.encoders import heads
from moco_tf.methods import backbones
from moco_tf.methods.losses import unit_length
from moco_tf.methods.pretrainer import Pretrainer, Spread
from moco_tf.methods.shuffle_bn import groups_here, set_groups


class Terms(NamedTuple):
    """One value per image."""

    loss: tf.Tensor  # n, mean over its questions
    right: tf.Tensor  # n, share of its questions with a right answer
    embeddings: tf.Tensor  # n x D, of unit length, of its first picture


class Classification(Pretrainer):
    """Learns an encoder from questions, each with one of `answers` answers.

    Args:
      backbone: a Keras model of images (N, H, W, 3) -> (N, D).
      answers: A.
      asked: how many pictures a question is about; their features are joined.
      hidden_dim: width of a hidden layer before the answer; None: no hidden layer.
      bn_groups, preprocessing, seed: as in `MoCo`.

    Attributes:
      query_encoder: a model of normalised images -> {"features", "projection"}, two equal outputs (N, D).
      classifier: a model of questions (N, asked D) -> logits (N, A), left out when images are encoded.
    """

    METRICS: ClassVar[dict] = {
        "accuracy": lambda terms: terms.right,
        "feature_std": Spread(lambda terms: terms.embeddings),
    }
    VIEWS = (1, 1)

    def __init__(
        self, backbone, answers, asked=1, hidden_dim=None, bn_groups=None, preprocessing=None, seed=0, **kwargs
    ):
        backbone = backbones.of_one_output(backbone)
        image_shape = backbones.image_shape(backbone, preprocessing)
        super().__init__(image_shape, preprocessing, **kwargs)
        self.hidden_dim = hidden_dim
        self.bn_groups = bn_groups
        self.groups_here = groups_here(bn_groups)
        self.seed = seed
        self.query_encoder = heads.encoder_without_head(backbone, image_shape)
        width = self.query_encoder.output["features"].shape[-1]
        self.classifier = heads.classifier(asked * width, answers, hidden_dim)
        for part in (self.query_encoder, self.classifier):
            set_groups(part, self.groups_here)

    def pictures(self, batch):
        """Returns the pictures of a batch to encode, (n, M, s, s, 3)."""
        raise NotImplementedError

    def questions(self, features, batch, training):
        """Returns questions, float (n, Q, asked D), about features (n, M, D), and their answers, integers (n, Q)."""
        raise NotImplementedError

    def objective(self, batch, context, training=True):
        """Answers each question by itself; all questions of an image have the same weight."""
        pictures = self.pictures(batch)
        count, shape = pictures.shape[1], pictures.shape[2:]
        # Pictures of an image stand side by side, so that BN groups and replicas hold whole images.
        features = self.query_encoder(tf.reshape(pictures, (-1, *shape)), training=training)["features"]
        features = tf.reshape(features, (-1, count, features.shape[-1]))  # n x M x D
        questions, answers = self.questions(features, batch, training)
        asked = questions.shape[1]
        logits = self.classifier(tf.reshape(questions, (-1, questions.shape[-1])), training=training)
        logits = tf.cast(logits, self.totals.dtype)
        answers = tf.reshape(answers, (-1,))
        loss = tf.nn.sparse_softmax_cross_entropy_with_logits(answers, logits)
        right = tf.cast(tf.argmax(logits, axis=1, output_type=answers.dtype) == answers, loss.dtype)
        loss, right = (tf.reduce_mean(tf.reshape(values, (-1, asked)), axis=1) for values in (loss, right))
        return Terms(loss * self.weights_of(batch), right, unit_length(features[:, 0]))

    def weights_of(self, batch):
        """Returns the weight of each image's loss, (n,) or 1; the mean is 1."""
        return 1.0

    def get_config(self):
        return super().get_config() | {
            "hidden_dim": self.hidden_dim,
            "bn_groups": self.bn_groups,
            "seed": self.seed,
        }
