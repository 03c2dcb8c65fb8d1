"""Files that are whole or absent, and names that are not text: system and TensorFlow see a path in different ways.

For the system a path is bytes; Python keeps those that are not UTF-8 as lone surrogates (os.fsdecode), which no text
file, screen or library in C++ takes. Imports nothing heavy.
"""

import contextlib
import csv
import errno
import json
import os
import secrets
import shutil
import tempfile
import unicodedata
from pathlib import Path

# Characters that are not text, or end a line or steer a terminal: lone surrogates, controls, separators of lines.
UNPRINTABLE = ("Cs", "Cc", "Zl", "Zp")
# Those that turn round what follows, so that a name shows as another one (exe.png).
TURNING = ("LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI")

LONG = 32  # characters of what is no usual ending

NO_FOLLOW = getattr(os, "O_NOFOLLOW", 0)  # Windows makes links for administrators only
# What a file system says that has no hard links, or no locks.
NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK)
NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP)

_folders_of_links = {}  # by what the link in them leads to; each goes when the process ends


# Writing.


@contextlib.contextmanager
def aside(path, lasting=True, replaces=True):
    """A path to write a file or a folder to; it takes the place of `path` in one step when all is well.

    Whoever looks sees the old one or the new one, whole, also after a loss of power. An old file is replaced, an old
    folder is not. Whatever ends the writing early, an exception or a kill, leaves the old one as it was.

    Args:
      lasting: False: not after a loss of power, for one of many files, which then take less time.
      replaces: False: a file takes the place of nothing.

    Raises:
      OSError: it cannot be written; FileExistsError: something came to `path` meanwhile that is not replaced.
    """
    path = Path(path)
    # A name that nobody can guess, and put a link there; with the ending, by which some libraries choose a format.
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
        if isinstance(error, OSError) and error.filename in (None, str(writing)):  # a full disk names no file
            error.filename, error.filename2 = str(path), None
        raise


def make_folder(path):
    """Makes a folder, and those above it, where there are none; they are there after a loss of power, too."""
    path = Path(path).absolute()
    new = [folder for folder in (path, *path.parents) if not folder.exists()]
    path.mkdir(parents=True, exist_ok=True)
    for folder in new:
        sync(folder.parent)


def _give_name(writing, path, replaces):
    if replaces or writing.is_dir():  # the system lets a folder take the place of an empty folder only
        os.replace(writing, path)
        return
    try:
        os.link(writing, path)  # which no look beforehand can be: it fails where there is something by now
    except OSError as error:
        if error.errno not in NO_LINKS:
            raise
        if os.path.lexists(path):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path)) from None
        os.replace(writing, path)
    else:
        os.unlink(writing)


def hold(path):
    """Holds a lock file, made if it is not there; returns a context that lets go of it at its end or by `close`.

    A link is not followed, and nothing in the file is changed. The system frees the lock however the process ends.
    Network file systems without locks have a mark instead, `<path>-held`, which names machine and process: one that
    was killed on this machine holds nothing, one of another machine does until somebody removes the mark. Where such
    a file system says that it locks and does so for one machine only (NFS with `nolock`), nobody can tell.

    Raises:
      Held: another process, or another part of this one, holds it.
      OSError: it cannot be made or opened.
    """
    import filelock  # takes a while

    with contextlib.ExitStack() as held:
        file = held.enter_context(os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT | NO_FOLLOW, 0o666), "r+"))

        def unlock():  # said to the system: a process that was forked meanwhile holds the file open, too
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
    """Another one holds a lock; the message is nothing, or what there is to do where no one does."""


def remove(path):
    """Removes a file or a folder, if it is there."""
    with contextlib.suppress(OSError):  # it may not be there
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def write_text(path, text, errors="backslashreplace"):
    """Writes a text file in one step. errors: what is not text is escaped; "surrogateescape": kept byte for byte."""
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
    """Writes a CSV file in one step. Names and paths in it keep their bytes, which need be no text."""
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
    """Makes a file, or the entries of a folder, survive a loss of power."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network file systems do not sync folders
            raise
    finally:
        os.close(descriptor)


# Names.


def printable(name):
    """A name or path as one line of text: what is not text, or would break or turn the line, is escaped."""
    return "".join(c.encode("unicode_escape", "surrogatepass").decode() if _steers(c) else c for c in str(name))


def _steers(character):
    return unicodedata.category(character) in UNPRINTABLE or unicodedata.bidirectional(character) in TURNING


def fault(error):
    """What an `OSError` says, in a line: the file, where it is known, and the reason."""
    name = os.fsdecode(error.filename) if isinstance(error.filename, str | bytes | os.PathLike) else ""
    reason = error.strerror or (str(error).splitlines() or [type(error).__name__])[0]
    return f"{printable(name)}: {reason}" if name else reason


def json_text(value, indent=None):
    """JSON of a value in which all strings are text, as `printable` makes them: every parser takes it."""
    return json.dumps(as_text(value), indent=indent)


def as_text(value):
    """A value that JSON takes, with its strings as `printable` makes them."""
    if isinstance(value, str):
        return printable(value)
    if isinstance(value, dict):
        return {as_text(key): as_text(of_key) for key, of_key in value.items()}
    if isinstance(value, list | tuple):
        return [as_text(one) for one in value]
    return value


# TensorFlow.


def for_tensorflow(path):
    """A path for TensorFlow and Keras, which take text only: `path` itself, or a way to the same place through a link.

    Names that are text stay as they are: Keras tells formats by their endings. Links are temporary.
    """
    path = Path(path)
    if is_text(path):
        return str(path)
    path = path.absolute()
    return os.path.join(for_tensorflow(path.parent), path.name) if is_text(path.name) else _link(path)


def is_text(name):
    """Whether a name or path is text, and not bytes that are not UTF-8."""
    try:
        str(name).encode()
    except UnicodeEncodeError:
        return False
    return True


def _link(path):
    name = "link" + (path.suffix if is_text(path.suffix) else "")
    folder = _folders_of_links.get(path)
    if not folder or not os.path.lexists(f"{folder.name}/{name}"):  # temporary folders are swept in long runs
        folder = _folders_of_links[path] = tempfile.TemporaryDirectory(prefix="moco_tf-", ignore_cleanup_errors=True)
        os.symlink(path, f"{folder.name}/{name}")
    return f"{folder.name}/{name}"
