"""Synthetic composite scenes for detection and segmentation: CIFAR-10's images pasted on crops of photographs.

    pip install scikit-image scikit-learn
    python -m benchmarks.composite_scenes --output=data/composite

A scene of 96 pixels has one to three objects, which are squares of side 24 to 40 with a soft rim. The squares are its
boxes; their pixels that are more than half opaque are its mask. Writes images/<split>, masks/<split> (PNGs of class
numbers, 0 the background) and COCO's annotations. Everything is a function of --seed; scene number k does not depend
on the number of scenes.

Rules that keep the set honest:
1. Training scenes have CIFAR's training images, test scenes its test images; no photograph is in both splits.
2. There are as many distractors as objects. Distractors are patches of other photographs, with about the objects'
   contrast. They are shrunk to 32 pixels and compressed as the objects are, then pasted by the same lines. The squares
   are drawn first, and then which of them are objects. So neither seam nor size tells objects from distractors, and
   brightness, contrast and blur hardly do.
3. Scales and brightness vary.
4. Squares hide at most a tenth of each other, and all boxes stay. Later squares lie on top, also in the mask.

This set compares initialisations of one network. It says nothing about real scenes: never quote it beside VOC or COCO.
"""

import dataclasses
import importlib.resources
import io
import sys
import time
from pathlib import Path

import numpy as np
from PIL import Image, JpegImagePlugin

from benchmarks import coco_files
from moco_tf import command, files
from moco_tf.command import ConfigError
from moco_tf.startup import load_tensorflow

SIDE, SIDES, MOST, RIM = 96, (24, 40), 3, 4  # side of a scene; sides of squares; most objects; pixels of a rim's fade
HIDDEN = 0.1  # the largest share of a square's area that may lie under another square
SPLITS = ("train", "test")
PHOTOGRAPHS = {  # package, file. scikit-image's cat is left out: CIFAR-10 has cats
    "train": (
        ("sklearn.datasets.images", "china.jpg"),
        ("sklearn.datasets.images", "flower.jpg"),
        ("skimage.data", "coffee.png"),
        ("skimage.data", "ihc.png"),
    ),
    "test": (
        ("skimage.data", "astronaut.png"),
        ("skimage.data", "motorcycle_left.png"),
        ("skimage.data", "rocket.jpg"),
    ),
}


@dataclasses.dataclass(frozen=True)
class Settings:
    output: str = command.flag("data/composite", "Folder to make.", path=True)
    cifar: str = command.flag("", "CIFAR-10 as <split>/<class>/<image>; '': the packaged 12,000 images.", path=True)
    train: int = command.flag(1000, "Number of training scenes.")
    test: int = command.flag(300, "Number of test scenes.")
    seed: int = command.flag(0, "Seed of all that is drawn.")

    def __post_init__(self):
        command.check_values(self)
        command.require(self, not Path(self.output).exists(), "output", "names a folder that is not there yet")
        for name in SPLITS:
            command.require(self, getattr(self, name) > 0, name, "is more than 0")
        command.require(self, self.seed >= 0, "seed", "is 0 or more")


@dataclasses.dataclass(frozen=True)
class Scene:
    image: np.ndarray  # uint8 (SIDE, SIDE, 3)
    mask: np.ndarray  # uint8 (SIDE, SIDE), class numbers
    squares: np.ndarray  # (P, 3): left, top, side of the pasted squares, in the order of pasting
    labels: np.ndarray  # (P,), class numbers; 0: a distractor


def main(arguments):
    """Runs the command; returns the process's exit status."""
    program = "benchmarks.composite_scenes"
    return command.run(program, __doc__, lambda words: make(command.parse(Settings, program, words)), arguments)


def make(settings):
    """Writes the set as the settings say and prints what is in it; returns the process's exit status."""
    begun = time.monotonic()
    with files.aside(settings.output) as folder:
        for split in SPLITS:
            (folder / "masks" / split).mkdir(parents=True)
            classes, made = scenes(settings, split)
            categories = dict(enumerate(classes, 1))
            images, boxes = coco_files.write(folder, split, _with_masks(made, folder / "masks" / split), categories)
            print(f"{split}: {images} scenes, {boxes} objects and as many distractors")
    print(f"{settings.output}: {time.monotonic() - begun:.0f} s")
    return 0


def _with_masks(made, folder):
    """Yields scenes as `coco_files.write` takes them, and writes their masks."""
    for number, scene in enumerate(made):
        name = f"{number:05}"
        Image.fromarray(scene.mask).save(folder / f"{name}.png")
        boxes = scene.squares[scene.labels > 0][:, (0, 1, 2, 2)]
        yield name, Image.fromarray(scene.image), boxes, scene.labels[scene.labels > 0]


def scenes(settings, split):
    """Returns (names of the classes, an iterator over the scenes of a split)."""
    classes, contents, labels = labelled_images(settings.cifar, split)
    backgrounds = photographs(split)
    key = (settings.seed, SPLITS.index(split))
    order = np.random.default_rng(key).permutation(len(contents))  # each image is used once before any is used again

    def made():
        for number in range(getattr(settings, split)):
            chosen = order[np.arange(number * MOST, (number + 1) * MOST) % len(order)]
            objects = [(Image.open(io.BytesIO(contents[i])), labels[i] + 1) for i in chosen]
            yield scene(np.random.default_rng((*key, number)), objects, backgrounds)

    return classes, made()


def labelled_images(cifar, split):
    """(names of the classes, encoded images, labels (N,) from 0) of CIFAR-10, or of its packaged part."""
    if not cifar:
        load_tensorflow()
        from moco_tf.data import sources

        source = sources.embedded(split)
        return source.class_names, source.contents.numpy(), source.labels.numpy()
    paths = sorted(Path(cifar, split).glob("*/*.*"))
    if not paths:
        raise ConfigError(f"--cifar={cifar} has no images in {split}/<class>")
    classes = sorted({path.parent.name for path in paths})
    labels = np.array([classes.index(path.parent.name) for path in paths])
    return classes, [path.read_bytes() for path in paths], labels


def photographs(split):
    """The photographs of a split, PIL images."""
    try:
        places = [importlib.resources.files(package) / name for package, name in PHOTOGRAPHS[split]]
    except ModuleNotFoundError as error:
        raise ConfigError(f"the backgrounds need scikit-image and scikit-learn: pip install them ({error})") from None
    return [Image.open(io.BytesIO(place.read_bytes())).convert("RGB") for place in places]


def scene(rng, objects, backgrounds):
    """Makes a `Scene`.

    objects: MOST pairs (PIL image, class number), of which one to all are used.
    """
    number = rng.integers(1, MOST + 1)
    squares = layout(rng, 2 * number)
    labels = rng.permutation([label for _, label in objects[:number]] + [0] * number)
    own, *others = (backgrounds[i] for i in rng.permutation(len(backgrounds)))
    canvas = brightened(rng, crop(rng, own, (SIDE, 2 * SIDE), SIDE))
    mask = np.zeros((SIDE, SIDE), np.uint8)
    waiting = {label: [] for label in labels}
    for image, label in objects[:number]:
        waiting[label].append(image)
        waiting[0].append(distractor(rng, others, image))
    for (left, top, side), label in zip(squares, labels, strict=True):
        image, alpha = waiting[label].pop().convert("RGB"), opacity(side)
        place = np.s_[top : top + side, left : left + side]
        pasted = brightened(rng, image.resize((side, side), Image.Resampling.BICUBIC))
        canvas[place] += alpha[..., None] * (pasted - canvas[place])
        mask[place][alpha > 0.5] = label
    return Scene(np.clip(canvas, 0, 255).round().astype(np.uint8), mask, squares, labels)


def layout(rng, number):
    """Draws `number` squares, each of which hides at most HIDDEN of any other: (number, 3) as left, top, side."""
    while True:  # begins again if no place is left for a square
        squares = np.empty((0, 3), int)
        for side in rng.integers(SIDES[0], SIDES[1] + 1, number):
            corners = rng.integers(0, SIDE - side + 1, (200, 2))
            free = corners[(hidden(squares, corners, side) <= HIDDEN).all(axis=1)]
            if not len(free):
                break
            squares = np.concatenate([squares, [[*free[0], side]]])
        else:
            return squares


def hidden(squares, corners, side):
    """Overlaps of squares (P, 3) with squares of a side at corners (T, 2), as shares of the smaller area: (T, P)."""
    corners = corners[:, None]
    begin = np.maximum(squares[:, :2], corners)
    end = np.minimum(squares[:, :2] + squares[:, 2:], corners + side)
    return np.prod(np.maximum(end - begin, 0), axis=2) / np.minimum(squares[:, 2], side) ** 2


def opacity(side):
    """Alpha of a pasted square (side, side): 1, which falls to 0 over the RIM pixels at each edge."""
    pixels = np.arange(side) + 0.5
    fade = np.clip(np.minimum(pixels, side - pixels) / RIM, 0, 1)
    return np.minimum(fade[:, None], fade)


def distractor(rng, photographs, image):
    """Draws a few 32 x 32 patches of photographs; returns the nearest to an image in contrast, compressed like it."""
    patches = [crop(rng, photographs[rng.integers(len(photographs))], (64, 384), 32) for _ in range(8)]
    return compressed_as(image, min(patches, key=lambda patch: abs(contrast(patch) - contrast(image))))


def contrast(image):
    """The standard deviation of an image's luminance."""
    return np.asarray(image.convert("L")).std()


def crop(rng, photograph, sides, size):
    """A random square of a photograph, its side between `sides` pixels, as a PIL image of size x size."""
    side = round(np.exp(rng.uniform(*np.log(sides))))
    left, top = rng.integers(0, np.subtract(photograph.size, side) + 1)
    return photograph.resize((size, size), Image.Resampling.BICUBIC, box=(left, top, left + side, top + side))


def compressed_as(image, other):
    """Returns `other` with the JPEG compression of an image's file, or unchanged if that file is not a JPEG."""
    if image.format != "JPEG":
        return other
    file = io.BytesIO()
    other.save(file, "JPEG", qtables=image.quantization, subsampling=JpegImagePlugin.get_sampling(image))
    return Image.open(file)


def brightened(rng, image):
    """An image's pixels, float (H, W, 3), times a random brightness."""
    return np.asarray(image, np.float32) * rng.uniform(0.6, 1.4)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
