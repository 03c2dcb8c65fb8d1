"""What an exported ResNet-50 costs, beside other ways to run one: the figures of docs/serving.md.

    python -m benchmarks.serving --json=docs/results/bench/serving.json

Each way takes uint8 images of 500x375 pixels, resizes, crops and normalises them, and encodes them. The ways take
turns, one round after another, so that other work on the machine affects all of them. Prints medians. Leaves out, with
a message, ways whose extra (`onnx` or `torch`) is not installed.
"""

import argparse
import importlib.metadata
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

from benchmarks import results

HEIGHT, WIDTH = 375, 500


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--calls", type=int, default=3, help="of batch 1 in a round; batch 32 has one")
    parser.add_argument("--json", help="file to write the figures to")
    arguments = parser.parse_args()
    from moco_tf.startup import load_tensorflow

    load_tensorflow()
    import numpy as np

    smooth = np.random.default_rng(0).integers(0, 256, (32, 24, 32, 3), np.uint8)
    images = smooth.repeat(16, axis=1).repeat(16, axis=2)[:, :HEIGHT, :WIDTH].copy()
    with tempfile.TemporaryDirectory() as folder:
        found = measure(ways(Path(folder), images), arguments.rounds, arguments.calls)
    cores, load = len(os.sched_getaffinity(0)), os.getloadavg()[0]
    names = [name for name in ("tensorflow", "onnxruntime", "torch", "torchvision") if name in sys.modules]
    packages = {name: importlib.metadata.version(name) for name in names}
    print(f"{cores} cores, load {load:.1f}, {arguments.rounds} rounds, {packages}")
    for name, row in found.items():
        print(f"{name:44} {row['latency_ms']:8.0f} ms at batch 1 {row['images_per_second']:8.2f} images/s at batch 32")
    if arguments.json:
        head = {"cores": cores, "load": load, "rounds": arguments.rounds, "packages": packages}
        results.write(Path(arguments.json), head | {"ways": found})


def measure(ways, rounds, calls):
    """{name: {"latency_ms", "images_per_second"}}, medians over the rounds."""
    ones, batches = {name: [] for name in ways}, {name: [] for name in ways}
    for number in range(rounds + 1):  # the first round warms up
        for name, run in ways.items():
            one = [seconds(run, 1) for _ in range(calls)]
            batch = seconds(run, 32)
            if number:
                ones[name] += one
                batches[name].append(batch)
    return {
        name: {
            "latency_ms": round(1e3 * statistics.median(ones[name]), 1),
            "images_per_second": round(32 / statistics.median(batches[name]), 2),
        }
        for name in ways
    }


def seconds(run, number):
    begin = time.perf_counter()
    run(number)
    return time.perf_counter() - begin


def ways(folder, images):
    """{name: function of the number of images to run}."""
    import numpy as np
    import tensorflow as tf

    import moco_tf
    from moco_tf.command import ConfigError
    from moco_tf.serving import onnx_file

    model = moco_tf.MoCo(moco_tf.encoders.resnet.resnet50(), dim=128, head="mlp", queue_size=256)
    moco_tf.export_encoder(model, folder / "1")
    signatures = tf.saved_model.load(str(folder / "1")).signatures
    jpegs = np.array([tf.io.encode_jpeg(image, quality=90).numpy() for image in images])
    pixels, encoded = signatures["serving_default"], signatures["encoded_images"]
    found = {
        "SavedModel, serving_default": lambda n: pixels(images=tf.constant(images[:n])),
        "SavedModel, encoded_images (decodes JPEGs)": lambda n: encoded(images=tf.constant(jpegs[:n])),
        "model.predict": lambda n: model.predict(images[:n], batch_size=n, verbose=0),
    }
    try:
        onnx_file.export(model, folder / "encoder.onnx")
        import onnxruntime

        session = onnxruntime.InferenceSession(folder / "encoder.onnx", providers=["CPUExecutionProvider"])
        found["ONNX Runtime"] = lambda n: session.run(None, {"images": images[:n]})
    except ConfigError as error:
        print(f"Left out: {error}")
    try:
        found["PyTorch, torchvision's resnet50"] = torchvision_way(images)
    except ImportError as error:
        print(f"Left out: PyTorch ({error}): pip install -e '.[torch]'")
    return found


def torchvision_way(images):
    import torch

    from benchmarks.bare_torchvision import torchvision

    functional = torchvision.transforms.functional

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    model = torchvision.models.resnet50().eval()

    @torch.inference_mode()
    def run(number):
        batch = torch.from_numpy(images[:number]).permute(0, 3, 1, 2).float() / 255
        batch = functional.center_crop(functional.resize(batch, 256, antialias=True), 224)
        return model(functional.normalize(batch, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])).numpy()

    return run


if __name__ == "__main__":
    main()
