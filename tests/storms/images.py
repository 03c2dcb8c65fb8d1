"""Mutated images: `python tests/storms/images.py --cases=1000000 --jobs=2` decodes them as training does.

Each case is a function of the seed and its number: one of 50 small images of each format, some bytes, fields, chunks
or segments of which are changed, cut out, doubled or taken from another one. Checksums of PNGs are made right again
now and then, so that more than the checksum is asked. What the check of files passes is decoded, whole and in part.
Processes of their own decode; this one sees which case they are at, so that a crash and a hang have a number. The
storm fails where a process ends, a case takes more than SLOW processor seconds, or a process more than MEMORY.
TensorFlow's decoders are compiled without coverage, so that nothing guides the mutations but these rules.
"""

import argparse
import io
import mmap
import os
import random
import resource
import struct
import subprocess
import sys
import tempfile
import threading
import time
import zlib
from pathlib import Path

import numpy as np
from PIL import Image

SEEDS = 50  # images of each format
SLOW = 1.0  # processor seconds of a case
HANG = 20  # processor seconds after which a case is ended
STILL = 600  # seconds on the clock after which it is, which other work on the machine uses as well
HANGS = 99  # exit status of a process that ended its case
MEMORY = 2 * 10**9  # bytes that a process has resident at most
NUMBERS = (0, 1, 2, 0x7F, 0x80, 0xFF, 0x100, 0x7FFF, 0x8000, 0xFFFF, 0x10000, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF)
MARKERS = (*range(0xC0, 0xE0), 0xDA, 0xDA, 0xE1, 0xEE, 0xFE, 0x01)  # of JPEGs; the start of a scan more often
PNG_HEAD = 8
WAYS = {  # how Pillow writes the seeds of a format: (mode, settings)
    "JPEG": [
        ("RGB", {}),
        ("RGB", {"progressive": True}),
        ("RGB", {"quality": 95, "subsampling": 0}),
        ("RGB", {"restart_marker_blocks": 2}),
        ("L", {}),
        ("L", {"progressive": True}),
        ("CMYK", {}),
    ],
    "PNG": [("RGB", {}), ("RGBA", {}), ("L", {}), ("LA", {}), ("P", {}), ("1", {}), ("I;16", {})],
    "BMP": [("RGB", {}), ("L", {}), ("P", {}), ("RGBA", {})],
    "GIF": [("P", {}), ("L", {"interlace": 0}), ("P", {"frames": 3})],
    "WebP": [("RGB", {}), ("RGBA", {}), ("RGB", {"lossless": True}), ("RGBA", {"lossless": True})],
}


def seed_images():
    """{format: its `SEEDS` files, bytes}: sides of 1 to 48 pixels, smooth and noisy ones, in all of `WAYS`."""
    rng, files = np.random.default_rng(0), {}
    for format, ways in WAYS.items():
        files[format] = []
        for number in range(SEEDS):
            mode, settings = ways[number % len(ways)]
            height, width = rng.integers(1, 49, 2).tolist()
            pixels = rng.integers(0, 256, (height, width, 3), np.uint8)
            if number % 2:
                pixels = np.sort(pixels, axis=0)  # smooth ones compress
            image = Image.fromarray(pixels)
            image = Image.fromarray(pixels[..., 0].astype(np.uint16) * 257) if mode == "I;16" else image.convert(mode)
            settings = dict(settings)
            if frames := settings.pop("frames", 0):
                settings |= {"save_all": True, "append_images": [image.rotate(90 * k) for k in range(1, frames)]}
            file = io.BytesIO()
            image.save(file, format, **settings)
            files[format].append(file.getvalue())
    return files


def mutated(files, seed, number):
    """(format, bytes) of a case."""
    draw = random.Random(seed * 2**40 + number)
    format = draw.choice(list(files))
    data = bytearray(draw.choice(files[format]))
    if format == "PNG" and draw.random() < 0.5:
        data = _mutated_png(draw, data)
    if format == "WebP" and draw.random() < 0.1:  # without the chunk's name, which libwebp does not ask for
        del data[12:20]
        data[4:8] = struct.pack("<I", len(data) - 8)
    for _ in range(draw.choice((0, 1, 1, 1, 2, 4, 16)) if format == "PNG" else draw.choice((1, 1, 1, 2, 4, 16))):
        change = draw.choice((_byte, _byte, _bit, _number, _cut, _double, _remove, _splice, _marker))
        if data:
            change(draw, data, files[format])
    return format, bytes(data)


def _byte(draw, data, _):
    data[_place(draw, data)] = draw.randrange(256)


def _bit(draw, data, _):
    data[_place(draw, data)] ^= 1 << draw.randrange(8)


def _number(draw, data, _):
    place, size = _place(draw, data), draw.choice((1, 2, 4))
    number = draw.choice(NUMBERS) % 256**size
    data[place : place + size] = number.to_bytes(size, draw.choice(("big", "little")))


def _cut(draw, data, _):
    del data[_place(draw, data) :]


def _double(draw, data, _):
    start, length = _place(draw, data), draw.choice((1, 2, 16, 256))
    data[start:start] = data[start : start + length] * draw.choice((1, 2, 100))


def _remove(draw, data, _):
    start = _place(draw, data)
    del data[start : start + draw.choice((1, 2, 16, 256))]


def _splice(draw, data, others):
    other = draw.choice(others)
    start = draw.randrange(len(other))
    data[_place(draw, data) :] = other[start:]


def _marker(draw, data, _):
    """A JPEG's marker, which other formats take as two bytes."""
    place = _place(draw, data)
    data[place:place] = bytes([0xFF, draw.choice(MARKERS)]) + draw.choice((b"", b"\0\2", b"\0\x0b\x08\0\x20\0\x20\3"))


def _place(draw, data):
    """Headers are short and say most: half of the places lie in the first 64 bytes."""
    return draw.randrange(min(len(data), 64)) if draw.random() < 0.5 else draw.randrange(len(data))


def _mutated_png(draw, data):
    """A PNG with a field, a chunk or the pixels' own bytes changed, and checksums that fit."""
    chunks, place = [], PNG_HEAD
    while place + 12 <= len(data):
        (length,) = struct.unpack(">I", data[place : place + 4])
        chunks.append([bytes(data[place + 4 : place + 8]), bytearray(data[place + 8 : place + 8 + length])])
        place += 12 + length
    chosen = draw.randrange(len(chunks))
    name, body = chunks[chosen]
    what = draw.random()
    if what < 0.1:
        chunks.insert(draw.randrange(len(chunks)), [draw.choice((b"PLTE", b"tRNS", b"IDAT", b"zTXt", b"gAMA")), body])
    elif what < 0.2:
        del chunks[chosen]
    elif name == b"IDAT":
        rows = bytearray(zlib.decompress(body))
        for _ in range(draw.choice((1, 4, 64))):
            if rows:
                draw.choice((_byte, _cut, _double, _remove))(draw, rows, ())
        chunks[chosen][1] = zlib.compress(rows)
    elif body:
        draw.choice((_byte, _bit, _number))(draw, body, ())
    parts = [struct.pack(">I", len(b)) + n + b + struct.pack(">I", zlib.crc32(n + b)) for n, b in chunks]
    return bytearray(bytes(data[:PNG_HEAD]) + b"".join(parts))


def decoder():
    """A function of bytes: whether the check of files passes them; those are decoded, whole and in part."""
    import tensorflow as tf

    from moco_tf.data import encoded, image_ops
    from moco_tf.data.errors import ERRORS

    session = tf.compat.v1.Session(graph=tf.Graph())  # a refusal takes a fraction of a TensorFlow function's time

    def callable_of(function, *specs):
        traced = tf.function(function, input_signature=specs, autograph=False).get_concrete_function()
        with session.graph.as_default():
            inputs = [tf.compat.v1.placeholder(spec.dtype, spec.shape) for spec in specs]
            return session.make_callable(traced(*inputs), inputs)

    scalar = tf.TensorSpec((), tf.string)
    verify, header, decode = (callable_of(f, scalar) for f in (encoded.verify, encoded.header, encoded.decode))
    crop = callable_of(
        lambda data, box: image_ops.crops(data, lambda *_: [tuple(tf.unstack(box))])[0],
        *(scalar, tf.TensorSpec((4,), tf.int32)),
    )

    def look(data):
        try:
            _, height, width, _ = verify(data).tolist()
        except ERRORS:
            return False
        kind, *declared = (int(number) for number in header(data))
        larger = height <= declared[0] and width <= declared[1] and kind == encoded.GIF  # of canvas and frame
        assert larger or declared == [height, width], f"declared as {declared}, checked as {height} x {width}"
        shape = decode(data).shape
        assert shape == (height, width, 3), f"decoded to {shape}, checked as {height} x {width}"
        box = [height // 3, width // 3, height - height // 3, width - width // 3]
        assert crop(data, box).shape == (*box[2:], 3)
        return True

    return look


def work(first, last, seed, place):
    """Decodes cases; the number of each stands in the file `place` before its turn. Prints what is slow, and a sum."""
    from moco_tf.startup import load_tensorflow, stderr_to

    load_tensorflow()
    files, look, passed = seed_images(), decoder(), 0
    with open(place, "r+b") as file, mmap.mmap(file.fileno(), 8) as at, stderr_to(open(os.devnull, "w")):
        for format in files:
            for data in files[format][:8]:
                look(data)  # what is traced and loaded once is no case's
        began = [time.process_time()]
        threading.Thread(target=_end_hanging, args=(began,), daemon=True).start()
        for number in range(first, last):
            format, data = mutated(files, seed, number)
            at[:] = struct.pack("<q", number)
            began[0] = begun = time.process_time()
            try:
                passed += look(data)
            except Exception as error:  # whatever the check had promised and decoding does not keep
                print(f"wrong {number} {format} {type(error).__name__}: {str(error).splitlines()[0]}", flush=True)
            if (seconds := time.process_time() - begun) > SLOW:
                print(f"slow {number} {format} {seconds:.1f} s", flush=True)
            if number % 1000 == 999 or number == last - 1:
                memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
                print(f"sum {number + 1} {passed} {memory}", flush=True)


def _end_hanging(began):
    while time.process_time() - began[0] < HANG:
        time.sleep(1)
    os._exit(HANGS)


def storm(cases, seed, jobs, keep):
    """Runs all cases in `jobs` processes; returns how many failed."""
    files, begun = seed_images(), time.monotonic()
    shares = [(cases * job // jobs, cases * (job + 1) // jobs) for job in range(jobs)]
    failures, passed, memory = [], 0, 0
    with tempfile.TemporaryDirectory() as folder:
        running = [Share(first, last, seed, Path(folder, f"at-{first}")) for first, last in shares]
        while running:
            time.sleep(0.5)
            for share in list(running):
                share.look()
                if share.is_done:
                    running.remove(share)
                    failures += share.failures
                    passed, memory = passed + share.passed, max(memory, share.memory)
    for number, said in failures:
        format, data = mutated(files, seed, number)
        path = keep / f"{seed}-{number}.{format.lower()}"
        keep.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        print(f"FAILED: case {number}: {said}: {path}")
    too_much = memory > MEMORY
    print(
        f"{cases} cases, seed {seed}: {passed} passed the check and were decoded, the others refused; "
        f"{len(failures)} failures; at most {memory / 1e9:.2f} GB a process; {time.monotonic() - begun:.0f} s"
    )
    return len(failures) + too_much


class Share:
    """A process at its share of the cases; another one takes over behind a case that ends it."""

    def __init__(self, first, last, seed, place):
        self.last, self.seed, self.place = last, seed, place
        self.failures, self.passed, self.memory = [], 0, 0
        self._start(first)

    def _start(self, first):
        self.place.write_bytes(struct.pack("<q", first))
        self.output = tempfile.TemporaryFile("w+")  # noqa: SIM115
        words = [sys.executable, __file__, f"--work={first},{self.last}", f"--seed={self.seed}", str(self.place)]
        self.process = subprocess.Popen(words, stdout=self.output, stderr=subprocess.STDOUT)
        self.at, self.since, self.is_done = None, time.monotonic(), False

    def look(self):
        """Takes note of what has happened since the last look."""
        (at,) = struct.unpack("<q", self.place.read_bytes())
        if at != self.at:
            self.at, self.since = at, time.monotonic()
        status = self.process.poll()
        hangs = status is None and time.monotonic() - self.since > STILL
        if hangs:
            self.process.kill()
            self.process.wait()
        if status is None and not hangs:
            return
        sums = []
        self.output.seek(0)
        for line in self.output.read().splitlines():
            kind, *rest = line.split(" ", 2)
            if kind in ("wrong", "slow"):
                self.failures.append((int(rest[0]), f"{kind}: {rest[1]}"))
            elif kind == "sum":
                sums = [int(x) for x in line.split()[2:]]
        if sums:
            self.passed, self.memory = self.passed + sums[0], max(self.memory, sums[1])
        if status == 0:
            self.is_done = True
            return
        self.failures.append((at, "hangs" if hangs or status == HANGS else f"the process ended with {status}"))
        if at + 1 < self.last:
            self._start(at + 1)
        else:
            self.is_done = True


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=2, help="processes")
    parser.add_argument("--keep", type=Path, default=Path("storm-images"), help="folder for the files that failed")
    parser.add_argument("--work", help=argparse.SUPPRESS)
    parser.add_argument("place", nargs="?", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    sys.path.insert(0, str(Path(__file__).parents[2]))
    if arguments.work:
        work(*map(int, arguments.work.split(",")), arguments.seed, arguments.place)
    else:
        sys.exit(1 if storm(arguments.cases, arguments.seed, arguments.jobs, arguments.keep) else 0)
