"""`python -m moco_tf.transfer.detect --encoder=RUN --dataset=DIR`: trains a detector on a pre-trained encoder.

The network is keras-cv's RetinaNet on the encoder's P3 to P5. The command trains all of it, or with --freeze all but
the encoder, and judges it by COCO's average precision. Writes metrics.csv, summary.json, pictures of the found boxes
beside the true boxes, and checkpoints. The same command resumes from a checkpoint bit for bit. --init=random starts
the same network from scratch. `moco_tf.transfer.export` makes a SavedModel.
"""

import dataclasses
import sys
from typing import ClassVar

from moco_tf import command
from moco_tf.recorded import flag
from moco_tf.transfer import running
from moco_tf.transfer import settings as common


@dataclasses.dataclass(frozen=True)
class Settings(common.Settings):
    dataset: str = flag(
        "",
        "Images with boxes: a folder with COCO's annotations/instances_<split>.json, Pascal VOC's folders, or a "
        "prepared set of TFDS that has boxes.",
        path=True,
    )
    smallest_anchor: float = flag(
        32.0,
        "Side in pixels of the anchors at stride 8; each of four further levels doubles it. Less for small objects.",
    )
    head_layers: int = flag(3, "Convolutions of 256 channels before boxes and classes are predicted. Paper: 4.")
    pyramid_channels: int = flag(
        256, "Channels of the feature pyramid's maps. Paper: 256; fewer are faster, for a narrow encoder."
    )

    NAME: ClassVar[str] = "detect"
    ENLARGE: ClassVar[bool] = True

    def __post_init__(self):
        super().__post_init__()
        command.require(self, self.smallest_anchor > 0, "smallest_anchor", "is more than 0")
        command.require(self, self.head_layers > 0, "head_layers", "is 1 or more")
        command.require(self, self.pyramid_channels > 0, "pyramid_channels", "is 1 or more")


def main(arguments):
    """Runs the command; returns the process's exit status."""
    return running.run("moco_tf.transfer.detect", __doc__, Settings, detect, arguments)


def detect(settings):
    """Trains as the settings say, judges and writes the results; returns the process's exit status."""
    from moco_tf.data import boxes
    from moco_tf.transfer import annotated_views, average_precision, judges

    average_precision.require_pycocotools()
    return running.train(settings, boxes.find, network, loss(), annotated_views.boxed, judges.OfBoxes)


def network(settings, classes, start=True):
    """Returns the detector and its input format; start: as `trunk.of_run` takes it."""
    from moco_tf.transfer import retinanet, trunk

    maps, inputs = trunk.of_run(settings, start=start)
    shape = settings.smallest_anchor, settings.head_layers, settings.pyramid_channels
    return retinanet.retinanet(maps, classes, *shape), inputs


def loss():
    """Returns the detector's loss, whose state is in each checkpoint."""
    from moco_tf.transfer import retinanet

    return retinanet.Loss()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
