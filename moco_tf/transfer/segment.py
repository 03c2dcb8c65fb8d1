"""`python -m moco_tf.transfer.segment --encoder=RUN --dataset=DIR`: trains a segmenter on a pre-trained encoder.

--head=fcn is the paper's FCN-16s, --head=deeplab is keras-cv's DeepLabV3+. The command trains the whole network, or
with --freeze all but the encoder, and judges it by mean intersection over union at the images' own size. Writes
metrics.csv, summary.json, pictures of predictions beside the masks, and checkpoints. The same command resumes from a
checkpoint bit for bit. `moco_tf.transfer.export` makes a SavedModel.
"""

import dataclasses
import sys
from typing import ClassVar

from moco_tf.recorded import flag
from moco_tf.transfer import running
from moco_tf.transfer import settings as common


@dataclasses.dataclass(frozen=True)
class Settings(common.Settings):
    dataset: str = flag(
        "",
        "Images with masks: Pascal VOC's folders; images/<split> and masks/<split> (PNGs of class numbers, 255 "
        "ignored; classes.txt names them); or a prepared set of TFDS that has masks.",
        path=True,
    )
    head: str = flag("fcn", "fcn: the paper's FCN-16s; deeplab: DeepLabV3+.", choices=("fcn", "deeplab"))
    scale_min: float = flag(0.5, "Least random scale of a training image. Paper: 0.5.")
    scale_max: float = flag(2.0, "Largest random scale of a training image. Paper: 2.")
    lr: float = flag(
        0.003, "Learning rate, not scaled by the batch. Paper: 0.003 on VOC, 0.01 on Cityscapes, batch 16."
    )

    NAME: ClassVar[str] = "segment"
    ENLARGE: ClassVar[bool] = False


def main(arguments):
    """Runs the command; returns the process's exit status."""
    return running.run("moco_tf.transfer.segment", __doc__, Settings, segment, arguments)


def segment(settings):
    """Trains as the settings say, judges and writes the results; returns the process's exit status."""
    from moco_tf.data import masks
    from moco_tf.transfer import annotated_views, judges

    masks.require_pillow()
    return running.train(settings, masks.find, network, loss(), annotated_views.masked, judges.OfMasks)


def network(settings, classes, start=True):
    """Returns the segmenter and its input format; start: as `trunk.of_run` takes it."""
    from moco_tf.transfer import segmenters, trunk

    maps, inputs = trunk.of_run(settings, dilated=settings.head == "fcn", start=start)
    build = segmenters.fcn if settings.head == "fcn" else segmenters.deeplab
    return build(maps, classes, settings.image_size), inputs


def loss():
    """Returns the segmenter's loss."""
    from moco_tf.transfer import segmenters

    return segmenters.loss


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
