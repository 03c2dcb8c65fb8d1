"""What --decode=fast saves on photographs, and how far its views are from exact ones.

    python -m benchmarks.decode --images=photos --size=224

Crops pairs of v2 views out of up to --count JPEGs of a folder, one after the other on one thread, both ways. Prints
milliseconds of processor time a pair, and the mean distance of the crops' pixels, of 255. Writes
docs/results/bench/decode.json.
"""

import argparse
import time
from pathlib import Path

from benchmarks import results

OUTPUT = results.file("decode")
WAYS = ("exact", "fast")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, required=True, help="folder of JPEGs")
    parser.add_argument("--size", type=int, default=224, help="side of a view in pixels")
    parser.add_argument("--count", type=int, default=40, help="images")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    arguments = parser.parse_args()

    from moco_tf.startup import load_tensorflow

    load_tensorflow(training=True)
    import numpy as np
    import tensorflow as tf

    from moco_tf.data import augment

    tf.config.threading.set_intra_op_parallelism_threads(1)
    tf.config.threading.set_inter_op_parallelism_threads(1)
    files = sorted(path for path in arguments.images.rglob("*") if path.suffix.lower() in (".jpg", ".jpeg"))
    files = files[:: max(1, len(files) // arguments.count)][: arguments.count]
    task = augment.v2(arguments.size)

    @tf.function(autograph=False)
    def pair(image, seed, decode):
        made = augment.random_crops({"image": image}, seed, (task.query, task.key), arguments.size, decode)
        return [view.image for view in made]

    seconds, distances = dict.fromkeys(WAYS, 0.0), []
    for number, path in enumerate(files):
        image, seed, views = tf.io.read_file(str(path)), tf.constant([0, number], tf.int64), {}
        for way in WAYS:
            if not number:
                pair(image, seed, way)  # is traced
            begun = time.process_time()
            views[way] = pair(image, seed, way)
            seconds[way] += time.process_time() - begun
        distances += [float(tf.reduce_mean(tf.abs(a - b))) for a, b in zip(*views.values(), strict=True)]
    found = {
        "size": arguments.size,
        "images": len(files),
        "ms": {way: round(1e3 * spent / len(files), 1) for way, spent in seconds.items()},
        "distance": {"mean": round(float(np.mean(distances)), 2), "largest": round(max(distances), 2)},
    }
    print(
        f"{len(files)} images, views of {arguments.size} pixels: exact {found['ms']['exact']} ms a pair, fast "
        f"{found['ms']['fast']} ms; mean distance {found['distance']['mean']} of 255, at most "
        f"{found['distance']['largest']} in a view"
    )
    results.write(arguments.output, found)


if __name__ == "__main__":
    main()
