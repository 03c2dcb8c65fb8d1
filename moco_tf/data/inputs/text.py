"""What an encoder of text expects: words as numbers, of one length.

A text is lower case and split where there is no letter, mark or digit; each word's number is a hash of it. So there is
no vocabulary that could be lost or not fit, and every word has a number; the price is that two words may share one.
"""

import dataclasses
import typing

import numpy as np
import tensorflow as tf

from moco_tf.data.inputs.image import Signature

PLAIN_BUCKETS = 4096  # of the bag of words that kNN has without an encoder


@dataclasses.dataclass(frozen=True)
class Words:
    """From texts to an encoder's input: int32 (N, `length`), 0 after the last word; further words are left out."""

    unit: typing.ClassVar = "sentences"  # of what it makes inputs
    channels_of_files: typing.ClassVar = 3  # those of images, which it does not read

    length: int = 32
    hash_buckets: int = 32_768  # numbers that there are, 0 among them

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
        """{name: `Signature`}: what a server takes; the first is its default. request_megapixels: images have them."""
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
        """What the views, a tuple of (N, length) each, of texts (N,) say: a line of words a text."""
        lines = []
        for text, *own in zip(texts, *(view.numpy() for view in views), strict=True):
            words = split(tf.constant([text]))[0].numpy()
            known = dict(zip(self(tf.constant(words)).numpy()[:, 0], words, strict=True)) if len(words) else {}
            lines.append(" | ".join(b" ".join(known.get(n, b"?") for n in view if n).decode() for view in own))
        return lines

    def records_of(self, source):
        """What the encoder reads of a source of sentences: those."""
        return source

    def plain(self):
        """What kNN has without an encoder: log(1 + how often each word occurs), without idf."""
        small = dataclasses.replace(self, hash_buckets=min(PLAIN_BUCKETS, self.hash_buckets))

        def counts(words):
            number = tf.math.bincount(words, minlength=small.hash_buckets, maxlength=small.hash_buckets, axis=-1)
            return tf.math.log1p(tf.cast(number[:, 1:], tf.float32))  # 0 is no word

        return "bag of words", small, counts


def split(texts):
    """The words of texts (N,), a RaggedTensor of strings (N, any number)."""
    lower = tf.strings.lower(texts, encoding="utf-8")
    return tf.strings.split(tf.strings.regex_replace(lower, r"[^\p{L}\p{M}\p{N}]+", " "))
