"""Zip and tar archives of images, read in place: a path may lead into one, as in photos.zip/cat/1.jpg.

`entries`, `stat`, `is_dir` and `read` take any path. Outside archives they do what the system does. So `folder.py`
reads an archive by the same rules as a folder. Nothing is ever extracted. The directory of an archive (in a tar, all
headers) is read once, and again if the file changes. docs/data.md states the policies.
"""

import array
import calendar
import contextlib
import errno
import os
import re
import stat as modes
import struct
import tarfile
import threading
import weakref
import zipfile
import zlib
from typing import NamedTuple

import numpy as np

from moco_tf.files import printable

ZIP, TAR = ".zip", ".tar"
# Not read: an image in them needs all data before it, or Python has no module for them.
AS_A_WHOLE = (".tar.gz", ".tgz", ".tar.bz2", ".tbz", ".tbz2", ".tar.xz", ".txz", ".tar.zst", ".tzst")
FOREIGN = (".7z", ".rar")
INSIDE = r"(?i)\C*\.(zip|tar)/\C*"  # a path that may lead into an archive, for TensorFlow; \C is any byte
MAX_BYTES = 6 * 89_478_485  # of a member: the largest image that is read, uncompressed, of 16 bits, in colour
MAX_DEPTH = 100  # folders above a member
LATEST = 2**62  # the latest time, in nanoseconds
HEADER = struct.Struct("<4s22xHH")  # of a zip's member, before its data: signature, lengths of the name and of extras
SIGNATURE = b"PK\3\4"
ENCRYPTED, UTF8, UNIX = 0x1, 0x800, 3  # flags of a zip's member, and the system that made it
LINK = "a link, which is not followed inside an archive"

_ENDING = re.compile(rb"\.(?:zip|tar)(?=/|\Z)", re.IGNORECASE)
_opened = {}  # by path
_opening, _seeking = threading.Lock(), threading.Lock()


class Status(NamedTuple):
    """What `os.stat` would say of a member or a folder in an archive."""

    st_mode: int
    st_size: int
    st_mtime_ns: int
    st_dev: int
    st_ino: tuple  # not a number, but it tells files apart as well as one


class Entry(NamedTuple):
    """What `os.scandir` would give for a member or a folder in an archive."""

    name: str | bytes
    status: Status

    def is_dir(self):
        return modes.S_ISDIR(self.status.st_mode)

    def is_file(self):
        return modes.S_ISREG(self.status.st_mode)

    def stat(self):
        return self.status


def entries(path):
    """Returns a list of a folder's entries, as `os.scandir` gives them, on the disk or in an archive.

    Raises:
      OSError: as the system raises it. ValueError: the archive cannot be read.
    """
    try:
        with os.scandir(path) as there:
            return list(there)
    except NotADirectoryError:
        if not (found := _within(path)):
            raise
    archive, inside = found
    as_given = os.fsdecode if isinstance(os.fspath(path), str) else bytes
    folder = archive.node(inside)
    if not isinstance(folder, dict):
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), os.fsdecode(path))
    return [Entry(as_given(name), archive.status((*inside, name), node)) for name, node in folder.items()]


def stat(path):
    """Does what `os.stat` does, also for paths in an archive."""
    try:
        return os.stat(path)
    except NotADirectoryError:
        if not (found := _within(path)):
            raise
    archive, inside = found
    return archive.status(inside, archive.node(inside))


def is_dir(path):
    """Whether a path is a folder, an archive, or a folder in an archive.

    Raises:
      ValueError: the archive cannot be read.
    """
    return os.path.isdir(path) or _is(modes.S_ISDIR, path)


def is_file(path):
    """Whether a path is a file that is not an archive, or a member of an archive."""
    found = _within(path)
    return _is(modes.S_ISREG, path) if found else os.path.isfile(path)


def exists(path):
    """Whether there is anything at a path."""
    return os.path.lexists(path) or is_dir(path) or is_file(path)


def may_hold(path):
    """Whether a path may lead into an archive, judging by its name."""
    return bool(_ENDING.search(os.fsencode(path)))


def _pread(descriptor, count, start):
    """`os.pread`, also where the system has none."""
    if hasattr(os, "pread"):
        return os.pread(descriptor, count, start)
    with _seeking:
        os.lseek(descriptor, start, os.SEEK_SET)
        return os.read(descriptor, count)


def time_of(status):
    """Returns the modification time of a `stat` in nanoseconds, within 64 bits: file systems allow later ones."""
    return min(max(status.st_mtime_ns, -LATEST), LATEST)


def read(path):
    """The bytes of a file, or of a member of an archive.

    Raises:
      ValueError: the member is missing or cannot be read, or the path leads to a pipe or a device, which has no end.
      OSError: the file cannot be read.
    """
    if found := _within(path):
        archive, inside = found
        with contextlib.suppress(FileNotFoundError):
            if isinstance(number := archive.node(inside), int):
                return archive.read(number)
        raise ValueError(f"{printable(os.fsdecode(path))}: no such file")
    if not os.path.isfile(path) and os.path.exists(path):
        raise ValueError(f"{printable(os.fsdecode(path))} is not a file")
    with open(path, "rb") as file:
        return file.read()


def read_all(paths):
    """Reads each of an array of paths; returns an array of bytes."""
    return np.array([read(path) for path in paths], object)


def remarks(path):
    """Returns sentences on how an archive differs from a folder."""
    found = _within(path)
    if found and (count := found[0].replaced):
        return [f"Members that a later one of the same name takes the place of: {count}"]
    return []


def refusal(path):
    """Why a file is not read as an archive, and the way out; None where it is no archive."""
    name, path = str(path).lower(), printable(path)
    if name.endswith(AS_A_WHOLE):
        return (
            f"{path} is compressed as a whole, so that no image in it can be had without all before it. Uncompress it "
            "to a .tar, which is read in place, or unpack it."
        )
    if name.endswith(FOREIGN):
        return f"{path} is an archive of a kind that is not read; .zip and .tar are. Unpack it."
    return None


def _is(kind, path):
    found = _within(path)
    with contextlib.suppress(FileNotFoundError):
        return bool(found) and kind(found[0].status(found[1], found[0].node(found[1])).st_mode)
    return False


def _within(path):
    """Returns (the `Archive` that a path leads to or into, the names below it as bytes), or None."""
    path = os.fsencode(path)
    for match in _ENDING.finditer(path):
        file = path[: match.end()]
        try:
            status = os.stat(file)
        except (OSError, ValueError):  # ValueError: the path has a zero byte
            return None
        if modes.S_ISREG(status.st_mode):
            names = path[match.end() :].split(b"/")
            return _open(file, status), tuple(name for name in names if name not in (b"", b"."))
    return None


def _open(file, status):
    identity = status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns
    if (archive := _opened.get(file)) and archive.identity == identity:
        return archive
    with _opening:  # once, not in each of tf.data's threads
        archive = _opened.get(file)
        if archive is None or archive.identity != identity:
            archive = _opened[file] = Archive(file, identity)
        return archive


class Archive:
    """The members of a zip or a tar: a tree of their names, and the place of each member's bytes by its number.

    Raises:
      ValueError: the file is neither, is damaged, or cannot be opened.
    """

    def __init__(self, path, identity):
        self.path, self.identity = os.fsdecode(path), identity
        self.tree = {}  # maps names (bytes) to the number of a member or the dict of a folder
        # By the member's number: where its header (in a tar, its data) begins; its size in the archive and as a file.
        self.starts, self.stored, self.sizes, self.times = (array.array("q") for _ in range(4))
        self.checksums = array.array("I")  # of a zip's members
        self.deflated, self.problems = set(), {}  # `problems`: why a member cannot be read
        self.replaced = 0  # members that a later one of the same name replaces
        self.is_zip = self.path.lower().endswith(ZIP)
        try:
            self._file = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
        except OSError as error:
            raise ValueError(f"{printable(self.path)} cannot be read: {error.strerror}. Allow reading it.") from None
        weakref.finalize(self, os.close, self._file)
        try:
            with open(self._file, "rb", closefd=False) as file:
                (self._list_zip if self.is_zip else self._list_tar)(file)
        except Exception as error:  # hostile files make Python's modules raise what their authors did not foresee
            kind = "zip" if self.is_zip else "tar"
            what = " ".join(str(error).split())[:200] or type(error).__name__
            raise ValueError(
                f"{printable(self.path)} is no {kind} that can be read, or a damaged one ({printable(what)}). Make or "
                "fetch it again."
            ) from None

    def node(self, names):
        """The number of a member, or the dict of a folder; FileNotFoundError where there is neither."""
        node = self.tree
        for name in names:
            node = node.get(name) if isinstance(node, dict) else None
        if node is None:
            path = os.path.join(self.path, os.fsdecode(b"/".join(names)))
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)
        return node

    def status(self, names, node):
        """The `Status` of a member or a folder."""
        device, inode = self.identity[:2]
        if isinstance(node, dict):
            return Status(modes.S_IFDIR, 0, 0, device, (inode, names))
        return Status(modes.S_IFREG, self.sizes[node], self.times[node], device, (inode, node))

    def read(self, number):
        """The bytes of a member, never more than the archive's directory says.

        Raises:
          ValueError: the member cannot be read.
        """
        if problem := self.problems.get(number):
            raise ValueError(problem)
        start, size = self.starts[number], self.sizes[number]
        if not self.is_zip:
            return self._bytes(start, size)
        signature, *lengths = HEADER.unpack(self._bytes(start, HEADER.size))
        if signature != SIGNATURE:
            raise ValueError("the archive is damaged: there is no member where its directory says")
        content = self._bytes(start + HEADER.size + sum(lengths), self.stored[number])
        if number in self.deflated:
            try:  # a limit of 0 would mean no limit
                content = zlib.decompressobj(-zlib.MAX_WBITS).decompress(content, size + 1)
            except zlib.error:
                raise ValueError("the archive is damaged: the member cannot be inflated") from None
        if len(content) != size or zlib.crc32(content) != self.checksums[number]:
            raise ValueError("the archive is damaged: the member's size or checksum is another")
        return content

    def _bytes(self, start, count):
        try:
            content = _pread(self._file, count, start)
        except OSError as error:
            raise ValueError(f"{printable(self.path)}: {error.strerror}") from None
        if len(content) != count:
            raise ValueError("the archive is damaged: it ends inside the member")
        return content

    def _list_zip(self, file):
        with zipfile.ZipFile(file) as directory:
            for info in directory.infolist():
                if info.is_dir():
                    self._folder(_names(_zip_name(info)))
                    continue
                problem = None
                if info.flag_bits & ENCRYPTED:
                    problem = "encrypted, and so not read: unpack the archive with its password"
                elif info.create_system == UNIX and modes.S_ISLNK(info.external_attr >> 16):
                    problem = LINK
                elif info.compress_type == zipfile.ZIP_DEFLATED:
                    self.deflated.add(len(self.starts))
                elif info.compress_type != zipfile.ZIP_STORED:
                    method = zipfile.compressor_names.get(info.compress_type, info.compress_type)
                    problem = f"compressed by {method}; what is stored or deflated is read"
                elif info.compress_size != info.file_size:
                    problem = "stored, in another number of bytes than it has"
                # A zip has no fractions of a second. The checksum stands for them, so that changed content shows.
                time = _nanoseconds(info) + info.CRC % 10**9
                number = self._member(info.header_offset, info.compress_size, info.file_size, time, problem)
                self.checksums.append(info.CRC)
                self._place(_names(_zip_name(info)), number)

    def _list_tar(self, file):
        end = os.fstat(self._file).st_size
        with tarfile.open(fileobj=file, mode="r:", encoding="utf-8", errors="surrogateescape") as directory:
            while info := directory.next():
                directory.members.clear()  # else it keeps all of them, a kilobyte each
                is_whole = info.isreg() and not info.issparse()
                if info.size < 0 or (is_whole and info.offset_data + info.size > end):
                    raise ValueError(f"it ends inside of {info.name}")
                names = _names(os.fsencode(info.name))
                if info.isdir():
                    self._folder(names)
                elif info.islnk():  # another name of a member before it
                    target = self._find(_names(os.fsencode(info.linkname)))
                    self._place(names, self._member(0, 0, 0, 0, LINK) if target is None else target)
                elif info.issym() or info.isreg():
                    time = min(max(int(info.mtime * 1e9), 0), LATEST)
                    problem = LINK if info.issym() else None if is_whole else "a sparse file of a tar"
                    self._place(names, self._member(info.offset_data, info.size, info.size, time, problem))
        # The module stops at a damaged header as it does at the end.
        if _pread(self._file, tarfile.BLOCKSIZE, directory.offset) != bytes(tarfile.BLOCKSIZE):
            raise ValueError(f"neither a member nor an end at byte {directory.offset}")

    def _member(self, start, stored, size, time, problem):
        """Takes note of a member; returns its number."""
        number = len(self.starts)
        if max(stored, size) > MAX_BYTES:
            problem = problem or f"more than {MAX_BYTES} bytes"
            stored, size = (min(count, LATEST) for count in (stored, size))
        self.starts.append(start)
        self.stored.append(stored)
        self.sizes.append(size)
        self.times.append(time)
        if problem:
            self.problems[number] = problem
        return number

    def _folder(self, names):
        """Returns the dict of a folder; makes it if it is missing."""
        if len(names) > MAX_DEPTH:
            raise ValueError(f"a member lies in more than {MAX_DEPTH} folders")
        folder = self.tree
        for name in names:
            below = folder.get(name)
            if not isinstance(below, dict):
                self.replaced += below is not None
                below = folder[name] = {}
            folder = below
        return folder

    def _find(self, names):
        """The number of a member that is there already, or None."""
        with contextlib.suppress(FileNotFoundError):
            node = self.node(names)
            return None if isinstance(node, dict) else node

    def _place(self, names, number):
        if not names:
            return
        *above, name = names
        folder = self._folder(above)
        self.replaced += name in folder
        if not isinstance(folder.get(name), dict):
            folder[name] = number


def _names(path):
    """Returns the names in a member's path, which never leaves the archive: .. goes up to its top at most."""
    names = []
    for name in path.split(b"/"):
        if name == b"..":
            names[-1:] = []
        elif name not in (b"", b"."):
            names.append(name)
    return names


def _zip_name(info):
    """A member's name as bytes: UTF-8 if it is marked as that or is valid UTF-8, else of the old code page 437."""
    if info.flag_bits & UTF8:
        return os.fsencode(info.filename)
    try:
        raw = info.filename.encode("cp437")  # as it stands in the file
        raw.decode()
    except UnicodeError:
        return os.fsencode(info.filename)
    return raw


def _nanoseconds(info):
    """The date of a zip's member in nanoseconds; it has no time zone and is taken as UTC."""
    try:
        return max(calendar.timegm((*info.date_time, 0, 0, 0)), 0) * 10**9
    except ValueError:  # such as a month 0
        return 0
