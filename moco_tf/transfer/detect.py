"""`python -m moco_tf.transfer.detect --encoder=RUN --dataset=DIR`: a detector on a pre-trained encoder.

RetinaNet of keras-cv on the encoder's P3 to P5, all of it trained; judged by COCO's average precision. Writes
metrics.csv, summary.json, pictures of what is found beside what is there, and checkpoints, from which the same command
goes on bit for bit. --init=random starts the same network from scratch. `moco_tf.transfer.export` makes a SavedModel.
"""

import dataclasses
import functools
import sys
from typing import ClassVar

from moco_tf import command
from moco_tf.config import flag
from moco_tf.transfer import running
from moco_tf.transfer import settings as common

JUDGED_AT_ONCE = 8  # images
SHOWN, SHOWN_SCORE = 6, 0.3  # images in a picture; the least score of a box there


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

    NAME: ClassVar[str] = "detect"
    ENLARGE: ClassVar[bool] = True  # every image fills the canvas

    def __post_init__(self):
        super().__post_init__()
        command.require(self, self.smallest_anchor > 0, "smallest_anchor", "is more than 0")
        command.require(self, self.head_layers >= 0, "head_layers", "is 0 or more")


def main(arguments):
    """Runs the command; returns the process's exit status."""
    return running.run("moco_tf.transfer.detect", __doc__, Settings, detect, arguments)


def detect(settings):
    """Trains as the settings say, judges and writes the results; returns the process's exit status."""
    from moco_tf.data import boxes
    from moco_tf.transfer import average_precision, retinanet, views

    average_precision.require_pycocotools()
    return running.train(settings, boxes.find, network, retinanet.loss, views.boxed, Judge)


def network(settings, classes, start=True):
    """(the detector, how images become its input); start: as `trunk.trunk` has it."""
    from moco_tf.transfer import retinanet, trunk

    maps, inputs = trunk.trunk(settings, start=start)
    return retinanet.retinanet(maps, classes, settings.smallest_anchor, settings.head_layers), inputs


class Judge:
    """Judges a detector on all images of a source, and draws the first (see `running.train`)."""

    columns = ("ap", "ap50", "ap75", "ap50_any_class")

    def __init__(self, settings, model, source, canvas):
        import tensorflow as tf

        from moco_tf.transfer import retinanet

        self.source, self.canvas = source, canvas
        images = tf.TensorSpec((None, settings.image_size, settings.image_size, 3), tf.float32)
        self.detect = tf.function(functools.partial(retinanet.detect, model), input_signature=[images])

    def judge(self):
        from moco_tf.transfer import average_precision, views

        truth, found, shown = [], [], []
        each = views.in_order(self.source, functools.partial(views.boxed, self.canvas))
        for seen in views.groups(each.as_numpy_iterator(), JUDGED_AT_ONCE):
            for one, answer in zip(seen, self._found(seen), strict=True):
                truth.append((one["truth"], one["of"], one["crowds"]))
                of, scores, classes = answer
                found.append((of / one["scale"][[0, 1, 0, 1]], scores, classes))
                if len(shown) < SHOWN:
                    good = scores >= SHOWN_SCORE
                    shown.append((one["image"], _real(one["boxes"], one["classes"]), tuple(x[good] for x in answer)))
        result = average_precision.average_precision(truth, found, len(self.source.class_names))
        of_class = dict(zip(self.source.class_names, result.pop("ap_of_class").tolist(), strict=True))
        return result, {"eval_images": len(truth), "ap_of_class": of_class}, shown

    def _found(self, seen):
        """Of each view (boxes (m, 4) on the canvas, scores (m,), classes (m,)), a list."""
        import numpy as np

        from moco_tf.transfer.views import NOTHING

        answers = [answer.numpy() for answer in self.detect(np.stack([one["image"] for one in seen]))]
        return [tuple(values[answer[2] != NOTHING] for values in answer) for answer in zip(*answers, strict=True)]

    def training(self, batch):
        examples = zip(batch["image"], batch["boxes"], batch["classes"], strict=True)
        return [(image, _real(of, classes), None) for image, of, classes in examples][:SHOWN]

    def picture(self, path, shown):
        from moco_tf.transfer import pictures

        images, truth, found = zip(*shown, strict=True)
        pictures.boxes(path, list(map(self.canvas.shown, images)), truth, found, self.source.class_names)


def _real(boxes, classes):
    """Boxes and classes without what fills them up."""
    from moco_tf.transfer.views import NOTHING

    return boxes[classes != NOTHING], classes[classes != NOTHING]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
