"""`python -m moco_tf.transfer.export --run_dir=RUN --output=DIR`: exports a detector or segmenter as a SavedModel.

RUN is a folder that moco_tf.transfer.detect or segment wrote. DIR/<version>/ has two signatures: `serving_default`
(`images`: uint8 (N, H, W, 3), any H and W) and `encoded_images` (`images`: string (N,), each of its own size). If an
encoded image cannot be decoded, the batch fails with an error that names the image's index.

A detector returns `boxes` float32 (N, 100, 4): left, top, right, bottom in pixels of the sent image, `scores` float32
(N, 100), best first, and `classes` int64 (N, 100), -1 after the last found box. A segmenter's serving_default returns
`classes` int64 (N, H, W). Its encoded_images returns `classes` int64 (N, S, S) of a canvas of S with the image in the
upper left, scaled to `size` int64 (N, 2), height and width. transfer.json names the classes.
"""

import dataclasses
import sys
from pathlib import Path

from moco_tf import command, files
from moco_tf.command import ConfigError
from moco_tf.serving import settings as common
from moco_tf.startup import load_tensorflow

DESCRIPTION = "transfer.json"  # beside the graph: the meaning of its numbers


@dataclasses.dataclass(frozen=True)
class Settings:
    run_dir: str = command.flag("", "The folder of results of moco_tf.transfer.detect or segment.", path=True)
    output: str = command.flag("", "Folder to write the version to, as TF Serving reads it.", path=True)
    version: int = command.flag(0, "Number of the version's folder; 0: the next one.")
    request_megapixels: float = common.request_flag()

    def __post_init__(self):
        command.check_values(self)
        for name in ("run_dir", "output"):
            if not getattr(self, name):
                raise ConfigError(f"--{name} has no default: name a folder")
        command.require(self, self.version >= 0, "version", "is 0 or more")
        common.require_request(self)


def main(arguments):
    """Runs the command; returns the process's exit status."""
    command.log_to_screen()
    return command.run("moco_tf.transfer.export", __doc__, _export, arguments)


def _export(arguments):
    settings = command.parse(Settings, "moco_tf.transfer.export", arguments)
    kind, recorded = _of_run(settings.run_dir)
    load_tensorflow()
    import keras
    import tensorflow as tf

    from moco_tf.serving import saved_model, warm_up
    from moco_tf.transfer import annotated_views, running

    names = running.classes(settings.run_dir)
    model, inputs, step = _trained(kind, recorded, len(names))
    canvas = annotated_views.Canvas(inputs, recorded.image_size, recorded.ENLARGE)
    answers = (_detector if recorded.NAME == "detect" else _segmenter)(model, canvas, settings.request_megapixels)
    path = saved_model.version_to_write(settings.output, settings.version)
    example = tf.zeros((1, recorded.image_size, recorded.image_size, 3), tf.uint8)
    examples = {"serving_default": example.numpy(), "encoded_images": [tf.io.encode_png(example[0]).numpy()]}
    with saved_model.aside(path) as folder:
        archive = keras.export.ExportArchive()  # keeps the variables that its endpoints read
        for name, (answer, spec) in answers.items():
            archive.add_endpoint(name, answer, [spec])
        archive.write_out(files.for_tensorflow(folder), verbose=False)
        about = {"kind": recorded.NAME, "classes": names, "canvas": recorded.image_size, "steps": step}
        files.write_json(folder / DESCRIPTION, about | {"input": dataclasses.asdict(inputs)})
        warm_up.write(folder, [(name, {"images": value}) for name, value in examples.items()])
    about = f"{recorded.NAME}, {len(names)} classes, step {step}; signatures {', '.join(answers)}"
    print(f"{files.printable(path)}: {about}")
    return 0


def _of_run(run_dir):
    """Returns the module of the command that made a folder, and the command's settings."""
    from moco_tf import run_folder
    from moco_tf.transfer import detect, segment

    refusals = []
    for module in (detect, segment):
        try:
            recorded = run_folder.recorded(run_dir, module.Settings.read)
        except ConfigError as error:  # these are flags of the other command, or of no command
            refusals.append(str(error))
            continue
        if recorded is not None:
            return module, dataclasses.replace(recorded, output=str(run_dir))
    raise ConfigError(
        f"--run_dir={run_dir} must be a folder of moco_tf.transfer.detect or segment; "
        + ("; ".join(refusals) or "it has no config.flags")
    )


def _trained(kind, recorded, classes):
    """Returns the network of a run's last checkpoint, its input format and its step."""
    from moco_tf.transfer import learning

    model, inputs = kind.network(recorded, classes, start=False)
    step = learning.restore(Path(recorded.output), learning.Learner(model, kind.loss(), recorded))
    if step is None:
        raise ConfigError(f"{recorded.output} has no checkpoint yet: let the training reach one")
    return model, inputs, step


def _detector(model, canvas, request_megapixels):
    """Returns {signature: (function, spec of its argument)} of a detector."""
    from moco_tf.transfer import annotated_views, retinanet

    def answer(on_canvas, sizes, scaled):
        boxes, scores, classes = retinanet.detect(model, on_canvas)
        return {"boxes": annotated_views.to_image(boxes, sizes, scaled), "scores": scores, "classes": classes}

    return _signatures(canvas, request_megapixels, answer, answer)


def _segmenter(model, canvas, request_megapixels):
    """Returns what `_detector` returns, for a segmenter."""
    import tensorflow as tf

    from moco_tf.transfer import segmenters

    def of_one_size(on_canvas, sizes, scaled):
        own = lambda logits: segmenters.of_own_size(logits, scaled[0], sizes[0])  # noqa: E731
        return {"classes": tf.map_fn(own, model(on_canvas, training=False), fn_output_signature=tf.int64)}

    def on_the_canvas(on_canvas, sizes, scaled):
        classes = tf.argmax(model(on_canvas, training=False), axis=-1)
        return {"classes": classes, "size": tf.cast(scaled, tf.int64)}

    return _signatures(canvas, request_megapixels, of_one_size, on_the_canvas)


def _signatures(canvas, request_megapixels, of_one_size, of_own_sizes):
    """Makes the signatures from functions of images on a canvas (N, S, S, 3), their sizes and scaled sizes (N, 2)."""
    import tensorflow as tf

    from moco_tf.data import encoded_batch

    pair = tf.TensorSpec((2,), tf.int32)
    laid = (tf.TensorSpec((canvas.size, canvas.size, 3), tf.float32), pair, pair)

    def lay(image):
        size = tf.shape(image)[:2]
        place = canvas.place(*tf.unstack(size))
        return canvas.image(image, place), size, place[0]

    def of_images(images):
        return of_one_size(*tf.map_fn(lay, images, fn_output_signature=laid))

    def of_encoded(images):
        parts, valid = encoded_batch.views(images, lay, laid, request_megapixels)
        with tf.control_dependencies([encoded_batch.all_valid(valid)]):
            return of_own_sizes(*map(tf.identity, parts))

    return {
        "serving_default": (of_images, tf.TensorSpec((None, None, None, 3), tf.uint8, "images")),
        "encoded_images": (of_encoded, tf.TensorSpec((None,), tf.string, "images")),
    }


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
