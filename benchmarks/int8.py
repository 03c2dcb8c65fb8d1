"""What 8 bits give and cost: the figures of docs/serving.md, "In 8 bits".

    python -m moco_tf.train --flagfile=configs/quickstart.flags --run_dir=runs/quickstart
    python -m benchmarks.int8 --run_dir=runs/quickstart

Exports the run's encoder, and a ResNet-50 of random weights, as float32 and int8 ONNX files. Prints the cosine between
the run's features in float32 and int8, and each file's kNN top-1 on the embedded test images (k 200, t 0.1). Also
prints each file's images/s. The files take turns; the figures are medians, and median and quartiles of the rounds'
ratios.
"""

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path

from benchmarks import results, turns


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run_dir", required=True, help="of configs/quickstart.flags")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", help="file to write the figures to")
    arguments = parser.parse_args()
    from moco_tf.startup import load_tensorflow

    load_tensorflow()
    from moco_tf import build

    with tempfile.TemporaryDirectory() as folder:
        files, agreement = export(build.trained(arguments.run_dir), Path(folder) / "run")
        found = {
            "machine": turns.machine(),
            "vnni": "vnni" in Path("/proc/cpuinfo").read_text(),
            "load": os.getloadavg()[0],
            "mebibytes": {kind: round(file.stat().st_size / 2**20, 2) for kind, file in files.items()},
            "cosine": agreement.mean,
            "knn_top1": {kind: round(knn(file), 2) for kind, file in files.items()},
            "throughput": {"the run's encoder": throughput(files, 32, 256, arguments.rounds)},
        }
        files, _ = export(resnet50(), Path(folder) / "resnet50", number=16, least=-1)
        found["throughput"]["ResNet-50, 224 pixels"] = throughput(files, 256, 16, arguments.rounds)
    for name, value in found.items():
        print(f"{name}: {value}")
    if arguments.json:
        results.write(Path(arguments.json), found)


def resnet50():
    import moco_tf

    return moco_tf.MoCo(moco_tf.encoders.resnet.resnet50(), dim=128, head="mlp", queue_size=256)


def export(model, folder, **options):
    """({"float32", "int8": the file}, the `Agreement` of int8) of a model."""
    from moco_tf.data import sources
    from moco_tf.serving import int8_file, onnx_file

    files = {kind: folder / f"{kind}.onnx" for kind in ("float32", "int8")}
    onnx_file.export(model, files["float32"])
    return files, int8_file.export(model, files["int8"], sources.embedded("train"), **options)


def knn(file):
    """kNN top-1 of a file's features of the embedded test images, with the training images as the bank."""
    import numpy as np

    from moco_tf.data import encoded, sources
    from moco_tf.evaluate import nearest_neighbors
    from moco_tf.serving import onnx_file

    session, splits = onnx_file.session(str(file)), []
    for split in ("train", "test"):
        source = sources.embedded(split)
        batches = source.in_order().map(lambda record: encoded.decode(record["image"])).batch(256)
        features = [session.run(["features"], {"images": batch})[0] for batch in batches.as_numpy_iterator()]
        splits.append((np.concatenate(features), source.labels.numpy()))
    return nearest_neighbors.accuracy(*splits[0], *splits[1], len(source.class_names))


def throughput(files, side, batch_size, rounds):
    """Returns each file's throughput on square uint8 images, in images/s, and int8's relative to float32's."""
    import numpy as np

    from moco_tf.serving import onnx_file

    images = np.random.default_rng(0).integers(0, 256, (batch_size, side, side, 3), np.uint8)
    sessions = {kind: onnx_file.session(str(file)) for kind, file in files.items()}
    seconds = {kind: [] for kind in sessions}
    for number in range(rounds + 1):  # the first one warms up
        for kind, session in list(sessions.items())[:: 1 if number % 2 else -1]:
            begin = time.perf_counter()
            session.run(None, {"images": images})
            seconds[kind] += [time.perf_counter() - begin] if number else []
    rates = {kind: round(batch_size / statistics.median(of), 2) for kind, of in seconds.items()}
    return {"images_per_second": rates, "int8_times_float32": turns.ratio(seconds["float32"], seconds["int8"])}


if __name__ == "__main__":
    main()
