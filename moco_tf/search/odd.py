"""`python -m moco_tf.search.odd --index=INDEX --output=DIR`: finds the images of an index that stand out.

Finds images that are far from all others, near-uniform, very dark or very small. Writes odd.csv (reason, path, value,
limit) and odd.html. Deletes and moves nothing.
"""

import dataclasses
import logging
import sys
from pathlib import Path

import numpy as np

from moco_tf import command, files
from moco_tf.command import ConfigError
from moco_tf.files import printable
from moco_tf.search import groups
from moco_tf.search import settings as common

SMALL = 4  # a side this many times shorter than the median is very small

log = logging.getLogger("moco_tf")


@dataclasses.dataclass(frozen=True)
class Settings:
    index: str = command.flag("", "Folder of the index.", path=True)
    output: str = command.flag("", "Folder for odd.csv and odd.html.", path=True)
    far: float = command.flag(
        0.0, "Cosine with its nearest below which an image is far from all others; 0: chosen from all such cosines."
    )
    uniform: float = command.flag(
        8.0, "Standard deviation of grey values, 0 to 255, below which an image is near-uniform."
    )
    dark: float = command.flag(20.0, "Mean of grey values, 0 to 255, below which an image is very dark.")
    small: int = command.flag(
        0, "Pixels of the shorter side below which an image is very small; 0: a quarter of the median."
    )
    shown: int = command.flag(100, "Images on the page for each reason; odd.csv has all.")

    def __post_init__(self):
        command.check_values(self)
        common.require_index(self.index)
        common.require_folder(self.output, "output")
        command.require(self, 0 <= self.far <= 1, "far", "is a cosine from 0, for a chosen one, to 1")
        for name in ("uniform", "dark"):
            command.require(self, 0 <= getattr(self, name) <= 255, name, "is 0 to 255")
        for name in ("small", "shown"):
            command.require(self, getattr(self, name) >= 0, name, "is 0 or more")


@dataclasses.dataclass(frozen=True)
class Reason:
    """A reason why images are odd: the value of each image, (N,), and the limit below which an image is odd.

    title: has {} in place of the limit's text.
    """

    name: str
    title: str
    values: np.ndarray
    limit: float
    digits: int

    @property
    def odd(self):
        """The numbers of the odd images, the oddest first."""
        numbers = np.flatnonzero(self.values < self.limit)
        return numbers[np.argsort(self.values[numbers], kind="stable")].tolist()

    def text(self, value):
        return f"{value:.{self.digits}f}"


def main(arguments):
    """Runs the command; returns the process's exit status."""
    return common.run("moco_tf.search.odd", __doc__, Settings, find, arguments)


def find(settings):
    """Writes the odd images that the settings describe."""
    from moco_tf.search import index
    from moco_tf.search.neighbours import nearest_others

    opened = index.read(settings.index)
    images = opened.part.images
    if len(images) < 2:
        raise ConfigError(f"--index={printable(settings.index)} has one image: there is nothing to compare it with")
    cosines, _ = nearest_others(opened, 1)
    reasons = why(settings, images, cosines[:, 0])
    output = Path(settings.output)
    files.make_folder(output)
    rows = [
        (reason.name, opened.path(number), reason.text(reason.values[number]), reason.text(reason.limit))
        for reason in reasons
        for number in reason.odd
    ]
    files.write_csv(output / "odd.csv", ("reason", "path", "value", "limit"), rows)
    _write_page(output / "odd.html", opened, reasons, settings.shown)
    counts = ", ".join(f"{reason.name} {len(reason.odd)} (below {reason.text(reason.limit)})" for reason in reasons)
    log.info(f"Of {len(images)} images: {counts}; {printable(output / 'odd.html')}")


def why(settings, images, nearest):
    """Returns the `Reason`s for which images of a list of `parts.Image` may be odd.

    nearest: (N,) cosines of each image with the nearest other image.
    """
    far = settings.far or groups.far_threshold(nearest)
    contrasts, lights = (
        np.array([image.contrast for image in images]),
        np.array([image.brightness for image in images]),
    )
    sides = np.array([min(image.height, image.width) for image in images])
    small = settings.small or np.median(sides) / SMALL
    return [
        Reason("far", "Far from all others: cosine with the nearest below {}", nearest, far, 4),
        Reason("uniform", "Near-uniform: spread of grey values below {}", contrasts, settings.uniform, 1),
        Reason("dark", "Very dark: mean of grey values below {}", lights, settings.dark, 1),
        Reason("small", "Very small: shorter side below {} pixels", sides, small, 0),
    ]


def _write_page(path, opened, reasons, shown):
    from moco_tf.evaluate import page
    from moco_tf.search import pages

    body = [
        f'<p class="note">{len(opened.part.images)} images in {page.text(opened.about.images)}. odd.csv lists all '
        "that are odd; nothing was deleted or moved.</p>"
    ]
    for reason in reasons:
        numbers = reason.odd
        body.append(f"<h2>{page.text(reason.title.format(reason.text(reason.limit)))}: {len(numbers)}</h2>")
        figures = []
        for number in numbers[:shown]:
            image = opened.part.images[number]
            lines = [f"{reason.name} {reason.text(reason.values[number])}", *pages.facts(image)]
            figures.append(pages.figure(opened.path(number), image.path, lines))
        body.append(pages.row(figures))
        if len(numbers) > shown:
            body.append(f'<p class="note">{len(numbers) - shown} more are in odd.csv.</p>')
    page.write(path, "Images that stand out", body)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
