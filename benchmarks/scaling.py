"""The figures of docs/scaling.md: a step's traffic between replicas (computed), and each stage's speed (measured).

    python -m benchmarks.scaling

The stages are the views of 500x375 JPEGs at 224 pixels on this machine's cores, and a ResNet-50 step on them.
"""

import argparse
import os
import time

LINKS = {"NVLink, 300 GB/s each way": 300e9, "PCIe 4.0 x16, 31.5 GB/s": 31.5e9, "100 GbE, 12.5 GB/s": 12.5e9}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--replicas", type=int, default=8)
    parser.add_argument("--batch_size", type=int, default=256, help="images, over all replicas")
    parser.add_argument("--seconds", type=float, default=20, help="of each measurement")
    arguments = parser.parse_args()
    from moco_tf.startup import load_tensorflow

    load_tensorflow(training=True)
    traffic(arguments.replicas, arguments.batch_size)
    stages(arguments.seconds)


def traffic(replicas, batch_size):
    """Prints the bytes that each replica sends in a step of v1, if replicas form rings.

    A gather passes on (R - 1) / R of the whole; a reduce passes on twice as much.
    """
    import moco_tf
    from moco_tf.methods.batch_norms import running_statistics

    model = moco_tf.MoCo(moco_tf.encoders.resnet.resnet50(), dim=128, head="linear", queue_size=256)
    parameters = sum(v.shape.num_elements() for v in model.trainable_variables)
    statistics = sum(v.shape.num_elements() for v in running_statistics(model))
    ring = (replicas - 1) / replicas
    sent = {
        "images, gathered": ring * batch_size * 224 * 224 * 3 * 4,
        "keys, gathered": ring * batch_size * model.dim * 4,
        "gradients, reduced": 2 * ring * parameters * 4,
        "statistics and metrics, reduced": 2 * ring * (statistics + len(model.METRICS) + 1 + 2 * model.dim) * 4,
    }
    print(f"sent by each of {replicas} replicas in a step of {batch_size} images (v1, ResNet-50, 224 px):")
    for what, size in sent.items():
        print(f"  {what:36} {size / 1e6:8.2f} MB")
    total = sum(sent.values())
    print(f"  {'together':36} {total / 1e6:8.2f} MB")
    for link, rate in LINKS.items():
        print(f"  at {link:33} {1e3 * total / rate:8.2f} ms")


def stages(seconds):
    """Prints source images/s of the views and of a training step."""
    import tensorflow as tf

    import moco_tf
    from moco_tf.data import augment

    smooth = tf.image.resize(tf.random.stateless_uniform((64, 24, 32, 3), (0, 0), maxval=255), (375, 500))
    jpegs = [tf.io.encode_jpeg(tf.cast(image, tf.uint8), quality=90).numpy() for image in smooth]
    photographs = tf.data.Dataset.from_tensor_slices(jpegs).repeat()
    cores = len(os.sched_getaffinity(0))
    print(f"on {cores} cores:")
    for name in ("v1", "v2"):
        batches = iter(moco_tf.views(photographs, augment.RECIPES[name](224), batch_size=16))
        print(f"  {name} views of 500x375 JPEGs  {rate(lambda b=batches: next(b), 16, seconds):8.1f} images/s")
    model = moco_tf.MoCo(moco_tf.encoders.resnet.resnet50(), head="mlp", queue_size=65536)
    model.compile(moco_tf.SGD(0.03, momentum=0.9, weight_decay=1e-4))
    batch = next(batches)
    step = tf.function(model.train_step)
    print(f"  ResNet-50 step, float32       {rate(lambda: step(batch)['loss'].numpy(), 16, seconds):8.1f} images/s")


def rate(function, images, seconds):
    """Images a second, each call handling `images`; the first call is not counted."""
    function()
    begin, calls = time.perf_counter(), 0
    while time.perf_counter() - begin < seconds:
        function()
        calls += 1
    return images * calls / (time.perf_counter() - begin)


if __name__ == "__main__":
    main()
