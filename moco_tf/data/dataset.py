"""The data that --dataset and a split name: `find` lists the files, `Split.open` checks them."""

import dataclasses
import logging

from moco_tf.command import ConfigError
from moco_tf.data import archive, folder, path_list, several_folders, sources, texts, tfds
from moco_tf.data.check import remarks
from moco_tf.data.folder import OF_IMAGES
from moco_tf.data.manifest import check_files, too_many_bad
from moco_tf.files import expanded

log = logging.getLogger("moco_tf")


@dataclasses.dataclass(frozen=True)
class Split:
    """A split of a data set that is there: the `listing` of a folder's files, or a `source` that is open already."""

    dataset: str  # as the flag has it
    max_bad_fraction: float
    listing: folder.Listing | None = None
    source: sources.Source | tfds.Prepared | None = None
    exif: bool = False  # whether images are turned as EXIF says

    @property
    def size(self):
        return (self.listing or self.source).size

    def open(self, manifest=None, begun=False, writes=True):
        """Returns the source; checks the files of a folder that the manifest does not know, and says what it finds.

        begun: whether a run is under way; its images are those that the manifest names.
        writes: whether to write the manifest.

        Raises:
          ConfigError: no image, or too few of them, can be decoded.
        """
        if self.listing is None:
            return self.source
        if not begun:
            _say(self.listing)
        checked = check_files(self.listing, manifest, begun, writes)
        if begun:  # the run keeps its images, which the manifest names
            _say(checked.listing)
        try:
            source = checked.source(self.exif)
        except ValueError as error:
            raise ConfigError(f"--dataset={self.dataset}: {error}") from error
        _report(checked, self.exif)
        if refusal := too_many_bad(checked.bad, source.size, self.max_bad_fraction):
            raise ConfigError(refusal)
        return source


def find(dataset, data_dir, split, max_bad_fraction, begun=False, exif=False, channels=3):
    """Finds the data for --dataset, --data_dir and a split; returns a `Split`.

    begun: whether a run is under way (see `folder.scan`).
    exif: whether images are turned as EXIF says.
    channels: how many channels the images are read with; it decides which files are images (`folder.suffixes`).

    Raises:
      ConfigError: there is no such data set or split.
    """
    try:
        if listing := _listing(dataset, data_dir, split, begun, channels):
            return Split(dataset, max_bad_fraction, listing=listing, exif=exif)
        source = _source(dataset, data_dir, split, max_bad_fraction)
    except ValueError as error:
        raise ConfigError(f"--dataset={dataset}: {error}") from error
    if channels not in OF_IMAGES and source.unit == "images":
        raise ConfigError(
            f"--channels={channels} reads .npy files in a folder, or that a file lists; {source.name} holds images, "
            "which have --channels=3, or 1 for grey"
        )
    if exif:
        raise ConfigError(f"--exif turns images that are files; {source.name} holds none: leave it out")
    return Split(dataset, max_bad_fraction, source=source)


def _listing(dataset, data_dir, split, begun, channels):
    """Returns the `folder.Listing` of a data set of image files, or None for any other."""
    path = expanded(data_dir, dataset)
    if dataset == "embedded":
        return None
    if several_folders.are_meant(dataset, data_dir):
        return several_folders.scan(dataset, data_dir, split, begun, channels)
    if path_list.is_at(path, channels):
        return path_list.read(path, split, begun, channels)
    # With --data_dir, a set of TFDS is a folder there as well.
    if archive.exists(path) and not texts.are_at(path) and not tfds.is_prepared(path):
        return folder.scan(path, split, begun, channels)
    return None


def _source(dataset, data_dir, split, max_bad_fraction):
    """Returns the source of a data set that is not a folder of images."""
    path = expanded(data_dir, dataset)
    if dataset == "embedded":
        return sources.embedded(split)
    if texts.are_at(path):
        return texts.read(path, split)
    if path.exists() and not tfds.NAME.fullmatch(dataset):  # the folder of a prepared set, by its path
        dataset, data_dir = path.name, path.parent
    return tfds.find(dataset, data_dir, split, max_bad_fraction)


def _say(listing):
    """Says how a folder was read."""
    log.info(f"{listing.title}: {listing.size} images")
    for sentence in folder.remarks(listing):
        log.log(logging.WARNING if sentence in listing.doubts else logging.INFO, f"  {sentence}")


def _report(checked, exif):
    """Says on the screen how many images are bad or not what they seem, and in the log which are bad."""
    listing = checked.listing
    for sentence in remarks(checked.verdicts, exif):
        log.info(f"  {sentence}")
    if checked.added:
        log.warning(
            f"{checked.added} images came into {listing.title} after the run began and are left out; "
            "a run in another --run_dir takes them in."
        )
    for file, problem in checked.bad:
        log.debug(f"Undecodable image: {folder.printable(listing.path / file)} ({problem})")
    if checked.bad:
        log.warning(
            f"{len(checked.bad)} of {listing.size} images in {listing.title} cannot be decoded (the log file names "
            "them); the next good one stands in for each."
        )
