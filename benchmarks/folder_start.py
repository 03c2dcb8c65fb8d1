"""Time from the start to the first batch of a folder of many files, at the first and the second start, and memory.

    python -m benchmarks.folder_start --folder=DIR --files=200000

makes DIR from copies of the embedded images, if it is not there. It measures each start in a fresh process that has
made a batch of the embedded images before, to the first batch of views. Memory is the process's peak beyond its peak
at that point.
"""

import argparse
import pathlib
import resource
import subprocess
import sys
import tempfile
import time


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", required=True, type=pathlib.Path)
    parser.add_argument("--files", type=int, default=200_000)
    parser.add_argument("--manifest", help=argparse.SUPPRESS)  # one start, in a process of its own
    arguments = parser.parse_args()
    if arguments.manifest:
        found = measure(arguments.folder, arguments.manifest)
        parts = ", ".join(f"{name} {found[name]:.1f}" for name in ("listing", "check", "source and batch"))
        print(
            f"{found['files']} files, {found['seconds']:.1f} s to the first batch ({parts}), "
            f"{found['processor time']:.1f} s of processor time, {found['mb']:.0f} MB more memory"
        )
        return
    if not arguments.folder.exists():
        fill(arguments.folder, arguments.files)
    with tempfile.TemporaryDirectory() as folder:
        for name in ("first start", "second start"):
            print(f"{name}: ", end="", flush=True)
            command = [sys.executable, "-m", "benchmarks.folder_start", f"--folder={arguments.folder}"]
            subprocess.run([*command, f"--manifest={folder}/manifest.csv"], check=True)


def fill(folder, files):
    from moco_tf.data import sources

    images = [record["image"] for record in sources.embedded("train").in_order().as_numpy_iterator()]
    for number in range(files):
        place = folder / f"{number // 1000:03d}"
        if number % 1000 == 0:
            place.mkdir(parents=True)
        (place / f"{number:06d}.jpg").write_bytes(images[number % len(images)])


def measure(path, manifest):
    """Starts on a folder, up to the first batch of views; returns {"files", "seconds", its parts, "mb"}."""
    from moco_tf.startup import load_tensorflow

    load_tensorflow()
    from moco_tf.data import augment, folder, sources
    from moco_tf.data.manifest import check_files
    from moco_tf.data.views import batches

    next(iter(batches(sources.embedded("train"), augment.cifar(32), 64, seed=0)))  # what any training needs
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    began, worked = time.perf_counter(), time.process_time()
    listing = folder.scan(path)
    scanned = time.perf_counter()
    checked = check_files(listing, manifest)
    verified = time.perf_counter()
    source = checked.source()
    next(iter(batches(source, augment.cifar(32), 64, seed=0)))
    ended, worked = time.perf_counter(), time.process_time() - worked
    return {
        "files": source.size,
        "seconds": ended - began,
        "listing": scanned - began,
        "check": verified - scanned,
        "source and batch": ended - verified,
        "processor time": worked,
        "mb": (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024,
    }


if __name__ == "__main__":
    main()
