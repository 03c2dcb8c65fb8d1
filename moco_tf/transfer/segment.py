"""`python -m moco_tf.transfer.segment --encoder=RUN --dataset=DIR`: a segmenter on a pre-trained encoder.

--head=fcn is the paper's FCN-16s, deeplab DeepLabV3+ of keras-cv; all of it is trained, and judged by mean
intersection over union at the images' own size. Writes metrics.csv, summary.json, pictures of predictions beside the
masks, and checkpoints, from which the same command goes on bit for bit. `moco_tf.transfer.export` makes a SavedModel.
"""

import dataclasses
import functools
import sys
from typing import ClassVar

from moco_tf.config import flag
from moco_tf.transfer import running
from moco_tf.transfer import settings as common

JUDGED_AT_ONCE = 8  # images
SHOWN = 6  # images in a picture


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
    ENLARGE: ClassVar[bool] = False  # images smaller than the canvas are seen at their own size


def main(arguments):
    """Runs the command; returns the process's exit status."""
    return running.run("moco_tf.transfer.segment", __doc__, Settings, segment, arguments)


def segment(settings):
    """Trains as the settings say, judges and writes the results; returns the process's exit status."""
    from moco_tf.data import masks
    from moco_tf.transfer import segmenters, views

    masks.require_pillow()
    return running.train(settings, masks.find, network, segmenters.loss, views.masked, Judge)


def network(settings, classes, start=True):
    """(the segmenter, how images become its input); start: as `trunk.trunk` has it."""
    from moco_tf.transfer import segmenters, trunk

    maps, inputs = trunk.trunk(settings, dilated=settings.head == "fcn", start=start)
    build = segmenters.fcn if settings.head == "fcn" else segmenters.deeplab
    return build(maps, classes, settings.image_size), inputs


class Judge:
    """Judges a segmenter on all images of a source, and draws the first (see `running.train`)."""

    columns = ("miou",)

    def __init__(self, settings, model, source, canvas):
        import tensorflow as tf

        self.source, self.canvas = source, canvas
        images = tf.TensorSpec((None, settings.image_size, settings.image_size, 3), tf.float32)
        self.logits = tf.function(lambda images: model(images, training=False), input_signature=[images])

    def judge(self):
        import numpy as np

        from moco_tf.transfer import mean_iou, segmenters, views

        classes = len(self.source.class_names)
        confusion, count, shown = np.zeros((classes, classes), np.int64), 0, []
        each = views.in_order(self.source, functools.partial(views.masked, self.canvas))
        for seen in views.groups(each.as_numpy_iterator(), JUDGED_AT_ONCE):
            for one, logits in zip(seen, self.logits(np.stack([one["image"] for one in seen])), strict=True):
                truth = one["truth"][..., 0]
                predicted = segmenters.of_own_size(logits, one["scaled"], truth.shape).numpy()
                confusion += mean_iou.confusions(truth, predicted, classes)
                count += 1
                if len(shown) < SHOWN:
                    shown.append((one["image"], one["mask"][..., 0], np.argmax(logits, axis=-1)))
        of_class = mean_iou.iou_of_classes(confusion)
        of_class = dict(zip(self.source.class_names, of_class.tolist(), strict=True))
        facts = {"eval_images": count, "iou_of_class": of_class}
        return {"miou": mean_iou.mean_iou(confusion)}, facts, shown

    def training(self, batch):
        return [(image, mask[..., 0], None) for image, mask in zip(batch["image"], batch["mask"], strict=True)][:SHOWN]

    def picture(self, path, shown):
        from moco_tf.transfer import pictures

        images, truth, found = zip(*shown, strict=True)
        pictures.masks(path, list(map(self.canvas.shown, images)), truth, found, self.source.class_names)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
