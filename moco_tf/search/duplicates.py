"""`python -m moco_tf.search.duplicates --index=INDEX --output=DIR`: groups of images that are nearly the same.

Two images are near-duplicates if their cosine reaches a threshold. The command chooses the threshold from the cosines
of nearest images, or the user gives it. Pairs of near-duplicates connect images to groups. Writes duplicates.csv and
duplicates.html. Deletes and moves nothing.
"""

import dataclasses
import hashlib
import logging
import sys
from pathlib import Path

import numpy as np

from moco_tf import command, files
from moco_tf.command import ConfigError
from moco_tf.files import printable
from moco_tf.search import groups
from moco_tf.search import settings as common

NEIGHBOURS = 16  # neighbours of each image that are compared with the threshold; groups may be larger
SHOWN_OF_GROUP = 24  # images of a group on the page

log = logging.getLogger("moco_tf")


@dataclasses.dataclass(frozen=True)
class Settings:
    index: str = command.flag("", "Folder of the index.", path=True)
    output: str = command.flag("", "Folder for duplicates.csv and duplicates.html.", path=True)
    threshold: float = command.flag(
        0.0, "Cosine from which two images are near-duplicates, up to 1; 0: chosen from the cosines of nearest images."
    )
    shown: int = command.flag(500, "Images on the page; duplicates.csv has all.")

    def __post_init__(self):
        command.check_values(self)
        common.require_index(self.index)
        common.require_folder(self.output, "output")
        command.require(self, 0 <= self.threshold <= 1, "threshold", "is a cosine from 0, for a chosen one, to 1")
        command.require(self, self.shown >= 0, "shown", "is 0 or more")


@dataclasses.dataclass(frozen=True)
class Member:
    """An image of a group.

    Attributes:
      number: in the index; cosine: the highest cosine with another image of the group.
      same_bytes_as, same_pixels_as: the number of the first image of the group that is equal to it; None: it is itself
        the first one, or no image is equal.
    """

    number: int
    cosine: float
    same_bytes_as: int | None = None
    same_pixels_as: int | None = None


def main(arguments):
    """Runs the command; returns the process's exit status."""
    return common.run("moco_tf.search.duplicates", __doc__, Settings, find, arguments)


def find(settings):
    """Writes the groups that the settings describe."""
    from moco_tf.search import index
    from moco_tf.search.neighbours import nearest_others

    opened = index.read(settings.index)
    count = len(opened.part.images)
    if count < 2:
        raise ConfigError(f"--index={printable(settings.index)} has one image: there is nothing to compare it with")
    cosines, numbers = nearest_others(opened, NEIGHBOURS)
    threshold, said = settings.threshold, "given"
    if not threshold:
        threshold = groups.near_threshold(cosines[:, 0])
        said = f"chosen from the cosines of nearest images, whose median is {np.median(cosines[:, 0]):.4f}"
    said = f"cosine {threshold:.4f}, {said}"
    log.info(f"Threshold: {said}.")
    found = grouped(pairs(cosines, numbers, threshold, opened.part.vectors))
    found = [_with_copies(group, opened) for group in found]

    output = Path(settings.output)
    files.make_folder(output)
    where = lambda number: "" if number is None else opened.path(number)  # noqa: E731
    rows = [
        (number, where(m.number), f"{m.cosine:.4f}", where(m.same_bytes_as), where(m.same_pixels_as))
        for number, group in enumerate(found, 1)
        for m in group
    ]
    columns = ("group", "path", "cosine", "same_bytes_as", "same_pixels_as")
    files.write_csv(output / "duplicates.csv", columns, rows)
    page = output / "duplicates.html"
    _write_page(page, opened, found, said, settings.shown)
    same_bytes, same_pixels = (sum(1 for row in rows if row[place]) for place in (3, 4))
    log.info(
        f"{len(rows)} of {count} images in {len(found)} groups; exact copies: {same_bytes} of the same bytes, "
        f"{same_pixels} of the same pixels in other bytes: {printable(page)}"
    )


def pairs(cosines, numbers, threshold, vectors):
    """Yields (number, other number, cosine) of the images whose cosine reaches the threshold.

    Args:
      cosines, numbers: of the nearest other images, (N, k).
      vectors: float16 (N, D); equal vectors are always pairs, as an image with many copies has only k neighbours.
    """
    for one, place in zip(*np.nonzero((cosines >= threshold) & (numbers >= 0)), strict=True):
        yield int(one), int(numbers[one, place]), float(cosines[one, place])
    first = {}
    for number, vector in enumerate(vectors):
        other = first.setdefault(hashlib.blake2b(vector.tobytes(), digest_size=16).digest(), number)
        if other != number:
            yield other, number, 1.0


def grouped(pairs):
    """Returns groups of `Member`, the groups with the highest cosines first."""
    pairs, best = list(pairs), {}
    for one, other, cosine in pairs:
        for number in (one, other):
            best[number] = max(best.get(number, -1.0), min(cosine, 1.0))
    found = [[Member(n, best[n]) for n in group] for group in groups.connected((a, b) for a, b, _ in pairs)]
    return sorted(found, key=lambda group: (-max(member.cosine for member in group), group[0].number))


def _with_copies(group, opened):
    """Returns the group with its copies marked, equal to the byte or to the pixel; compares the files as they are now.

    Reads only images that are as near to one another as copies.
    """
    from moco_tf.search.copies import copies

    near = [member.number for member in group if member.cosine >= groups.HIGHEST]
    number = lambda place: None if place is None else near[place]  # noqa: E731
    alike = dict(zip(near, copies([opened.path(number) for number in near]), strict=True))
    return [
        dataclasses.replace(member, same_bytes_as=number(of_bytes), same_pixels_as=number(of_pixels))
        for member in group
        for of_bytes, of_pixels in [alike.get(member.number, (None, None))]
    ]


def _write_page(path, opened, found, threshold, shown):
    from moco_tf.evaluate import page
    from moco_tf.search import pages

    total = sum(map(len, found))
    body = [
        f'<p class="note">{total} of {len(opened.part.images)} images in {page.text(opened.about.images)} are in '
        f"{len(found)} groups. Threshold: {page.text(threshold)}. duplicates.csv lists all; nothing was deleted or "
        "moved.</p>"
    ]
    for number, group in enumerate(found, 1):
        if shown <= 0:
            body.append(f'<p class="note">{len(found) - number + 1} more groups are in duplicates.csv.</p>')
            break
        some = group[: min(shown, SHOWN_OF_GROUP)]
        shown -= len(some)
        body.append(f"<h2>Group {number}: {len(group)} images</h2>")
        figures = []
        for member in some:
            image = opened.part.images[member.number]
            mark = ""
            if member.same_bytes_as is not None:
                mark = f"same bytes as {opened.part.images[member.same_bytes_as].path}"
            elif member.same_pixels_as is not None:
                mark = f"same pixels as {opened.part.images[member.same_pixels_as].path}"
            lines = [f"cosine {member.cosine:.4f}", *pages.facts(image)]
            figures.append(pages.figure(opened.path(member.number), image.path, lines, mark))
        body.append(pages.row(figures))
        if len(some) < len(group):
            body.append(f'<p class="note">{len(group) - len(some)} more are in duplicates.csv.</p>')
    if not found:
        body.append("<p>No two images are as near as that.</p>")
    page.write(path, "Near-duplicates", body)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
