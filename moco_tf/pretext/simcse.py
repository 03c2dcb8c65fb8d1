"""SimCSE: two passes of a sentence, which dropout makes different, belong together (arXiv:2104.08821).

Data: sentences, one per line (`data/texts.py`). Supervision: that both passes are of one sentence. The paper starts
from BERT, and its authors say that it does not work from scratch: without a language model, training learns the weight
of words.
"""

import dataclasses

from moco_tf import command
from moco_tf.command import ConfigError
from moco_tf.methods import flags
from moco_tf.recorded import flag

MOST_REPEATED = 10  # words of a sentence, in ESimCSE
UNUSED = ("arch", "stem", "dim", "hidden_dim", "image_size", "channels", "growing_sizes")


@dataclasses.dataclass(frozen=True)
class Options(flags.OfFrames, flags.KeyEncoder, flags.Negatives):
    """The words, the network, the dropout and the frame."""

    frame: str = flag(
        "in_batch",
        "in_batch: SimCSE's, the negatives are the batch's other sentences, gradients to both passes. queue: MoCo's, "
        "keys by a momentum encoder without dropout, and a queue of them beside the batch's. Queue and momentum have "
        "an effect there only.",
        choices=flags.FRAMES,
    )
    max_words: int = flag(32, "L: words of a sentence; further ones are left out. SimCSE: 32 sub-words.")
    hash_buckets: int = flag(32768, "Numbers of words; a word's number is a hash of it, so that two may share one.")
    depth: int = flag(2, "Blocks of the Transformer of --width; 0: the mean of the words' vectors. BERT-base: 12.")
    attention_heads: int = flag(4, "Heads of its attention. BERT-base: 12.")
    dropout: float = flag(0.1, "Share of dropout, which makes the two views. SimCSE: 0.1.")
    word_repetition: float = flag(
        0.0, "Some words of the second copy stand there twice: fewer than this share, and than 10. ESimCSE: 0.32."
    )
    queue_size: int = flag(160, "K: keys in the queue, with --frame=queue. ESimCSE: 160, 2.5 batches; MoCoSE: 512.")
    temperature: float = flag(0.05, "T of the loss. SimCSE: 0.05.")
    momentum: float = flag(0.995, "m of the key encoder, with --frame=queue. ESimCSE: 0.995.")

    def check(self):
        command.require(self, self.max_words > 0, "max_words", "is more than 0")
        command.require(self, self.hash_buckets > 1, "hash_buckets", "is more than 1")
        command.require(self, self.depth >= 0, "depth", "is 0 or more")
        command.require(self, 0 <= self.dropout < 1, "dropout", "is a share, from 0 to less than 1")
        command.require(self, 0 <= self.word_repetition <= 1, "word_repetition", "is a share, from 0 to 1")
        if self.depth and (self.attention_heads < 1 or self.width % self.attention_heads):
            raise ConfigError(
                f"--width={self.width} is divided among the heads of attention: it is a multiple of "
                f"--attention_heads; got {self.attention_heads}"
            )
        if not self.dropout and self.frame == "in_batch":
            raise ConfigError(
                "--dropout tells a sentence's two views apart in the batch's frame; got 0, with which each would find "
                "itself"
            )


def inputs(config, options):
    """What the encoder expects: words."""
    from moco_tf.data.inputs.text import Words

    return Words(options.max_words, options.hash_buckets)


def views(record, seed, inputs, options):
    """Returns the words of a sentence twice, int32 (L,); in the second copy some words are repeated, if asked for."""
    words = inputs.of_record(record)
    return words, repeated(words, seed, options.word_repetition) if options.word_repetition else words


def at_once(source, options):
    """Returns a function that does the work of `views` for a batch: (numbers (N,), seeds (N, 2)) -> views."""
    import tensorflow as tf

    words_of = inputs(None, options)

    def views_of(numbers, seeds):
        words = words_of(tf.gather(source.contents, numbers))
        if not options.word_repetition:
            return words, words
        one = lambda pair: repeated(*pair, options.word_repetition)  # noqa: E731
        return words, tf.map_fn(one, (words, seeds), fn_output_signature=tf.int32)

    return views_of


def repeated(words, seed, share):
    """Repeats some words of (L,), any number below min(10, int(share x words)), as ESimCSE's code does; cuts to L."""
    import tensorflow as tf

    length = tf.shape(words)[0]
    there = tf.math.count_nonzero(words, dtype=tf.int32)
    most = tf.minimum(MOST_REPEATED, tf.cast(share * tf.cast(there, tf.float32), tf.int32))
    drawn = tf.random.stateless_uniform((words.shape[0] + 1,), seed, alg="philox")
    number = tf.cast(drawn[0] * tf.cast(most, tf.float32), tf.int32)  # 0 to most - 1
    rank = tf.argsort(tf.argsort(tf.where(words > 0, drawn[1:], 2.0)))
    twice = tf.repeat(words, tf.where(rank < number, 2, 1))[: words.shape[0]]
    return tf.ensure_shape(tf.pad(twice, [[0, length - tf.shape(twice)[0]]]), words.shape)


def backbone(config, options, inputs):
    """The backbone of a run, with fresh weights."""
    from moco_tf.methods import simcse

    return simcse.backbone(config, options, inputs)


def model(config, options, inputs, source):
    """The `SimCSE` of a run."""
    from moco_tf.methods import simcse

    return simcse.model(config, options, inputs, source)
