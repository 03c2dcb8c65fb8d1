"""Compares a zip or a tar with the folder that it was made of: its start, and how fast its images become views.

    python -m benchmarks.archives --folder=DIR --files=20000

makes DIR from copies of the embedded images (`folder_start.py`), if it is not there, and the archives beside it: a zip
with stored members, a zip with deflated members, and a tar. The listing time is what `--dataset` needs to know all
members. The folder and the archives take turns at making pairs of views, so that other work on the machine affects
all of them equally. --members=N also lists a zip and a tar of N empty members.
"""

import argparse
import itertools
import pathlib
import resource
import tarfile
import time
import zipfile

from benchmarks.folder_start import fill
from moco_tf.files import aside

BATCH = 64
WARM = 5  # batches before the timing
ROUNDS = 5


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", required=True, type=pathlib.Path)
    parser.add_argument("--files", type=int, default=20_000)
    parser.add_argument("--size", type=int, default=32, help="pixels of a view")
    parser.add_argument("--seconds", type=float, default=5, help="of each turn")
    parser.add_argument("--members", type=int, default=0)
    arguments = parser.parse_args()
    from moco_tf.startup import load_tensorflow

    load_tensorflow(training=True)
    if not arguments.folder.exists():
        fill(arguments.folder, arguments.files)
    places = [arguments.folder, *archives(arguments.folder)]
    turns = {place: [] for place in places}
    batches = {place: opened(place, arguments.size) for place in places}
    for _, place in itertools.product(range(ROUNDS), places):
        turns[place].append(measure(batches[place], arguments.seconds))
    median = {place: [sorted(values)[ROUNDS // 2] for values in zip(*turns[place], strict=True)] for place in places}
    for place, (rate, cost) in median.items():
        print(
            f"{place.name}: {rate:.0f} pairs of views/s, {rate / median[arguments.folder][0]:.2f} of the folder's; "
            f"{cost * 1e3:.2f} ms of processor time each (medians of {ROUNDS})"
        )
    if arguments.members:
        for place in many(arguments.folder, arguments.members):
            listed(place)


def archives(folder):
    """Makes a stored zip, a deflated zip and a tar of a folder, if they are missing; returns their paths."""
    stored, deflated, tar = (folder.with_name(folder.name + end) for end in ("-stored.zip", "-deflated.zip", ".tar"))
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    for place, method in ((stored, zipfile.ZIP_STORED), (deflated, zipfile.ZIP_DEFLATED)):
        if not place.exists():
            with aside(place) as writing, zipfile.ZipFile(writing, "w", method) as archive:
                for file in files:
                    archive.write(file, file.relative_to(folder))
    if not tar.exists():
        with aside(tar) as writing, tarfile.open(writing, "w") as archive:
            for file in files:
                archive.add(file, file.relative_to(folder))
    return stored, deflated, tar


def many(folder, members):
    """Makes a zip and a tar of `members` empty members, a thousand per folder; returns their paths."""
    places = [folder.with_name(f"{members}{end}") for end in (".zip", ".tar")]
    names = [f"{number // 1000}/{number:07d}.jpg" for number in range(members)]
    if not places[0].exists():
        with aside(places[0]) as writing, zipfile.ZipFile(writing, "w") as archive:
            for name in names:
                archive.writestr(zipfile.ZipInfo(name), b"")
    if not places[1].exists():
        with aside(places[1]) as writing, tarfile.open(writing, "w") as archive:
            for name in names:
                archive.addfile(tarfile.TarInfo(name))
                archive.members.clear()
    return places


def listed(place):
    """Returns the listing of a data set, and prints what the listing took."""
    from moco_tf.data import dataset

    before, begun = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    worked = time.process_time()
    split = dataset.find(str(place), "", "train", 0)
    beyond = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    worked, wall = time.process_time() - worked, time.perf_counter() - begun
    print(
        f"{place.name}: {split.size} images listed in {wall:.1f} s, {worked:.1f} s of processor time, {beyond:.0f} MB "
        "more memory",
        flush=True,
    )
    return split


def opened(place, size):
    """Returns endless batches of pairs of views, after a warm-up."""
    from moco_tf.data import augment
    from moco_tf.data.views import batches

    made = iter(batches(listed(place).open(), augment.v2(size), BATCH, seed=0))
    for _ in range(WARM):
        next(made)
    return made


def measure(made, seconds):
    """Returns pairs of views per second, and the seconds of processor time per pair."""
    begun, worked, count = time.perf_counter(), time.process_time(), 0
    while time.perf_counter() - begun < seconds:
        next(made)
        count += BATCH
    return count / (time.perf_counter() - begun), (time.process_time() - worked) / count


if __name__ == "__main__":
    main()
