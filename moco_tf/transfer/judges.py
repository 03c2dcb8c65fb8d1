"""Judges detectors and segmenters on all images of a source, a few at a time; draws the first images."""

import functools

import numpy as np
import tensorflow as tf

from moco_tf.transfer import annotated_views, average_precision, mean_iou, pictures, retinanet, segmenters
from moco_tf.transfer.annotated_views import NOTHING

AT_ONCE = 8  # images
SHOWN, SHOWN_SCORE = 6, 0.3  # images in a picture; least score of a drawn box


class Judge:
    """Judges a model on all images of a source (see `running.train`). A subclass defines the following parts.

    `columns`: names of the columns that `results` returns. `view`: (canvas, record) -> a dict with an "image".
    `answer(images)`: the model's outputs, a tuple of tensors (N, ...). `begin()`. `add(one, answer)`: counts a view's
    answer, and returns what `draw` shows of the view, (truth, found). `results()`: ({column: percent}, further facts).
    `of_batch(batch)`: (images, truths) of a training batch. `draw(path, images, truths, found)`.
    """

    columns = ()
    view = None

    def __init__(self, settings, model, source, canvas):
        self.model, self.source, self.canvas = model, source, canvas
        shape = (None, settings.image_size, settings.image_size, 3)
        self._answer = tf.function(self.answer, input_signature=[tf.TensorSpec(shape, tf.float32)], autograph=False)

    def judge(self, path):
        """Returns ({column: percent}, further facts); draws the first images to a path."""
        self.begin()
        shown = []
        seen = annotated_views.in_order(self.source, functools.partial(type(self).view, self.canvas))
        for some in annotated_views.groups(seen.as_numpy_iterator(), AT_ONCE):
            answers = [part.numpy() for part in self._answer(np.stack([one["image"] for one in some]))]
            for one, *answer in zip(some, *answers, strict=True):
                drawn = self.add(one, answer)
                if len(shown) < SHOWN:
                    shown.append((self.canvas.shown(one["image"]), *drawn))
        self.draw(path, *zip(*shown, strict=True))
        return self.results()

    def draw_training(self, path, batch):
        """Draws the first images of a training batch."""
        images, truths = self.of_batch(batch)
        images = [self.canvas.shown(image) for image in images[:SHOWN]]
        self.draw(path, images, truths[:SHOWN], [None] * len(images))


class OfBoxes(Judge):
    """Judges a detector by COCO's average precision."""

    columns = ("ap", "ap50", "ap75", "ap50_any_class")
    view = annotated_views.boxed

    def answer(self, images):
        return retinanet.detect(self.model, images)

    def begin(self):
        self.truth, self.found = [], []

    def add(self, one, answer):
        boxes, scores, classes = (part[answer[2] != NOTHING] for part in answer)
        in_image = annotated_views.to_image(boxes, one["size"], one["scaled"]).numpy()
        self.truth.append((one["true_boxes"], one["true_classes"], one["crowds"]))
        self.found.append((in_image, scores, classes))
        good = scores >= SHOWN_SCORE
        return _objects(one["boxes"], one["classes"]), (boxes[good], scores[good], classes[good])

    def results(self):
        names = self.source.class_names
        result = average_precision.average_precision(self.truth, self.found, len(names))
        of_class = dict(zip(names, result.pop("ap_of_class").tolist(), strict=True))
        return result, {"eval_images": len(self.truth), "ap_of_class": of_class}

    def of_batch(self, batch):
        return batch["image"], list(map(_objects, batch["boxes"], batch["classes"]))

    def draw(self, path, images, truths, found):
        pictures.boxes(path, images, truths, found, self.source.class_names)


class OfMasks(Judge):
    """Judges a segmenter by mean intersection over union, at the images' own size."""

    columns = ("miou",)
    view = annotated_views.masked

    def answer(self, images):
        return (self.model(images, training=False),)

    def begin(self):
        classes = len(self.source.class_names)
        self.confusion, self.count = np.zeros((classes, classes), np.int64), 0

    def add(self, one, answer):
        truth, (logits,) = one["true_mask"][..., 0], answer
        predicted = segmenters.of_own_size(logits, one["scaled"], truth.shape).numpy()
        self.confusion += mean_iou.confusions(truth, predicted, len(self.confusion))
        self.count += 1
        return one["mask"][..., 0], np.argmax(logits, axis=-1)

    def results(self):
        of_class = dict(zip(self.source.class_names, mean_iou.iou_of_classes(self.confusion).tolist(), strict=True))
        return {"miou": mean_iou.mean_iou(self.confusion)}, {"eval_images": self.count, "iou_of_class": of_class}

    def of_batch(self, batch):
        return batch["image"], list(batch["mask"][..., 0])

    def draw(self, path, images, truths, found):
        pictures.masks(path, images, truths, found, self.source.class_names)


def _objects(boxes, classes):
    """Returns boxes and classes without padding and crowds."""
    return boxes[classes >= 0], classes[classes >= 0]
