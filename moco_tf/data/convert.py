"""`python -m moco_tf.data.convert --images=photos --output=small --size=256`: converts images for training.

Reads images of any format. Writes JPEG or PNG files in the same sub-folders, .npy arrays of all channels, or shards of
array_record that `--dataset` reads. A second run goes on: files that are written and unchanged are left alone.
docs/data.md says which formats there are, and what becomes of them.
"""

import collections
import concurrent.futures
import csv
import dataclasses
import errno
import importlib.util
import multiprocessing
import os
import shutil
import signal
import sys
import time
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import NamedTuple

from moco_tf import command, files, progress
from moco_tf.command import ConfigError
from moco_tf.data import folder, shards
from moco_tf.files import printable

ENDINGS = {"jpeg": ".jpg", "png": ".png", "array_record": ".jpg", "npy": ".npy"}
RECORD, UNREADABLE = "converted.csv", "unreadable.csv"
COLUMNS = ("path", "size", "mtime_ns", "written", "bytes")
PARTS = ".files"  # the hidden folder of the JPEGs that shards are made of
SHOWN = 10  # unreadable files shown on the screen; the CSV has all
AT_ONCE = 8  # files that each process works on or has waiting
OF_THE_NAME = (errno.ENAMETOOLONG, errno.EINVAL, errno.EILSEQ)  # errors of one file's name, not of the disk
OF_THE_MACHINE = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)  # errors of reading that are not the file's


@dataclasses.dataclass(frozen=True)
class Settings:
    images: str = command.flag("", "Folder with the images, at any depth.", path=True)
    output: str = command.flag("", "Folder to write to; a new one, or one that an earlier start began.", path=True)
    size: int = command.flag(256, "Pixels that the shorter side has at most, antialiased; never enlarged; 0: all.")
    format: str = command.flag(
        "jpeg",
        "jpeg or png: a file for each image. array_record: shards of JPEGs with labels, which --dataset reads as a "
        "set of TFDS. npy: all channels of TIFFs and of .npy files, uint8 (height, width, channels), for --channels.",
        choices=tuple(ENDINGS),
    )
    quality: int = command.flag(95, "JPEG quality, 1 to 100.")
    stretch: bool = command.flag(
        False,
        "Bring values of more than 8 bits from the smallest and largest of each image to 0 and 255, as images of "
        "scientific cameras need it; else from what their bits can say.",
    )
    processes: int = command.flag(0, "Processes that convert; 0: one a processor.")

    def __post_init__(self):
        command.check_values(self)
        command.require(self, self.size >= 0, "size", "is 0, for each image's own size, or more")
        command.require(self, 1 <= self.quality <= 100, "quality", "is 1 to 100")
        command.require(self, self.processes >= 0, "processes", "is 0, for one a processor, or more")
        folder.require_places("images", self.images, self.output)

    @property
    def rules(self):
        """The settings that the output depends on, in the words that the record keeps."""
        return f"size {self.size}, {self.format}, quality {self.quality}, stretch {self.stretch}"


class Job(NamedTuple):
    """An image to convert."""

    path: str  # below --images
    size: int
    mtime_ns: int
    source: str
    target: str


class Outcome(NamedTuple):
    """What became of an image: the bytes written, or a problem."""

    bytes: int = 0
    problem: str = ""
    error: int | None = None  # the system's error number, if writing failed


def main(arguments):
    """Runs the command; returns the process's exit status: 1 if nothing is converted, or the disk is full."""
    program = "moco_tf.data.convert"
    return command.run(program, __doc__, lambda words: _run(command.parse(Settings, program, words)), arguments)


def _run(settings):
    if not importlib.util.find_spec("PIL"):
        raise ConfigError("converting images needs the package pillow: pip install 'moco_tf[convert]'")
    begun, besides = time.monotonic(), folder.Besides()
    images = _find(settings, besides)
    output = Path(settings.output)
    if settings.format == "array_record":
        shards.refuse(output)
        output /= PARTS
    known = _known(settings, output)
    known = {path: known[path] for path, _, _ in images if path in known}  # the names of removed images are free
    try:
        files.make_folder(output)
        files.write_csv(output / RECORD, [*COLUMNS, settings.rules], ((path, *row) for path, row in known.items()))
    except OSError as error:
        raise ConfigError(f"--output names a folder to write; {printable(output)}: {error.strerror}") from None
    if others := folder.not_read(besides):
        _say(f"Not read: {others}")
    for name in besides.unread:
        _say(f"Not read: {printable(Path(settings.images, name))}, a folder that cannot be opened.")
    try:
        return _write_all(settings, images, output, known, begun)
    except OSError as error:
        _say(f"{printable(settings.output)} cannot be written: {error.strerror}. Run it again once it can.")
        return 1


def _write_all(settings, images, output, known, begun):
    """Converts, and says what was done; returns the process's exit status."""
    written, there, unreadable, stopped = _convert_all(settings, images, output, known)
    files.write_csv(Path(settings.output, UNREADABLE), ("path", "problem"), unreadable)
    after = written | {path: known[path][3] for path in there}
    before = sum(size for path, size, _ in images if path in after)
    parts = [f"{len(images)} images", f"{len(written)} written"]
    parts += [f"{len(there)} there before"] if there else []
    parts += [f"{len(unreadable)} unreadable ({UNREADABLE} names them)"] if unreadable else []
    if stopped:
        _say("Mend that (if the disk is full, make room), and run the command again: it goes on here.")
    elif settings.format == "array_record" and after:
        _say(shards.write(output, Path(settings.output)))
        shutil.rmtree(output)
    sizes = f"{before / 1e6:.1f} MB became {sum(after.values()) / 1e6:.1f} MB"
    _say(f"{printable(settings.output)}: {', '.join(parts)}; {sizes} in {progress.duration(time.monotonic() - begun)}")
    return 1 if stopped or not after else 0


def _find(settings, besides):
    """(path, size, time) of each image below --images, sorted."""
    from moco_tf.data.any_image import ARRAY, SUFFIXES

    endings = tuple(os.fsencode(suffix) for suffix in (*SUFFIXES, *[ARRAY] * (settings.format == "npy")))
    images = sorted(folder.files_called(endings, os.fsencode(settings.images), besides))
    if not images:
        others = folder.not_read(besides)
        others = f", but {others}" if others else ""
        raise ConfigError(
            f"--images holds images ({', '.join(SUFFIXES)}); {printable(settings.images)} has none{others}: give a "
            "folder that has some"
        )
    return images


def _known(settings, output):
    """{path: (size, mtime_ns, written, bytes)} of what earlier starts converted.

    Raises:
      ConfigError: the folder was begun with other settings, or holds what this command did not write.
    """
    try:
        with open(output / RECORD, newline="", encoding="utf-8", errors="surrogateescape") as file:
            rows = csv.reader(file)
            *columns, rules = next(rows, [""])
            if tuple(columns) == COLUMNS and rules != settings.rules:
                raise ConfigError(
                    f"--output={printable(settings.output)} was begun with {rules}, not {settings.rules}: give those "
                    "again, or another --output"
                )
            rows = [row for row in rows if len(row) == len(COLUMNS) and row[-1].isdecimal()]  # a kill may cut the last
            return {path: (int(size), int(mtime), written, int(length)) for path, size, mtime, written, length in rows}
    except FileNotFoundError:
        if entries := os.listdir(output) if output.is_dir() else []:
            raise ConfigError(
                f"--output is a new folder, or one that this command began; {printable(output)} holds "
                f"{folder.some(sorted(entries))}: give another"
            ) from None
        return {}
    except (OSError, ValueError, csv.Error) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"{printable(output / RECORD)} cannot be read ({error}): give another --output") from None


def targets(paths, ending, known=()):
    """{image: the file to write}, both relative paths: the image's path with another ending.

    Images whose files would be the same (`a.png`, `a.tif`), or would have the name of a folder of other images, keep
    their ending: `a.png.jpg`. Files that were written before keep their names.

    known: {image: its file} for the files that were written before.
    """
    known, keeping = dict(known), set()
    while True:
        named = {
            path: known.get(path) or (path if path in keeping else os.path.splitext(path)[0]) + ending
            for path in paths
        }
        times = collections.Counter(named.values())
        above = {os.path.dirname(path) for path in paths}
        above |= {str(parent) for path in above for parent in Path(path).parents}
        clashing = {path for path, file in named.items() if times[file] > 1 or file in above} - keeping - known.keys()
        if not clashing:
            return named
        keeping |= clashing


def _convert_all(settings, images, output, known):
    """Converts the images that are not converted yet.

    Returns:
      {path: bytes} of what is written now, paths of what was there, [(path, problem)], whether the disk or the machine
      has stopped the work.
    """
    paths = [path for path, _, _ in images]
    named = targets(paths, ENDINGS[settings.format], {path: row[2] for path, row in known.items()})
    there, jobs = [], []
    for path, size, mtime in images:
        target = os.path.join(output, named[path])
        if known.get(path, ())[:2] == (size, mtime) and _size(target) == known[path][3]:
            there.append(path)
        else:
            jobs.append(Job(path, size, mtime, os.path.join(settings.images, path), target))
    written, unreadable, stopped, minutes = {}, [], False, progress.Minutes()
    with (
        open(output / RECORD, "a", newline="", encoding="utf-8", errors="surrogateescape") as file,
        progress.bar(len(jobs), "images", "Converting") as bar,
    ):
        record = csv.writer(file)
        for job, outcome in _outcomes(settings, jobs, os.path.realpath(output)):
            bar.update()
            if minutes.passed():
                bar.write(f"{len(written) + len(unreadable)} of {len(jobs)} images done", file=sys.stdout)
            if outcome.problem:
                unreadable.append((job.path, outcome.problem))
                if len(unreadable) <= SHOWN:
                    bar.write(f"Unreadable: {printable(job.path)} ({outcome.problem})", file=sys.stdout)
                if stopped := outcome.error is not None:
                    break
                continue
            written[job.path] = outcome.bytes
            record.writerow((*job[:3], named[job.path], outcome.bytes))
            file.flush()
    if len(unreadable) > SHOWN:
        _say(f"Unreadable: {len(unreadable) - SHOWN} more")
    return written, there, sorted(unreadable), stopped


def _outcomes(settings, jobs, output):
    """Yields (job, `Outcome`) pairs as they come; a file that ends the process that decodes it is unreadable, too."""
    processes = min(settings.processes or os.cpu_count(), len(jobs))
    waiting = collections.deque(jobs)
    while waiting:
        running = {}
        try:
            with _pool(processes) as pool:
                try:
                    while waiting or running:
                        while waiting and len(running) < AT_ONCE * processes:
                            running[pool.submit(_convert, waiting[0], settings, output)] = waiting[0]
                            waiting.popleft()
                        for future in concurrent.futures.wait(running, return_when="FIRST_COMPLETED").done:
                            outcome = future.result()
                            yield running.pop(future), outcome
                finally:
                    pool.shutdown(cancel_futures=True)
        except BrokenProcessPool:  # it does not say which file caused it
            for job in running.values():
                with _pool(1) as pool:
                    try:
                        outcome = pool.submit(_convert, job, settings, output).result()
                    except BrokenProcessPool:
                        outcome = Outcome(problem="ends the process that decodes it")
                yield job, outcome


def _pool(processes):
    # Processes forked from one that runs threads, such as a notebook's, could wait for ever.
    context = multiprocessing.get_context("spawn")
    return concurrent.futures.ProcessPoolExecutor(processes, context, signal.signal, (signal.SIGINT, signal.SIG_IGN))


def _convert(job, settings, output):
    """Converts an image, in a process of its own; returns the `Outcome`."""
    import numpy as np

    from moco_tf.data import any_image

    array = copied = None
    try:
        with open(job.source, "rb") as file:
            if settings.format == "npy":
                array = any_image.read_channels(file, settings.size, settings.stretch)
            else:
                picture, is_the_file = any_image.read(file, settings.size, settings.stretch)
                small = any_image.shrink(picture, settings.size)
                # A second compression would only lose quality.
                if is_the_file and small is picture and settings.format != "png":
                    file.seek(0)
                    copied = file.read()
    except any_image.Unreadable as error:
        return Outcome(problem=str(error))
    except OSError as error:
        return Outcome(
            problem=error.strerror or str(error), error=error.errno if error.errno in OF_THE_MACHINE else None
        )
    try:
        parent = os.path.dirname(job.target)
        if os.path.commonpath((os.path.realpath(parent), output)) != output:
            return Outcome(problem="cannot be written: a link leads out of --output")
        os.makedirs(parent, exist_ok=True)
        with files.aside(job.target, lasting=False) as writing:
            if copied:
                with open(writing, "wb") as file:
                    file.write(copied)
            elif array is not None:
                with open(writing, "wb") as file:
                    np.save(file, array)
            elif settings.format == "png":
                small.save(writing, "PNG")
            else:
                small.save(writing, "JPEG", quality=settings.quality)
        return Outcome(bytes=os.path.getsize(job.target))
    except OSError as error:
        of_the_disk = None if error.errno in OF_THE_NAME else error.errno
        return Outcome(problem=f"cannot be written: {error.strerror or error}", error=of_the_disk)


def _size(path):
    try:
        return os.stat(path).st_size
    except OSError:
        return None


def _say(line):
    print(line, flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
