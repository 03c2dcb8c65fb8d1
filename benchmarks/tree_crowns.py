"""Tree crowns in aerial photographs, a small detection set of real boxes, cut from the wheel of deepforest.

    pip download --no-deps deepforest==2.1.0
    python -m benchmarks.tree_crowns --wheel=deepforest-2.1.0-py3-none-any.whl --output=data/tree_crowns

Reads the wheel as a zip file and installs nothing. Writes square tiles that do not overlap, in COCO's layout
(images/<split>, annotations). The training tiles come from one photograph, the test tiles from three others, taken
elsewhere. Writes the training photograph once more as overlapping tiles without labels, unlabelled/*.png, for
pre-training.

A box is cut to the tile. A tile leaves out a box if it holds less than half of it. All photographs are annotated to
their edges (seen by eye; shrubs and fallen trunks are not trees), so tiles without boxes are backgrounds. The right
and lower edges of a photograph that are narrower than a tile are not used. The tiles of 128 pixels hold 491 of the 574
training crowns, 4 of them in two tiles, and 338 of the 377 test crowns, 2 of them in two tiles.

Source of the photographs: NEON (US National Ecological Observatory Network), 10 cm a pixel; of the boxes: Weinstein et
al., "Individual tree-crown detection in RGB imagery", Remote Sensing 2019.
"""

import dataclasses
import io
import sys
import xml.etree.ElementTree
import zipfile
from pathlib import Path

import numpy as np
from PIL import Image

from benchmarks import coco_files
from moco_tf import command, files
from moco_tf.command import ConfigError

PHOTOGRAPHS = {  # by split: names in the wheel, and how many boxes each has
    "train": {"2019_YELL_2_528000_4978000_image_crop2": 574},
    "test": {"2019_YELL_2_541000_4977000_image_crop": 279, "OSBS_029": 61, "SOAP_061": 37},
}
SHARE = 0.5  # a tile that holds less than this share of a box's area leaves the box out
CATEGORIES = {1: "tree"}  # SOAP_061 tells alive from dead trees; the others do not


@dataclasses.dataclass(frozen=True)
class Settings:
    wheel: str = command.flag("", "The wheel of deepforest 2.1.0.", path=True)
    output: str = command.flag("data/tree_crowns", "Folder to make.", path=True)
    tile: int = command.flag(128, "Side of a tile, in pixels.")
    stride: int = command.flag(64, "Pixels from one unlabelled tile to the next.")

    def __post_init__(self):
        command.check_values(self)
        command.require(self, Path(self.wheel).is_file(), "wheel", "names a file")
        command.require(self, not Path(self.output).exists(), "output", "names a folder that is not there yet")
        command.require(self, 0 < self.tile <= 400, "tile", "is more than 0 and at most 400, the smallest photograph")
        command.require(self, self.stride > 0, "stride", "is more than 0")


def main(arguments):
    """Runs the command; returns the process's exit status."""
    program = "benchmarks.tree_crowns"
    return command.run(program, __doc__, lambda words: make(command.parse(Settings, program, words)), arguments)


def make(settings):
    """Writes the set as the settings say and prints what is in it; returns the process's exit status."""
    try:
        with zipfile.ZipFile(settings.wheel) as wheel:
            photographs = {
                split: [read(wheel, *known) for known in PHOTOGRAPHS[split].items()] for split in PHOTOGRAPHS
            }
    except (zipfile.BadZipFile, KeyError) as error:
        raise ConfigError(f"--wheel={settings.wheel} is not the wheel of deepforest 2.1.0: {error}") from None
    with files.aside(settings.output) as folder:
        for split, known in photographs.items():
            pictures = [tile for photograph in known for tile in labelled_tiles(*photograph, settings.tile)]
            images, boxes = coco_files.write(folder, split, pictures, CATEGORIES)
            empty = sum(len(of_tile) == 0 for _, _, of_tile, _ in pictures)
            print(
                f"{split}: {images} tiles of {settings.tile} pixels, {empty} of them without boxes; {boxes} boxes, "
                f"parts of cut ones among them, from {sum(len(all_) for _, _, all_ in known)}"
            )
        (folder / "unlabelled").mkdir()
        (name, image, _), *_ = photographs["train"]
        tiles = corners(image.size, settings.tile, settings.stride)
        for left, top in tiles:
            cut(image, left, top, settings.tile).save(folder / f"unlabelled/{name}_{top:04}_{left:04}.png")
        print(f"unlabelled: {len(tiles)} tiles of the training photograph, one each {settings.stride} pixels")
    return 0


def read(wheel, name, number):
    """A photograph of the wheel, with exactly `number` boxes: (name, PIL image, boxes (B, 4) as x0, y0, x1, y1)."""
    image = Image.open(io.BytesIO(wheel.read(f"deepforest/data/{name}.png"))).convert("RGB")
    document = xml.etree.ElementTree.fromstring(wheel.read(f"deepforest/data/{name}.xml"))
    sides = ("xmin", "ymin", "xmax", "ymax")
    boxes = np.array([[float(box.find(side).text) for side in sides] for box in document.iter("bndbox")])
    if len(boxes) != number:
        raise ConfigError(f"{name} has {number} boxes in deepforest 2.1.0; got {len(boxes)}")
    return name, image, boxes


def corners(size, tile, stride):
    """(left, top) of all whole tiles of an image of size (width, height), row by row."""
    lefts, tops = (range(0, side - tile + 1, stride) for side in size)
    return [(left, top) for top in tops for left in lefts]


def cut(image, left, top, tile):
    return image.crop((left, top, left + tile, top + tile))


def labelled_tiles(name, image, boxes, tile):
    """A photograph's tiles, as `coco_files.write` takes them."""
    for left, top in corners(image.size, tile, tile):
        kept = boxes_in(boxes, left, top, tile)
        yield f"{name}_{top:04}_{left:04}", cut(image, left, top, tile), kept, [1] * len(kept)


def boxes_in(boxes, left, top, tile):
    """Keeps boxes (B, 4) as x0, y0, x1, y1 with at least SHARE in a tile, cut to it: (K, 4) as x, y, w, h there."""
    begin, end = (np.clip(corner - (left, top), 0, tile) for corner in (boxes[:, :2], boxes[:, 2:]))
    inside = np.prod(end - begin, axis=1) / np.prod(boxes[:, 2:] - boxes[:, :2], axis=1)
    return np.concatenate([begin, end - begin], axis=1)[inside >= SHARE]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
