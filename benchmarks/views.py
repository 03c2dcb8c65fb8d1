"""Pairs of v2 views from JPEG files, beside torchvision's transforms on Pillow images in PyTorch's DataLoader.

    python -m benchmarks.views

All read the same 256 files of 500x375 pixels and make batches of 16 pairs at 224 pixels, with as many workers or
threads as there are cores, in processes of their own that take turns. moco_tf also reads them with --decode=fast, and
from files that moco_tf.data.convert has shrunk to 256 pixels. Needs the extras `torch` and `convert`. Writes
docs/results/bench/views.json.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks import results, turns

OUTPUT = results.file("views")
FILES, BATCH = 256, 16
WAYS = {  # folder of the files, --decode
    "moco_tf": ("images", "exact"),
    "--decode=fast": ("images", "fast"),
    "256 pixels": ("converted", "exact"),
}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--images", type=int, default=512, help="of each round")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)  # serve this way on this folder, in this process
    arguments = parser.parse_args()
    if arguments.one:
        way, folder = arguments.one
        turns.serve(batches(pairs(way, Path(folder)), arguments.images // BATCH))
        return
    with tempfile.TemporaryDirectory() as folder:
        write_jpegs(Path(folder))
        commands = {
            way: ["-m", "benchmarks.views", f"--images={arguments.images}", "--one", way, folder]
            for way in (*WAYS, "torchvision")
        }
        seconds = turns.take(commands, arguments.rounds)
    rates = {way: round(arguments.images / statistics.median(times), 1) for way, times in seconds.items()}
    times_as_many = {way: turns.ratio(seconds["torchvision"], seconds[way]) for way in WAYS}
    cores = len(os.sched_getaffinity(0))
    print(f"pairs of v2 views at 224 px from 500x375 JPEGs, {cores} cores, {arguments.rounds} rounds")
    for way, rate in rates.items():
        print(f"{way:14} {rate:8.1f} source images/s")
    for way, ratio in times_as_many.items():
        low, high = ratio["quartiles"]
        print(f"{way}: {ratio['median']:.2f} ({low:.2f} to {high:.2f}) times as many as torchvision")
    found = {"machine": turns.machine(), "cores": cores, "rounds": arguments.rounds}
    results.write(arguments.output, found | {"images_per_second": rates, "times_torchvision": times_as_many})


def write_jpegs(folder):
    """Writes files of smooth noise, which take a JPEG decoder about as long as photographs of this size."""
    import numpy as np
    from PIL import Image

    random = np.random.default_rng(0)
    (folder / "images").mkdir()
    for number in range(FILES):
        pixels = random.integers(0, 256, (24, 32, 3), np.uint8)
        Image.fromarray(pixels).resize((500, 375), Image.BICUBIC).save(folder / f"images/{number:03}.jpg", quality=90)
    flags = [f"--images={folder}/images", f"--output={folder}/converted", "--size=256"]
    subprocess.run([sys.executable, "-m", "moco_tf.data.convert", *flags], check=True, stdout=subprocess.DEVNULL)


def pairs(way, folder):
    """Endless batches of pairs, made this way."""
    if way == "torchvision":
        return torchvision(folder / "images", len(os.sched_getaffinity(0)))
    images, decode = WAYS[way]
    return ours(folder / images, decode)


def batches(endless, count):
    """A function that takes `count` batches of an endless iterator."""

    def take():
        for _ in range(count):
            next(endless)

    return take


def ours(folder, decode):
    """moco_tf's own pipeline, with which the trainer reads a folder."""
    from moco_tf.startup import load_tensorflow

    load_tensorflow(training=True)
    from moco_tf.data import augment, views
    from moco_tf.data.folder import scan
    from moco_tf.data.manifest import check_files

    source, v2 = check_files(scan(folder)).source(), augment.v2(224)

    def task(record, seed):
        return tuple(augment.random_views(record, seed, (v2.query, v2.key), v2.preprocessing, decode))

    return iter(views.batches(source, task, BATCH, seed=0))


def torchvision(folder, cores):
    """The authors' transforms, in the library that they used, with one worker process per core."""
    import random

    import torch
    from PIL import Image, ImageFilter
    from torch.utils.data import DataLoader, Dataset

    from benchmarks.bare_torchvision import torchvision

    transforms = torchvision.transforms

    def blur(image):
        return image.filter(ImageFilter.GaussianBlur(random.uniform(0.1, 2.0)))

    view = transforms.Compose(
        [
            transforms.RandomResizedCrop(224, scale=(0.2, 1.0)),
            transforms.RandomApply([transforms.ColorJitter(0.4, 0.4, 0.4, 0.1)], p=0.8),
            transforms.RandomGrayscale(p=0.2),
            transforms.RandomApply([blur], p=0.5),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        ]
    )
    files = sorted(folder.glob("*.jpg"))

    class Pairs(Dataset):
        def __len__(self):
            return 2**40

        def __getitem__(self, number):
            with open(files[number % len(files)], "rb") as file:
                image = Image.open(file).convert("RGB")
            return view(image), view(image)

    torch.set_num_threads(1)
    return iter(DataLoader(Pairs(), BATCH, num_workers=cores))


if __name__ == "__main__":
    main()
