"""Which engine computes a frozen encoder fastest on this processor: figures of docs/evaluation.md, "Which engine".

    python -m benchmarks.engines --image_size=128 --rounds=4

The engines compute a ResNet-50's features of normalised images. Beside --engine's choices, there are TensorFlow with
its weights as constants ("folded"), so that its graph optimiser may put BatchNorm into the convolutions, and
TensorFlow compiled by XLA. All run in one process and take turns. Prints medians, and medians and quartiles of the
rounds' ratios to TensorFlow.
"""

import argparse
import os
import statistics

from benchmarks import results, turns


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--image_size", type=int, default=224)
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", help="file to write the figures to")
    arguments = parser.parse_args()
    from moco_tf.startup import load_tensorflow

    load_tensorflow()
    import tensorflow as tf

    from moco_tf.evaluate import engines

    size, batch_size = arguments.image_size, arguments.batch_size
    images = tf.random.stateless_normal((batch_size, size, size, 3), (0, 1))
    seconds = measure(ways(images), images, arguments.rounds, engines.seconds_of)
    found = {
        "machine": turns.machine(),
        "onednn": os.environ.get("TF_ENABLE_ONEDNN_OPTS", "TensorFlow's choice"),
        "load": os.getloadavg()[0],
        "image_size": size,
        "batch_size": batch_size,
        "ways": {
            name: {
                "images_per_second": round(batch_size / statistics.median(of), 2),
                "times_tensorflow": turns.ratio(seconds["tensorflow"], of),
            }
            for name, of in seconds.items()
        },
    }
    print({name: value for name, value in found.items() if name != "ways"})
    for name, row in found["ways"].items():
        ratio = row["times_tensorflow"]
        print(
            f"{name:12} {row['images_per_second']:8.2f} images/s, {ratio['median']:.2f} {ratio['quartiles']} of TF's"
        )
    if arguments.json:
        results.write(arguments.json, found)


def measure(ways, images, rounds, seconds):
    """{name: [seconds of each round]}; the first round does not count."""
    taken = {name: [] for name in ways}
    for number in range(rounds + 1):
        for name in list(ways) if number % 2 else list(ways)[::-1]:
            taken[name].append(seconds(ways[name], images))
    return {name: of[1:] for name, of in taken.items()}


def ways(images):
    """Returns {name: function of images -> {output: array}}; prints which engines are left out."""
    import tensorflow as tf
    from tensorflow.python.framework.convert_to_constants import convert_variables_to_constants_v2

    import moco_tf
    from moco_tf import frozen
    from moco_tf.command import ConfigError
    from moco_tf.evaluate import engines

    encoder = frozen.of_model(moco_tf.encoders.resnet.resnet50(image_size=images.shape[1]))
    folded = convert_variables_to_constants_v2(encoder.encode.get_concrete_function())
    found = {
        "tensorflow": encoder.encode,
        "folded": lambda images: dict(enumerate(folded(images))),
        "XLA": tf.function(lambda images: encoder.encode(images), jit_compile=True),
    }
    views = tf.data.Dataset.from_tensors((images,))
    for engine in engines.RUNTIMES:
        try:
            found[engine] = engines.of(encoder, engine, views, len(images)).encode
        except ConfigError as error:
            print(f"Left out: {error}")
    return found


if __name__ == "__main__":
    main()
