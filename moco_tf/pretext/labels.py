"""MoCo with labels: images of one class are one thing.

It uses labels, so it is not self-supervised: an upper bound of what is learnt from which images belong together.

Data: images with labels. Supervision: the labels. Sources: SupCon (arXiv:2004.11362) and its code's MoCo form, UberNCE
(arXiv:2010.09709): the positives of a query are its own key and all keys of its label in batch and queue. An image
without a label has only its own key. Views are those of `crops`.
"""

import dataclasses

from moco_tf.methods.flags import POSITIVES_FROM, MoCo, loss_flag
from moco_tf.pretext import crops
from moco_tf.recorded import flag

views, at_once, on_device = crops.views, crops.at_once, crops.on_device


@dataclasses.dataclass(frozen=True)
class Options(MoCo, crops.Options):
    """The views, and the flags of MoCo, which looks for all images of a class."""

    loss: str = loss_flag("supcon", "supcon_in", "infonce")
    positives_from: str = flag(
        "batch_and_queue",
        "Where a query's positives are. batch_and_queue: all keys of its label; batch: those in the batch.",
        choices=POSITIVES_FROM[1:],
    )


def records(source, options):
    """Returns the source, if it has labels.

    Raises:
      ValueError: the source has no labels.
    """
    if not len(source.class_names):
        raise ValueError(
            f"{source.name} has no labels: its images lie in no folders of classes; --pretext=crops needs none"
        )
    return source


def model(config, options, inputs, source):
    """The `MoCo` of a run."""
    from moco_tf import encoders
    from moco_tf.methods import moco

    settings = moco.settings(config, options, inputs, source)
    return moco.MoCo(encoders.of_config(config), **settings, thing_of="label")
