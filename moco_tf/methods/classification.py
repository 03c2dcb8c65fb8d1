"""A pretext task that is a classification: pictures of a record are encoded, and a question about them has an answer.

What is encoded and what is asked are a task's own: `rotation.py`, `position.py`, `jigsaw.py`, `exemplar.py`,
`cluster.py`.

Axes: n images of this replica, M pictures of each, D features, Q questions about each, A answers that there are.
"""

from typing import ClassVar, NamedTuple

import tensorflow as tf

from moco_tf.encoders import heads
from moco_tf.methods import backbones
from moco_tf.methods.losses import unit_length
from moco_tf.methods.pretrainer import Pretrainer, Spread
from moco_tf.methods.shuffle_bn import groups_here, set_groups


class Terms(NamedTuple):
    """A value an image."""

    loss: tf.Tensor  # n, mean cross-entropy of its questions
    right: tf.Tensor  # n, share of its questions that are answered
    embeddings: tf.Tensor  # n x D, of unit length, of its first picture


class Classification(Pretrainer):
    """Learns an encoder by questions that have one of so many answers.

    Args:
      backbone: a Keras model of images (N, H, W, 3) -> (N, D).
      answers: A.
      asked: how many pictures a question is about: their features are joined.
      hidden_dim: width of a hidden layer before the answer; None: none.
      bn_groups, preprocessing, seed: as in `MoCo`.

    Attributes:
      query_encoder: a model of normalised images -> {"features", "projection"}, (N, D), which are the same.
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
        """What of a batch is encoded, (n, M, s, s, 3)."""
        raise NotImplementedError

    def questions(self, features, batch, training):
        """What is asked: float (n, Q, asked D) of features (n, M, D), and the answers, integers (n, Q)."""
        raise NotImplementedError

    def objective(self, batch, context, training=True):
        """Each question is answered by itself; all of an image count alike."""
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
        """What each image's loss counts for, (n,) or 1; 1 on average."""
        return 1.0

    def get_config(self):
        return super().get_config() | {
            "hidden_dim": self.hidden_dim,
            "bn_groups": self.bn_groups,
            "seed": self.seed,
        }
