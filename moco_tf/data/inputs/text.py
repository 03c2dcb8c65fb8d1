"""What an encoder of text expects: a fixed number of words, as numbers.

A text is put into lower case and split where there is no letter, mark or digit. Each word's number is a hash of the
word. So there is no vocabulary that could be lost or not fit, and every word has a number. The price is that two words
may share a number.
"""

import dataclasses
import typing

import numpy as np
import tensorflow as tf

from moco_tf.data.inputs.image import Signature

PLAIN_BUCKETS = 4096  # of the bag of words that kNN uses without an encoder


@dataclasses.dataclass(frozen=True)
class Words:
    """Turns texts into an encoder's input: int32 (N, `length`), 0 after the last word; further words are left out."""

    unit: typing.ClassVar = "sentences"  # what it makes inputs of
    channels_of_files: typing.ClassVar = 3  # of images, which it does not read

    length: int = 32
    hash_buckets: int = 32_768  # how many numbers there are, including 0

    def __post_init__(self):
        if self.length < 1 or self.hash_buckets < 2:
            raise ValueError(
                f"length is at least 1 and hash_buckets at least 2, not {self.length} and {self.hash_buckets}."
            )

    @property
    def spec(self):
        """The encoder's input."""
        return tf.TensorSpec((None, self.length), tf.int32, "words")

    def check_fits(self, shape):
        """Refuses an encoder whose input has another `shape`, (length,)."""
        if tuple(shape) not in ((self.length,), (None,)):
            raise ValueError(f"the backbone takes {shape} words of a text, but its inputs make {self.length}")

    def __call__(self, texts):
        """string (N,) -> int32 (N, length)."""
        words = split(texts)
        numbers = 1 + tf.strings.to_hash_bucket_fast(words.flat_values, self.hash_buckets - 1)
        numbers = words.with_flat_values(tf.cast(numbers, tf.int32))
        return numbers.to_tensor(0, shape=(None, self.length))

    def of_record(self, record):
        """The words of a record with a "text", int32 (length,)."""
        return self(record["text"][tf.newaxis])[0]

    def signatures(self, request_megapixels=None):
        """{name: `Signature`}: what a server takes; the first is its default. request_megapixels: only for images."""
        return {
            "serving_default": Signature(
                lambda texts: (self(texts), None),
                tf.TensorSpec((None,), tf.string, "texts"),
                ["a sentence"],
                "string (N,): texts, UTF-8",
            ),
            "preprocessed": Signature(
                lambda words: (words, None),
                self.spec,
                np.zeros((1, self.length), np.int32),
                f"int32 (N, {self.length}): words as numbers, 0 after the last",
            ),
        }

    def lines(self, texts, views):
        """Returns a line of words for each text of (N,): what its views, a tuple of (N, length) each, say."""
        lines = []
        for text, *own in zip(texts, *(view.numpy() for view in views), strict=True):
            words = split(tf.constant([text]))[0].numpy()
            known = dict(zip(self(tf.constant(words)).numpy()[:, 0], words, strict=True)) if len(words) else {}
            lines.append(" | ".join(b" ".join(known.get(n, b"?") for n in view if n).decode() for view in own))
        return lines

    def records_of(self, source):
        """Returns what the encoder reads of a source of sentences: the source itself."""
        return source

    def plain(self):
        """Returns what kNN uses without an encoder: log(1 + how often each word occurs), without idf."""
        small = dataclasses.replace(self, hash_buckets=min(PLAIN_BUCKETS, self.hash_buckets))

        def counts(words):
            number = tf.math.bincount(words, minlength=small.hash_buckets, maxlength=small.hash_buckets, axis=-1)
            return tf.math.log1p(tf.cast(number[:, 1:], tf.float32))  # 0 is no word

        return "bag of words", small, counts


def split(texts):
    """The words of texts (N,), a RaggedTensor of strings (N, any number)."""
    lower = tf.strings.lower(texts, encoding="utf-8")
    return tf.strings.split(tf.strings.regex_replace(lower, r"[^\p{L}\p{M}\p{N}]+", " "))
