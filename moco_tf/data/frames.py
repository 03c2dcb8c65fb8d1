"""`python -m moco_tf.data.frames --videos=clips --output=frames --fps=2`: writes a folder of frames for each video.

The output is a data set of things with several pictures. A second run goes on: folders that are there are left
alone. docs/data.md says what is written, and what happens to broken videos.
"""

import collections
import dataclasses
import errno
import itertools
import os
import sys
from fractions import Fraction
from pathlib import Path

from moco_tf import command, progress
from moco_tf.command import ConfigError
from moco_tf.data import folder, video
from moco_tf.files import aside, make_folder, printable

OF_THE_NAME = (errno.ENAMETOOLONG, errno.EINVAL, errno.EILSEQ)  # errors of one folder's name, not of the disk


@dataclasses.dataclass(frozen=True)
class Settings:
    videos: str = command.flag("", "Folder with the videos, at any depth.", path=True)
    output: str = command.flag("", "Folder to write a folder of frames for each video to.", path=True)
    fps: float = command.flag(2.0, "Frames to take a second; never more than the video has.")
    max_frames: int = command.flag(0, "Frames to take of a video at most, evenly spread over it; 0: all.")
    image_size: int = command.flag(0, "Pixels that the shorter side has at most; 0: as the video has it.")
    quality: int = command.flag(95, "JPEG quality, 1 to 100.")

    def __post_init__(self):
        command.check_values(self)
        command.require(self, self.fps > 0, "fps", "is more than 0, such as 2 or 0.5")
        command.require(self, self.max_frames >= 0, "max_frames", "is 0, for all, or more")
        command.require(self, self.image_size >= 0, "image_size", "is 0, for the video's own size, or more")
        command.require(self, 1 <= self.quality <= 100, "quality", "is 1 to 100")
        folder.require_places("videos", self.videos, self.output)


class _Failed(Exception):
    """Raised for frames that cannot be written; `error` is the system's error."""

    def __init__(self, error):
        super().__init__(error.strerror)
        self.error = error


def main(arguments):
    """Runs the command; returns the process's exit status: 1 if no video has a folder of frames in the end."""
    program = "moco_tf.data.frames"
    return command.run(program, __doc__, lambda words: _run(command.parse(Settings, program, words)), arguments)


def _run(settings):
    try:
        import av  # noqa: F401
        import PIL.Image  # noqa: F401
    except ImportError as error:
        raise ConfigError(f"frames of videos need the package {error.name}: pip install 'moco_tf[video]'") from None
    besides = folder.Besides()
    folders = video_folders(_find(settings, besides))
    try:
        make_folder(settings.output)
    except OSError as error:
        raise ConfigError(f"--output names a folder to write; {settings.output}: {error.strerror}") from None
    if others := folder.not_read(besides):
        _say(f"Not read: {others}")
    for name in besides.unread:
        _say(f"Not read: {printable(Path(settings.videos, name))}, a folder that cannot be opened.")
    for sentence in _left_behind(settings.output, folders):
        _say(sentence)
    return _write_all(settings, folders)


def _find(settings, besides):
    """The videos' paths below --videos, sorted."""
    endings = tuple(os.fsencode(suffix) for suffix in video.SUFFIXES)
    videos = sorted(path for path, _, _ in folder.files_called(endings, os.fsencode(settings.videos), besides))
    if not videos:
        others = folder.not_read(besides)
        others = f", but {others}" if others else ""
        raise ConfigError(
            f"--videos holds videos ({', '.join(video.SUFFIXES)}); {printable(settings.videos)} has none{others}: "
            "give a folder that has some"
        )
    return videos


def video_folders(videos):
    """{video: its folder below the output}, both relative paths: the video's path without its suffix.

    Videos whose folders would be the same (`a.mp4`, `a.mov`), or would lie in one another (`a.mp4`, `a/b.mp4`), keep
    the suffix.
    """
    keeping = set()
    while True:
        folders = {name: name if name in keeping else os.path.splitext(name)[0] for name in videos}
        times = collections.Counter(folders.values())
        above = {str(parent) for path in folders.values() for parent in Path(path).parents}
        clashing = {name for name, path in folders.items() if times[path] > 1 or path in above} - keeping
        if not clashing:
            return folders
        keeping |= clashing


def _left_behind(output, folders):
    """Yields sentences on folders of an earlier run in which no other video had the name, but now one has."""
    for name, path in folders.items():
        alone = os.path.splitext(name)[0]
        if path == name and alone not in folders.values() and any(Path(output, alone).glob("*.jpg")):
            yield (
                f"{printable(Path(output, alone))} holds frames of an earlier run, when no other video had that name; "
                f"now {printable(name)} gets {printable(path)}: remove the old folder, or things are there twice"
            )


def _write_all(settings, folders):
    """Writes the folders that are not there yet, and says what happens; returns the process's exit status."""
    frames, counts, minutes = 0, collections.Counter(), progress.Minutes()

    def say(taken):
        if minutes.passed():
            _say(f"{counts.total()} of {len(folders)} videos done, {frames + taken} frames written")

    stopped = False
    for name, path in folders.items():
        target, source = Path(settings.output, path), Path(settings.videos, name).absolute()
        say(0)
        if target.is_dir():
            counts["there"] += 1
            continue
        faults = []
        try:
            taken = _write(settings, source, target, faults, say)
        except video.Unusable as reason:
            counts["skipped"] += 1
            _say(f"Skipped: {printable(name)} ({reason})")
            continue
        except _Failed as failure:
            if target.is_dir():  # another process has written it meanwhile
                counts["there"] += 1
                continue
            counts["skipped"] += 1
            _say(f"Skipped: {printable(name)}, its frames cannot be written ({failure})")
            stopped = failure.error.errno not in OF_THE_NAME
            if stopped:
                _say("Mend that (if the disk is full, make room), and run the command again: it goes on here.")
                break
            continue
        counts["written"] += 1
        frames += taken
        if faults:
            _say(f"Damaged: {printable(name)} ({'; '.join(faults)}); {taken} frames are kept")
        if taken == 1:
            _say(f"A single frame, which makes no pair: {printable(name)}")
    parts = [f"{len(folders)} videos", f"{counts['written']} written with {frames} frames"]
    parts += [f"{counts['there']} there before"] if counts["there"] else []
    parts += [f"{counts['skipped']} skipped"]
    _say(f"{printable(settings.output)}: {', '.join(parts)}")
    return 1 if stopped or not counts["written"] + counts["there"] else 0


def _write(settings, source, target, faults, say):
    """Writes a video's folder in one step; returns how many frames it has."""
    from moco_tf.data import any_image

    fps = Fraction(str(settings.fps))  # 0.1 is exactly a tenth, which no float is
    chosen = None
    if settings.max_frames:  # decodes twice: keeping the frames until their number is known could fill the memory
        size = sum(1 for _ in video.sampled(source, fps, []))
        if size > settings.max_frames:  # the middles of equal parts
            chosen = {(2 * i + 1) * size // (2 * settings.max_frames) for i in range(settings.max_frames)}
    sampled = video.sampled(source, fps, faults)
    sampled = itertools.chain([next(sampled)], sampled)  # if there is no frame, raises before anything is made
    wanted = (frame for position, frame in enumerate(sampled) if chosen is None or position in chosen)
    number = 0
    try:
        make_folder(target.parent)
        with aside(target, replaces=False) as writing:
            writing.mkdir()
            for number, frame in enumerate(wanted, start=1):
                image = any_image.shrink(video.image(frame), settings.image_size)
                image.save(writing / f"{number - 1:08}.jpg", quality=settings.quality)
                say(number)
    except OSError as error:
        raise _Failed(error) from None
    return number


def _say(line):
    print(line, flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
