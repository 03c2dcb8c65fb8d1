"""Exemplar: which image is this a distorted copy of? (Dosovitskiy et al. 2014, arXiv:1406.6909).

Data: images. Supervision: that copies come from one image. Each image is a class. A softmax over so many classes needs
much memory: beyond `LIMIT` images the task refuses it, and the triplet loss of arXiv:1901.09005 takes its place when
asked for.
"""

import dataclasses

from moco_tf import command
from moco_tf.methods import flags
from moco_tf.pretext import crops
from moco_tf.recorded import flag

LIMIT = 50_000  # images as classes of a softmax

UNUSED = ("hidden_dim", "temperature")


@dataclasses.dataclass(frozen=True)
class Options(flags.BNGroups, crops.Cropping):
    """How copies are distorted, and how they are told apart."""

    loss: str = flag(
        "softmax",
        f"softmax: each image is a class, at most {LIMIT} of them. triplet: the copies of an image are nearer to one "
        "another than to semi-hard others of the batch. Exemplar: softmax over 8000; arXiv 1901.09005: triplet.",
        choices=("softmax", "triplet"),
    )
    copies: int = flag(2, "Distorted copies of an image in a step; with triplet 2 or more. arXiv 1901.09005: 8.")
    margin: float = flag(0.5, "How much nearer, in squared distance, with triplet. arXiv 1901.09005: 0.5.")

    def uses(self, name):
        return super().uses(name) and (name != "dim" or self.loss == "triplet")

    def check(self):
        least = 2 if self.loss == "triplet" else 1
        command.require(self, self.copies >= least, "copies", f"is at least {least} with --loss={self.loss}")
        command.require(self, self.margin > 0, "margin", "is more than 0")


def kinds(inputs, options):
    """Returns an `augment.View` for each copy."""
    return (crops.recipe(inputs, options).query,) * options.copies


def views(record, seed, inputs, options):
    """The copies of an image, float32 (S, S, 3) each, normalised."""
    return crops.host_part(record, seed, kinds(inputs, options), inputs, options)


def at_once(source, options):
    """Returns a function that does the work of `views` for all records of a batch, or None."""
    return crops.pictures_of(source, options.copies, options)


def on_device(inputs, options):
    """Returns the training step's part of making a batch's views, a function, or None."""
    return crops.device_part(kinds(inputs, options), inputs, options)


def records(source, options):
    """Returns the source, if its images can be classes.

    Raises:
      ValueError: there are too many images.
    """
    if options.loss == "softmax" and source.size > LIMIT:
        raise ValueError(
            f"--loss=softmax makes a class of each image, of {LIMIT} at most; {source.name} has {source.size}: take "
            "--loss=triplet"
        )
    return source


def model(config, options, inputs, source):
    """The `Exemplar` or `Triplets` of a run."""
    from moco_tf.methods import exemplar

    return exemplar.model(config, options, inputs, source)
