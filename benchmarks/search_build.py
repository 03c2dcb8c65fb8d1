"""How long search.build takes beside its encoder: seconds to read, check and encode the images, and everything else.

    python -m benchmarks.search_build --encoder=runs/photos --files=200000

The images are copies of the embedded ones, 32 pixels wide, each in a file of its own. Everything else is to scan the
folder, save the parts, sort them into one index, and write that to disk. Writes docs/results/bench/search_build.json.
"""

import argparse
import tempfile
import time
from pathlib import Path

from benchmarks import results
from benchmarks.folder_start import fill

OUTPUT = results.file("search_build")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--encoder", required=True, help="run folder or SavedModel")
    parser.add_argument("--files", type=int, default=200_000)
    parser.add_argument("--index_type", default="auto")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    arguments = parser.parse_args()

    from moco_tf.startup import load_tensorflow

    load_tensorflow()
    with tempfile.TemporaryDirectory() as folder:
        photos = Path(folder) / "photos"
        fill(photos, arguments.files)
        whole, encoding = build(photos, Path(folder) / "index", arguments)
    rest = whole - encoding
    print(f"{arguments.files} images: encoder {encoding:.1f} s, everything else {rest:.1f} s, {rest / encoding:.1%}")
    settings = {name: str(value) for name, value in vars(arguments).items() if name != "output"}
    seconds = {"encoder": round(encoding, 1), "everything_else": round(rest, 1)}
    results.write(arguments.output, {"settings": settings, "seconds": seconds})


def build(photos, folder, arguments):
    """Builds an index; returns the seconds of the whole command, and those of encoding."""
    from moco_tf.search import build, encode

    encode_listing, spent = encode.encode_listing, []

    def timed(*given):
        started = time.perf_counter()
        part = encode_listing(*given)
        spent.append(time.perf_counter() - started)
        return part

    encode.encode_listing = timed
    flags = [f"--encoder={arguments.encoder}", f"--images={photos}", f"--output={folder}"]
    started = time.perf_counter()
    if build.main([*flags, f"--index_type={arguments.index_type}"]):
        raise SystemExit(1)
    return time.perf_counter() - started, sum(spent)


if __name__ == "__main__":
    main()
