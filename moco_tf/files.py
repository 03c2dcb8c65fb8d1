"""Files that are complete or absent, and names that are not text: the system and TensorFlow see paths differently.

For the system, a path is bytes. Python keeps bytes that are not UTF-8 as lone surrogates (os.fsdecode). No text file,
screen or C++ library accepts these surrogates. This module imports nothing heavy.
"""

import contextlib
import csv
import errno
import json
import math
import os
import secrets
import shutil
import tempfile
import unicodedata
from pathlib import Path

# Characters that are not text, end a line or control a terminal: lone surrogates, controls, line separators.
UNPRINTABLE = ("Cs", "Cc", "Zl", "Zp")
# Characters that reverse the text after them, so that a name looks like another one (exe.png).
TURNING = ("LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI")

LONG = 32  # characters: an ending of this length is not a usual one

NO_FOLLOW = getattr(os, "O_NOFOLLOW", 0)  # Windows makes links for administrators only
# The errors of file systems without hard links, and without locks.
NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK)
NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP)

_folders_of_links = {}  # {the link's target: the temporary folder with the link}; they go when the process ends


# Writing.


@contextlib.contextmanager
def aside(path, lasting=True, replaces=True):
    """Yields a path to write a file or a folder to; it replaces `path` in one step when all goes well.

    Readers see either the old or the new version, complete, also after a power loss. An old file is replaced; an old
    folder is not. If an exception or a kill ends the writing early, the old version stays as it was.

    Args:
      lasting: False: the guarantee does not cover a power loss, which saves time for one of many files.
      replaces: False: a file replaces nothing.

    Raises:
      OSError: the path cannot be written; FileExistsError: something that is not replaced came to `path` meanwhile.
    """
    path = Path(path)
    # Nobody can guess this name and put a link there. It keeps the ending, by which some libraries choose a format.
    end = path.suffix if len(path.suffix) < LONG else ""
    writing = path.with_name(f".writing-{os.getpid()}-{secrets.token_hex(8)}{end}")
    try:
        yield writing
        for file in (writing, *writing.rglob("*")) if lasting else ():
            sync(file)
        _give_name(writing, path, replaces)
        if lasting:
            sync(path.parent)
    except BaseException as error:
        remove(writing)
        if isinstance(error, OSError) and error.filename in (None, str(writing)):  # a full disk's error names no file
            error.filename, error.filename2 = str(path), None
        raise


def make_folder(path):
    """Makes a folder and its missing parents; they also survive a power loss."""
    path = Path(path).absolute()
    new = [folder for folder in (path, *path.parents) if not folder.exists()]
    path.mkdir(parents=True, exist_ok=True)
    for folder in new:
        sync(folder.parent)


def _give_name(writing, path, replaces):
    if replaces or writing.is_dir():  # the system lets a folder replace only an empty folder
        os.replace(writing, path)
        return
    try:
        os.link(writing, path)  # unlike a check beforehand, it fails if something is there by now
    except OSError as error:
        if error.errno not in NO_LINKS:
            raise
        if os.path.lexists(path):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path)) from None
        os.replace(writing, path)
    else:
        os.unlink(writing)


def hold(path):
    """Locks a file, and makes it if it is missing; returns a context that frees the lock at its end or on `close`.

    Links are not followed, and the file's content is not changed. The system frees the lock however the process ends.
    On network file systems without locks, a mark `<path>-held` replaces the lock; it names machine and process. The
    mark of a process that was killed on this machine holds nothing. The mark of a process on another machine holds
    until somebody removes it. Some network file systems claim to lock, but do so for one machine only (NFS with
    `nolock`); nobody can detect this.

    Raises:
      Held: another process, or another part of this one, holds the lock.
      OSError: the file cannot be made or opened.
    """
    import filelock  # its import takes a while

    with contextlib.ExitStack() as held:
        file = held.enter_context(os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT | NO_FOLLOW, 0o666), "r+"))

        def unlock():  # closing is not enough: a process forked meanwhile also holds the file open
            with contextlib.suppress(OSError):
                filelock.unlock_descriptor(file.fileno())

        held.callback(unlock)
        try:
            if not filelock.lock_descriptor(file.fileno(), blocking=False):
                raise Held
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
            try:
                held.enter_context(filelock.SoftFileLock(f"{path}-held", timeout=0, thread_local=False))
            except filelock.Timeout:
                raise Held(f" (or, where it ended on another machine, remove {path}-held)") from None
        return held.pop_all()


class Held(Exception):
    """Another process, or another part of this one, holds a lock; a message says what to do if in fact none does."""


def remove(path):
    """Removes a file or a folder, if it is there; of a link the link alone."""
    with contextlib.suppress(OSError):  # it may not be there
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def remove_folder(folder):
    """Removes a folder as a whole: a kill leaves nothing of it, or parts under a name that begins with .writing-."""
    folder = Path(folder)
    leaving = folder.with_name(f".writing-{folder.name}")
    with contextlib.suppress(OSError):
        os.rename(folder, leaving)
    shutil.rmtree(leaving, ignore_errors=True)


def write_text(path, text, errors="backslashreplace"):
    """Writes a text file in one step. errors: escapes what is not text; "surrogateescape": keeps it byte for byte."""
    with aside(path) as writing:
        writing.write_text(text, encoding="utf-8", errors=errors, newline="")


def write_json(path, value):
    """Writes a JSON file in one step (see `json_text`)."""
    write_text(path, json_text(value, indent=1) + "\n")


def write_bytes(path, content):
    """Writes a file of bytes in one step."""
    with aside(path) as writing:
        writing.write_bytes(content)


def write_csv(path, columns, rows):
    """Writes a CSV file in one step. Names and paths in it keep their bytes, which may not be text."""
    with (
        aside(path) as writing,
        open(writing, "w", newline="", encoding="utf-8", errors="surrogateescape") as file,
    ):
        writer = csv.writer(file)
        writer.writerow(columns)
        writer.writerows(rows)


def write_arrays(path, arrays):
    """Writes {name: array} as an .npz file in one step."""
    import numpy as np

    with aside(path) as writing, open(writing, "wb") as file:
        np.savez(file, **arrays)


def sync(path):
    """Makes a file, or the entries of a folder, survive a power loss; Windows has no way to do so for folders."""
    if os.name == "nt" and Path(path).is_dir():
        return
    descriptor = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network file systems do not sync folders
            raise
    finally:
        os.close(descriptor)


# Names.


def printable(name):
    """Returns a name or path as one line of text; escapes what is not text, or would break or reverse the line."""
    return "".join(c.encode("unicode_escape", "surrogatepass").decode() if _steers(c) else c for c in str(name))


def _steers(character):
    return unicodedata.category(character) in UNPRINTABLE or unicodedata.bidirectional(character) in TURNING


def fault(error):
    """Returns one line on an `OSError`: the file, if it is known, and the reason."""
    name = os.fsdecode(error.filename) if isinstance(error.filename, str | bytes | os.PathLike) else ""
    reason = error.strerror or first_line(error)
    return f"{printable(name)}: {reason}" if name else reason


def first_line(error):
    """Returns the first line of an exception or a text; of an exception that says nothing, its class's name."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def json_text(value, indent=None):
    """Returns a value as JSON that every parser takes: strings as `printable` makes them, and no NaN, but null."""
    return json.dumps(as_text(value), indent=indent, allow_nan=False)


def as_text(value):
    """Returns a value that JSON takes, with its strings as `printable` makes them, and None for NaN and infinity."""
    if isinstance(value, str):
        return printable(value)
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {as_text(key): as_text(of_key) for key, of_key in value.items()}
    if isinstance(value, list | tuple):
        return [as_text(one) for one in value]
    return value


def expanded(*parts):
    """Joins parts of a path; a text that begins with ~ is in somebody's home, a `Path` never, nor is ./~."""
    parts = [os.path.expanduser(part) if isinstance(part, str) else part for part in parts]
    return Path(*parts)


# TensorFlow.


def for_tensorflow(path):
    """Returns a path for TensorFlow and Keras, which take only text: `path` itself, or one with a link to its place.

    Names that are text stay as they are, because Keras tells formats by their endings. Links are temporary.
    """
    path = Path(path)
    if is_text(path):
        return str(path)
    path = path.absolute()
    return os.path.join(for_tensorflow(path.parent), path.name) if is_text(path.name) else _link(path)


def is_text(name):
    """Whether a name or path is text, and has no bytes that are not UTF-8."""
    try:
        str(name).encode()
    except UnicodeEncodeError:
        return False
    return True


def _link(path):
    name = "link" + (path.suffix if is_text(path.suffix) else "")
    folder = _folders_of_links.get(path)
    if not folder or not os.path.lexists(f"{folder.name}/{name}"):  # systems delete temporary folders during long runs
        folder = _folders_of_links[path] = tempfile.TemporaryDirectory(prefix="moco_tf-", ignore_cleanup_errors=True)
        os.symlink(path, f"{folder.name}/{name}")
    return f"{folder.name}/{name}"
