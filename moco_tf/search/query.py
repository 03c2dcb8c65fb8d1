"""`python -m moco_tf.search.query --index=INDEX --image=FILE`: finds the most similar images in an index.

Prints cosines and paths, the nearest first. For a folder of images, writes a CSV (query, rank, path, cosine). --html
writes a page that contains thumbnails.
"""

import dataclasses
import logging
import sys
from pathlib import Path

from moco_tf import command, files
from moco_tf.command import ConfigError
from moco_tf.data import archive
from moco_tf.files import printable
from moco_tf.search import settings as common

SHOWN = 100  # queries on a page; the CSV has all
BLOCK = 5000  # queries encoded at a time

log = logging.getLogger("moco_tf")


@dataclasses.dataclass(frozen=True)
class Settings:
    index: str = command.flag("", "Folder of the index.", path=True)
    image: str = command.flag("", "An image, or a folder or archive (.zip, .tar) of images at any depth.", path=True)
    k: int = command.flag(20, "Images to find for each.")
    encoder: str = command.flag("", "The index's encoder, where it has moved. '': where it was.", path=True)
    csv: str = command.flag(
        "", "CSV to write. '': none for a file; for a folder neighbours.csv in the folder of the index.", path=True
    )
    html: str = command.flag("", "Page to write, with thumbnails.", path=True)

    def __post_init__(self):
        command.check_values(self)
        common.require_index(self.index)
        command.require(self, self.k > 0, "k", "is more than 0")
        if not self.image:
            raise ConfigError("--image=FILE names an image, or a folder of images")
        try:
            is_there = archive.is_file(self.image) or archive.is_dir(self.image)  # reading a pipe would wait forever
        except ValueError as error:
            raise ConfigError(f"--image={printable(self.image)}: {error}") from None
        if not is_there:
            raise ConfigError(f"--image={printable(self.image)} is neither a file nor a folder")


def main(arguments):
    """Runs the command; returns the process's exit status."""
    return common.run("moco_tf.search.query", __doc__, Settings, query, arguments)


def query(settings):
    """Finds the neighbours that the settings ask for, and prints or writes them."""
    from moco_tf.search import encode, index

    opened = index.read(settings.index)
    about = opened.about
    if not settings.encoder:
        if about.encoder.resolve().is_relative_to(Path(settings.index).resolve()):  # an encoder is a program
            raise ConfigError(
                f"--index={printable(settings.index)} names an encoder inside of itself, {printable(about.encoder)}: "
                "if you trust who made it, give it by --encoder"
            )
        # Not on stdout, which has the answers alone.
        print(f"Encoder: {printable(about.encoder)}, as {printable(settings.index)} says.", file=sys.stderr)
    encoder = encode.open_encoder(dataclasses.replace(settings, encoder=settings.encoder or str(about.encoder)))
    if encoder.identity != about.identity:
        raise ConfigError(
            f"--index={printable(settings.index)} is of another encoder than what is now in "
            f"{printable(settings.encoder or about.encoder)}: give the index's by --encoder, or build a new index"
        )
    function = encode.function(encoder, about.on)
    root, answers = Path(settings.image), []
    for listing in _listings(root, encoder.preprocessing.channels):
        images, broken, vectors = encode.encode_listing(function, encoder.preprocessing, listing)
        for file in broken:
            log.warning(f"Cannot be decoded: {printable(listing.path / file.path)} ({printable(file.problem)})")
        if len(images):
            cosines, numbers = opened.search(vectors, settings.k)
            answers += [
                (listing.path / image.path, [(int(n), float(c)) for n, c in zip(*near, strict=True) if n >= 0])
                for image, *near in zip(images, numbers, cosines, strict=True)
            ]
    if not answers:
        raise ConfigError(f"--image={printable(root)}: no image that can be decoded")
    _write(settings, opened, answers)


def _listings(path, channels):
    """Returns the listings of a file or of a folder's images, in blocks; channels: how many to read of each image."""
    import numpy as np

    from moco_tf.data import folder

    if archive.is_dir(path):
        try:
            listing = folder.scan(path, ".", channels=channels)
        except ValueError as error:
            raise ConfigError(f"--image={printable(path)}: {printable(error)}") from None
    else:
        status = archive.stat(path)
        sizes, times = np.array([status.st_size]), np.array([archive.time_of(status)])
        besides = folder.Besides()
        listing = folder.Listing(path.parent, (), [path.name], sizes, times, besides, path.parent, channels=channels)
    return folder.divided(listing, range(listing.size), BLOCK)


def _write(settings, opened, answers):
    """answers: for each query its path and a list of (number of an image, cosine)."""
    is_folder = archive.is_dir(settings.image)
    if not is_folder:
        for number, cosine in answers[0][1]:
            print(f"{cosine:.4f}  {printable(opened.path(number))}")
    table = settings.csv or (is_folder and str(Path(settings.index) / "neighbours.csv"))
    if table:
        rows = [
            (path, rank, opened.path(number), f"{cosine:.4f}")
            for path, near in answers
            for rank, (number, cosine) in enumerate(near, 1)
        ]
        files.write_csv(table, ("query", "rank", "path", "cosine"), rows)
        log.info(f"{len(answers)} queries: {printable(table)}")
    if settings.html:
        _write_page(settings.html, opened, answers)
        log.info(f"Page: {printable(settings.html)}")


def _write_page(path, opened, answers):
    from moco_tf.evaluate import page
    from moco_tf.search import pages

    body = [f'<p class="note">By cosine, the nearest first, of {len(opened.part.images)} images in '
            f"{page.text(opened.about.images)}.</p>"]  # fmt: skip
    if len(answers) > SHOWN:
        body.append(f'<p class="note">The first {SHOWN} of {len(answers)} queries.</p>')
    for query, near in answers[:SHOWN]:
        figures = [pages.figure(query, query.name, [], "looked for", "query")]
        for number, cosine in near:
            image = opened.part.images[number]
            figures.append(
                pages.figure(opened.path(number), image.path, [f"cosine {cosine:.3f}", *pages.facts(image)])
            )
        body.append(pages.row(figures))
    name = answers[0][0].name if len(answers) == 1 else f"{len(answers)} images"
    page.write(path, f"What looks like {name}", body)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
