"""Reads several folders of images as one: `--dataset=a,b,c`. Classes of the same name are one class."""

import os
from pathlib import Path

import numpy as np

from moco_tf.data import folder
from moco_tf.files import expanded, printable


def are_meant(dataset, data_dir):
    """Whether --dataset names several folders: it has a comma, and is not a path that exists."""
    return "," in dataset and not os.path.lexists(expanded(data_dir, dataset))


def scan(dataset, data_dir, split, begun=False, channels=3):
    """The `Listing` of all images of a split of several folders, each read as `folder.scan` reads it.

    The classes are those of all folders together. The files are sorted by path below the folder that holds all
    folders.

    Raises:
      ValueError: as `folder.scan`, or a folder is named twice or lies in another.
    """
    folders = [Path(os.path.abspath(expanded(data_dir, part))) for part in dataset.split(",")]
    for one in folders:
        for other in folders:
            if one is not other and one.resolve() in (other.resolve(), *other.resolve().parents):
                raise ValueError(f"{printable(one)} holds {printable(other)}, whose images would be there twice")
    listings = [folder.scan(path, split, begun, channels) for path in folders]
    root = Path(os.path.commonpath(folders))
    classes = tuple(sorted({name for listing in listings for name in listing.classes}))
    files, label_of, besides = [], {}, folder.Besides()
    for listing in listings:
        below, names = os.path.relpath(listing.path, root), (*listing.classes, "")
        paths = [f"{below}/{file}" for file in listing.files]
        label_of |= {path: names[label] for path, label in zip(paths, listing.labels, strict=True)}
        files += paths
        besides.unread += [f"{below}/{name}" for name in listing.besides.unread]
        besides.endings += listing.besides.endings
        besides.hidden += listing.besides.hidden
    order = sorted(range(len(files)), key=files.__getitem__)
    sizes, times = (
        np.concatenate([getattr(listing, name) for listing in listings])[order] for name in ("sizes", "times")
    )
    counts = ", ".join(f"{printable(listing.path)} {listing.size}" for listing in listings)
    return folder.Listing(
        root,
        classes,
        [files[number] for number in order],
        sizes,
        times,
        besides,
        root,
        (f"Folders: {counts}", *(note for listing in listings for note in listing.notes)),
        tuple(doubt for listing in listings for doubt in listing.doubts),
        label_of,
        dataset,
        channels,
    )
