"""Hostile checkpoints: `python tests/storms/checkpoints.py --cases=1000000 --seed=0` reads them; says how it went.

Each case is a function of the seed and its number: pickles of a grammar, in PyTorch's zip archives and in its older
stream, and .safetensors files, all with lies in them, or real files; many are damaged further. It passes where the
reader gives arrays that lie within the file's own numbers, or refuses in one line. The storm ends, and keeps the file,
where the reader raises anything else, asks for a module, a process or another file, takes more than SLOW seconds, or
more than MEMORY, which is a limit of the process.

With --coverage, where atheris is installed (`pip install atheris`), the cases are those that it makes of the first
thousand by what of the reader they reach.
"""

import argparse
import codecs
import collections
import contextlib
import importlib
import json
import math
import os
import pickletools
import random
import struct
import sys
import tempfile
import threading
import time
import zipfile
import zlib
from pathlib import Path

import numpy as np

from moco_tf.pytorch import checkpoint_files

MEMORY = 2 * 10**9  # bytes
SLOW = 5  # seconds of the processor; a pickle that uses up all operations takes 1.5
REAL = Path(__file__).parent.parent / "torch_files"
NAMES = ("types_legacy.pth", "types_zip.pth")  # small, so that many are read in a minute
NUMBERS = (0, 1, 2, 3, 4, 5, 16, 255, 256, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**48, 2**62, 2**63 - 1, 2**63)
NUMBERS += (2**64 - 1, 2**64, -1, -2, -(2**31), -(2**63), 2**200)
DTYPES = (*checkpoint_files.STORAGES, "torch.ComplexFloatStorage", "torch.storage.UntypedStorage")
CALLS = (  # what runs code, or leads to it, where a reader looks names up
    ("posix.system", ["touch hostile"]),
    ("os.system", ["touch hostile"]),
    ("builtins.eval", ["open('hostile', 'w')"]),
    ("__builtin__.exec", ["open('hostile', 'w')"]),
    ("builtins.getattr", ["x", "__class__"]),
    ("builtins.__import__", ["os"]),
    ("subprocess.Popen", [["touch", "hostile"]]),
    ("torch.load", ["hostile"]),
    ("torch.storage._load_from_bytes", [b"\x80\x02."]),
    ("numpy.core.multiarray._reconstruct", [0]),
    ("moco_tf.pytorch.checkpoint_files.write", ["hostile"]),
    ("collections.OrderedDict", []),
    ("torch._utils._rebuild_parameter", [1]),
    ("torch._utils._rebuild_tensor_v2.__globals__", []),
)
# Events of the interpreter that nothing but a reader that runs code would cause.
EVENTS = ("exec", "compile", "import", "open", "pickle.", "os.", "subprocess.", "socket.", "shutil.", "ctypes.")


class Broken(AssertionError):
    """What a reader may never do."""


def lie(draw, number, bits):
    """The number, or now and then another one of so many bits."""
    return number if draw.random() < 0.995 else draw.choice(NUMBERS) % 2**bits


def a_shape(draw):
    """Sizes that no tensor has, or hardly one."""
    numbers = (0, 1, 2**31, 2**40, 2**47) if draw.random() < 0.5 else NUMBERS
    return [draw.choice(numbers) for _ in range(draw.choice((0, 1, 2, 3, 4, 16, 17, 70)))]


# Pickles.


class Grammar:
    """Writes the opcodes of a pickle that has tensors in it, and lies; `bytes` has what was written."""

    def __init__(self, draw):
        self.draw, self.parts, self.memo = draw, [b"\x80" + bytes([draw.choice((2, 2, 4))])], 0

    def bytes(self):
        return b"".join(self.parts)

    def add(self, *parts):
        self.parts += parts

    def int(self, number):
        if 0 <= number < 256:
            self.add(b"K", bytes([number]))
        elif -(2**31) <= number < 2**31:
            self.add(b"J", struct.pack("<i", number))
        else:
            long = number.to_bytes(number.bit_length() // 8 + 1, "little", signed=True)
            self.add(b"\x8a", bytes([len(long)]), long)

    def text(self, text):
        text = text.encode(errors="surrogatepass")
        if self.draw.random() < 0.7 or len(text) > 255:
            self.add(b"X", struct.pack("<I", lie(self.draw, len(text), 32)), text)
        else:
            self.add(b"\x8c", bytes([len(text)]), text)

    def name(self, name):
        module, _, attribute = name.rpartition(".")
        if self.draw.random() < 0.8:
            self.add(f"c{module}\n{attribute}\n".encode())
        else:
            self.text(module)
            self.text(attribute)
            self.add(b"\x93")

    def tuple(self, *writers):
        if self.draw.random() < 0.5 or len(writers) > 3:
            self.add(b"(")
            self.all(writers)
            self.add(b"t")
        else:
            self.all(writers)
            self.add((b")", b"\x85", b"\x86", b"\x87")[len(writers)])

    def all(self, writers):
        for write in writers:
            write()

    def storage(self, numel):
        draw = self.draw
        key = "0" if draw.random() < 0.9 else draw.choice(("1", "2", "../0", "", "a" * 300))
        parts = [
            lambda: self.text("storage" if draw.random() < 0.97 else "module"),
            lambda: self.name(draw.choice(DTYPES) if draw.random() < 0.1 else "torch.FloatStorage"),
            lambda: self.text(key),
            lambda: self.text("cpu"),
            lambda: self.int(numel),
        ]
        if draw.random() < 0.1:
            parts.append(lambda: self.add(b"N") if draw.random() < 0.5 else self.tuple(lambda: self.int(0)))
        if draw.random() < 0.03:
            draw.shuffle(parts)
        self.tuple(*parts)
        self.add(b"Q")

    def tensor(self):
        draw = self.draw
        honest = draw.random() < 0.85
        size = list(draw.choice(((), (4,), (2, 2), (1, 4), (0, 3), (2, 1, 2), (3,))))
        if not honest:
            size = a_shape(draw)
        stride, step = [], 1
        for n in reversed(size):
            stride.insert(0, step)
            step = min(step * max(n, 1), 2**200)
        if not honest and draw.random() < 0.5:
            stride = [draw.choice(NUMBERS) for _ in range(len(size) + draw.choice((0, 0, 0, 1)))]
        numel = 4 if draw.random() < 0.95 else draw.choice(NUMBERS)
        self.name("torch._utils._rebuild_tensor_v2" if draw.random() < 0.9 else "torch._utils._rebuild_tensor")
        numbers = lambda values: self.tuple(*(lambda n=n: self.int(n) for n in values))  # noqa: E731
        parts = [
            lambda: self.storage(numel),
            lambda: self.int(0 if draw.random() < 0.95 else draw.choice(NUMBERS)),
            lambda: numbers(size),
            lambda: numbers(stride),
            lambda: self.add(b"\x89"),
            lambda: self.add(b"N") if draw.random() < 0.95 else self.value(9),
        ]
        if draw.random() < 0.01:
            parts = parts[: draw.randrange(len(parts))]
        self.tuple(*parts)
        self.add(b"R")

    def call(self):
        name, arguments = self.draw.choice(CALLS)
        self.name(name)
        self.tuple(*(lambda a=a: self.constant(a) for a in arguments))
        self.add(self.draw.choice((b"R", b"R", b"R", b"\x81", b"b", b"0", b"o", b"")))

    def constant(self, value):
        if isinstance(value, list):
            self.tuple(*(lambda v=v: self.constant(v) for v in value))
        elif isinstance(value, bytes):
            self.add(b"C", bytes([len(value)]), value)
        else:
            self.text(value) if isinstance(value, str) else self.int(value)

    def dict(self, depth, write):
        self.add(b"}" if self.draw.random() < 0.5 else b"ccollections\nOrderedDict\n)R", b"(")
        for number in range(self.draw.choice((0, 1, 1, 2, 2, 3, 3, 3))):
            self.text(
                self.draw.choice(
                    (f"layer.{number}", "w") if self.draw.random() < 0.9 else ("state_dict", "model", "a\nb", "\ud800")
                )
            )
            write(depth + 1)
        self.add(b"u")

    def value(self, depth=0):
        draw = self.draw
        kind = draw.choice(("tensor",) * 4 + ("dict", "list", "parameter", "plain", "memo", "call", "raw", "build"))
        if depth > 4 and kind not in ("plain", "raw"):
            kind = "plain"
        if kind == "tensor":
            self.tensor()
        elif kind == "dict":
            self.dict(depth, self.value)
        elif kind == "list":
            self.add(b"](")
            for _ in range(draw.choice((0, 1, 3))):
                self.value(depth + 1)
            self.add(b"e")
        elif kind == "parameter":
            self.name("torch._utils._rebuild_parameter")
            self.tuple(lambda: self.value(depth + 1), lambda: self.add(b"\x88"), lambda: self.add(b"N"))
            self.add(b"R")
        elif kind == "plain":
            self.add(
                draw.choice((b"N", b"\x88", b"G" + bytes(8), b"I00\n", b"L1L\n", b"F1e999\n", b"S'a'\n", b"}", b"]"))
            )
        elif kind == "memo":
            self.value(depth + 1)
            self.add(
                draw.choice((b"q\0", b"h\0", b"q\1h\1", b"\x94", b"j\xff\xff\xff\xff", b"p7\n", b"g9\n", b"h\xff"))
            )
        elif kind == "call":
            self.call()
        elif kind == "build":
            self.value(depth + 1)
            self.value(depth + 1)
            self.add(b"b")
        else:
            self.add(bytes([draw.randrange(256)]), draw.randbytes(draw.choice((0, 0, 1, 4, 8))))


def a_pickle(draw):
    """Bytes of a pickle: a state dict as a rule."""
    grammar = Grammar(draw)
    if draw.random() < 0.05:
        grammar.value()
    else:
        grammar.dict(0, lambda depth: grammar.tensor() if draw.random() < 0.85 else grammar.value(depth))
    grammar.add(b"." if draw.random() < 0.97 else b"")
    return grammar.bytes()


def a_bomb(draw):
    """A pickle that is small for what it asks for."""
    count = draw.choice((10**4, 10**5, 2**20, 2**22))
    part = draw.choice(
        (b"}", b"](", b"}\x94", b"(", b"]\x94h\0a", b"N", b"K\0\x85", b"}K\1Ns", b"\x85", b"h\0", b"(t")
    )
    return (
        b"\x80\x02" + draw.choice((b"", b"]q\0", b"(")) + part * (count // len(part)) + draw.choice((b".", b"t.", b""))
    )


# Files.


def a_zip(draw, pickled):
    """An archive as `torch.save` writes it, by hand, so that each field may lie."""
    members = [
        ("archive/data.pkl", pickled),
        ("archive/data/0", bytes(16 if draw.random() < 0.95 else draw.choice((32, 0)))),
    ]
    if draw.random() < 0.3:
        members.append(("archive/byteorder", b"little" if draw.random() < 0.95 else b"big"))
    if draw.random() < 0.02:
        members.append(("b/data.pkl", b""))
    if draw.random() < 0.2:
        members.append(("archive/data/1", bytes(16)))
    if draw.random() < 0.05:
        members.append(members[draw.randrange(len(members))])
    if draw.random() < 0.05:
        members += [(f"archive/{number}", b"") for number in range(draw.choice((10, 1000)))]
    out, directory, places = bytearray(), bytearray(), []
    for name, content in members:
        name = name.encode() if draw.random() < 0.99 else draw.randbytes(6)
        method = 0 if draw.random() < 0.995 else draw.choice((8, 12, 14, 99))
        stored = zlib.compress(content)[2:-4] if method == 8 else content
        flags, checksum = lie(draw, 0x800 if draw.random() < 0.5 else 0, 16), zlib.crc32(content)
        sizes = [lie(draw, checksum, 32), lie(draw, len(stored), 32), lie(draw, len(content), 32)]
        place = len(out) if draw.random() < 0.99 or not places else draw.choice(places)  # overlapping
        extra = b""
        if draw.random() < 0.02:  # the sizes and the place in 64 bits
            big = [draw.choice(NUMBERS) % 2**64 for _ in range(3)]
            extra = struct.pack("<HHQQQ", 1, lie(draw, 24, 16), *big)
            sizes[1:] = [2**32 - 1] * 2
            place = draw.choice((place, 2**32 - 1))
        places.append(len(out))
        fields = (lie(draw, 20, 16), flags, lie(draw, method, 16), 0, 0, *sizes, lie(draw, len(name), 16))
        out += b"PK\3\4" + struct.pack("<HHHHHIIIHH", *fields, 0) + name + stored
        directory += b"PK\1\2" + struct.pack(
            "<HHHHHHIIIHHHHHII", 20, *fields, len(extra), 0, 0, 0, 0, lie(draw, place, 32)
        )
        directory += name + extra
    start = len(out)
    out += directory
    if draw.random() < 0.1:  # the end in 64 bits
        fields = (44, 45, 45, 0, 0, len(members), len(members), len(directory), start)
        bits = (64, 16, 16, 32, 32, 64, 64, 64, 64)
        fields = [lie(draw, field, size) for field, size in zip(fields, bits, strict=True)]
        end = len(out)
        out += b"PK\6\6" + struct.pack("<QHHIIQQQQ", *fields)
        out += b"PK\6\7" + struct.pack("<IQI", 0, lie(draw, end, 64), 1)
    count = lie(draw, len(members), 16)
    out += b"PK\5\6" + struct.pack(
        "<HHHHIIH", 0, 0, count, count, lie(draw, len(directory), 32), lie(draw, start, 32), 0
    )
    return bytes(out)


def a_stream(draw, pickled):
    """The old format: magic, protocol, system, the tree, the keys of storages, the numbers."""

    def of(value):
        grammar = Grammar(draw)
        if isinstance(value, int):
            grammar.int(value)
        elif isinstance(value, list):
            grammar.add(b"](")
            grammar.all([lambda key=key: grammar.text(key) for key in value])
            grammar.add(b"e")
        else:
            grammar.add(b"}(")
            for key, known in value.items():
                grammar.text(key)
                grammar.add(b"\x88" if known else b"\x89")
            grammar.add(b"u")
        return grammar.bytes() + b"."

    keys = draw.choice((["0"],) * 20 + (["0", "1"], [], ["0", "0"], ["2"]))
    head = [of(checkpoint_files.LEGACY_MAGIC), of(lie(draw, 1001, 31)), of({"little_endian": draw.random() < 0.995})]
    numbers = b"".join(struct.pack("<q", lie(draw, 4, 63)) + bytes(16) for _ in keys)
    return b"".join(head) + pickled + of(keys) + numbers


def a_safetensors(draw):
    """A .safetensors file whose header may lie."""
    entries, end = {}, 0
    for number in range(draw.choice((0, *(1, 2, 3) * 5))):
        name = f"w{number}" if draw.random() < 0.95 else draw.choice(("w0", "a\nb", "\ud800", "__metadata__"))
        dtype = draw.choice(tuple(checkpoint_files.DTYPES))
        shape = draw.choice(([], [4], [2, 2], [0, 3], [3, 1, 2]))
        size = np.dtype(checkpoint_files.DTYPES[dtype]).itemsize * math.prod(shape)
        if draw.random() < 0.1:
            shape = a_shape(draw)
            size = 0 if 0 in shape else size
        if draw.random() < 0.05:
            dtype = draw.choice((*checkpoint_files.DTYPES, "F8_E4M3", "F4", "C64", "f32", ""))
        entries[name] = {
            "dtype": dtype,
            "shape": shape,
            "data_offsets": [lie(draw, end, 64), lie(draw, end + size, 64)],
        }
        end += size
    header = json.dumps(entries).encode()
    if draw.random() < 0.05:
        header = damaged(draw, header)
    return struct.pack("<Q", lie(draw, len(header), 64)) + header + bytes(end)


def a_large_directory(draw):
    """Much that describes little: entries of nothing, or a header of blanks."""
    count = draw.choice((10**3, 10**5))
    if draw.random() < 0.5:
        header = b"{" + b" " * (count * 50) + b"}"
        return struct.pack("<Q", len(header)) + header
    directory = b"PK\1\2" + struct.pack("<HHHHHHIIIHHHHHII", 20, 20, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0) + b"a"
    size = len(directory) * count
    local = b"PK\3\4" + struct.pack("<HHHHHIIIHH", 20, 0, 0, 0, 0, 0, 0, 0, 1, 0) + b"a"
    return local + directory * count + b"PK\5\6" + struct.pack("<HHHHIIH", 0, 0, 1, 1, size, len(local), 0)


def damaged(draw, data):
    """The bytes with some changed, cut out, doubled, put in, or a number in them replaced by another one."""
    data = bytearray(data)
    for _ in range(draw.choice((1, 1, 2, 4))):
        place = draw.randrange(len(data) + 1)
        kind = draw.randrange(6)
        if kind == 0 and place < len(data):
            data[place] = draw.randrange(256)
        elif kind == 1 and place < len(data):
            data[place] ^= 1 << draw.randrange(8)
        elif kind == 2:
            del data[place : place + draw.choice((1, 2, 8, 64))]
        elif kind == 3:
            part = data[place : place + draw.choice((1, 4, 32))]
            data[place:place] = part * draw.choice((1, 2, 50))
        elif kind == 4:
            size, form = draw.choice(((2, "<H"), (4, "<I"), (8, "<Q")))
            data[place : place + size] = struct.pack(form, draw.choice(NUMBERS) % 2 ** (8 * size))
        else:
            del data[place + draw.randrange(2000) :]
    return bytes(data)


def case(seed, number, real):
    """The file of this number, bytes; real: contents of real files."""
    draw = random.Random(f"{seed} {number}")
    kind = draw.random()
    if kind < 1e-4:
        pickled = a_bomb(draw)
        return draw.choice((a_zip, a_stream))(draw, pickled)
    if kind < 2e-4:
        return a_large_directory(draw)
    if kind < 0.15:
        return damaged(draw, draw.choice(real))
    if kind < 0.35:
        data = a_safetensors(draw)
    else:
        pickled = a_pickle(draw)
        if draw.random() < 0.1:
            pickled = damaged(draw, pickled)
        data = (a_zip if draw.random() < 0.5 else a_stream)(draw, pickled)
    return damaged(draw, data) if draw.random() < 0.1 else data


# Reading them.


class Guard:
    """Notes events of the interpreter while it is `on`: what a file made the reader do."""

    def __init__(self):
        self.on, self.path, self._thread = False, None, threading.get_ident()
        for encoding in ("cp437", "ascii", "latin-1", "utf-8", "unicode_escape", "raw_unicode_escape"):
            codecs.lookup(encoding)  # of names in an archive and of texts in a pickle: loaded on first use
        sys.addaudithook(self._note)  # for good

    def _note(self, event, arguments):
        if not self.on or not event.startswith(EVENTS) or threading.get_ident() != self._thread:
            return
        if event == "open" and arguments[0] == self.path:
            return
        self.on = False
        raise Broken(f"the file made the reader do this: {event} {arguments!r}"[:300])


def judge(path, data, guard):
    """Reads a file; "read" or the first words of the refusal. Raises `Broken` for what may never happen."""
    guard.path = path
    began = time.thread_time()
    guard.on = True
    try:
        arrays = checkpoint_files.read(path)
    except checkpoint_files.TorchFileError as refusal:
        guard.on = False
        text = str(refusal)
        if not text.startswith(f"{path}: ") or not text.isprintable() or len(text) > 600:
            raise Broken(f"a refusal that is not one short line: {text[:300]!r}") from None
        outcome = " ".join(text.removeprefix(f"{path}: ").split()[:3])
    else:
        guard.on = False
        outcome = "read"
        for name, array in arrays.items():
            if array.nbytes > len(data) or array.flags.writeable:
                raise Broken(f"{name[:50]!r} has {array.nbytes} bytes, its file {len(data)}")
            array.tobytes()  # touches every number
    finally:
        guard.on = False
    if time.thread_time() - began > SLOW:
        raise Broken(f"it took {time.thread_time() - began:.1f} s of the processor")
    return outcome


def real_files():
    return [(REAL / name).read_bytes() for name in NAMES]


@contextlib.contextmanager
def place():
    """A path to write each case to; in memory, where the system has such a place."""
    root = "/dev/shm" if os.path.isdir("/dev/shm") else None
    with tempfile.TemporaryDirectory(dir=root) as folder:
        yield os.path.join(folder, "case.pth")


def storm(cases, seed, guard, first=0, every=0):
    """Reads cases number `first` and on; returns a Counter of outcomes. Raises where one breaks; its file is kept."""
    outcomes, real, began = collections.Counter(), real_files(), time.perf_counter()
    with place() as path:
        for number in range(first, first + cases):
            data = case(seed, number, real)
            with open(path, "wb") as file:
                file.write(data)
            try:
                outcomes[judge(path, data, guard)] += 1
            except BaseException:
                kept = Path(tempfile.gettempdir(), f"storm-{seed}-{number}.pth")
                kept.write_bytes(data)
                print(f"Case {number} of seed {seed} breaks the reader: {kept}", file=sys.stderr)
                raise
            if every and (number + 1) % every == 0:
                print(f"{number + 1} cases, {time.perf_counter() - began:.0f} s", flush=True)
    return outcomes


def by_coverage(cases, seed, guard):
    """Lets atheris make cases of the first thousand; it ends the process, with its own summary."""
    import atheris

    with atheris.instrument_imports(include=["pickletools", "zipfile", checkpoint_files.__name__]):
        for module in (pickletools, zipfile, checkpoint_files):
            importlib.reload(module)
    with place() as path, tempfile.TemporaryDirectory() as corpus:
        real = real_files()
        for number in range(1000):
            Path(corpus, str(number)).write_bytes(case(seed, number, real))

        def one(data):
            with open(path, "wb") as file:
                file.write(data)
            judge(path, data, guard)

        limits = ["-max_len=8192", f"-timeout={SLOW}", f"-rss_limit_mb={MEMORY // 10**6}"]
        kept = f"-artifact_prefix={tempfile.gettempdir()}/storm-"
        atheris.Setup([sys.argv[0], f"-runs={cases}", f"-seed={seed + 1}", *limits, kept, corpus], one)
        atheris.Fuzz()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--coverage", action="store_true")
    arguments = parser.parse_args()
    if arguments.coverage:
        by_coverage(arguments.cases, arguments.seed, Guard())
    import resource

    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    began = time.perf_counter()
    outcomes = storm(arguments.cases, arguments.seed, Guard(), every=100_000)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6
    seconds = time.perf_counter() - began
    print(f"{arguments.cases} cases of seed {arguments.seed}: none broke the reader. {seconds:.0f} s, {peak:.0f} MB.")
    print(f"{outcomes['read']} were read; what was said of the others:")
    for outcome, count in outcomes.most_common():
        if outcome != "read":
            print(f"{count:8} {outcome}")


if __name__ == "__main__":
    main()
