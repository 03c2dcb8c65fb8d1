"""What MoCo costs a ResNet-50 step beside its encoders' passes: momentum, loss, diagnostics and queue, at K 65,536.

    python -m benchmarks.overhead

The whole step takes turns with these parts alone, which get queries and keys as inputs. Writes
docs/results/bench/overhead.json. `benchmarks.replicas` measures the same as a difference, for several replicas.
"""

import argparse
import os
import statistics
import time
from pathlib import Path

from benchmarks import results

OUTPUT = results.file("overhead")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--queue_size", type=int, default=65536, help="K")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--output", type=Path, default=OUTPUT)
    arguments = parser.parse_args()
    from moco_tf.startup import load_tensorflow

    load_tensorflow(training=True)
    import tensorflow as tf

    import moco_tf
    from moco_tf.methods.batch_norms import running_statistics
    from moco_tf.methods.ema import ema_update
    from moco_tf.methods.losses import Contrast, info_nce, unit_length

    model = moco_tf.MoCo(
        moco_tf.encoders.resnet.resnet50(), head="mlp", queue_size=arguments.queue_size, temperature=0.2
    )
    model.compile(moco_tf.SGD(0.03, momentum=0.9, weight_decay=1e-4))
    shape = (arguments.batch_size, 224, 224, 3)
    views = tuple(tf.random.stateless_normal(shape, (0, view)) for view in (0, 1))
    queries, keys = (unit_length(tf.random.stateless_normal((arguments.batch_size, 128), (1, i))) for i in (0, 1))

    def momentum():
        ema_update(model.query_encoder, model.key_encoder, model.momentum)

    def loss():
        with tf.GradientTape() as tape:
            tape.watch(queries)
            contrast = info_nce(queries, keys, model.queue.keys.value, model.temperature)
        return tape.gradient(contrast.loss, queries), *contrast

    def metrics():
        return model._reduce_over_replicas(
            Contrast(*[queries[:, i] for i in range(5)], queries), running_statistics(model)
        )

    parts = {
        "step": lambda: model.train_step(views),
        "momentum encoder's weights": momentum,
        "InfoNCE and its gradient": loss,
        "metrics": metrics,
        "enqueuing": lambda: model.queue.enqueue(keys),
    }
    functions = {name: tf.function(part) for name, part in parts.items()}
    seconds = {name: [] for name in parts}
    for _ in range(arguments.rounds + 1):  # the first traces
        for name, function in functions.items():
            begin = time.perf_counter()
            for value in tf.nest.flatten(function()):
                value is not None and value.numpy()
            model.step.numpy()
            seconds[name].append(time.perf_counter() - begin)
    found = {name: statistics.median(times[1:]) for name, times in seconds.items()}
    step = found.pop("step")
    print(f"{len(os.sched_getaffinity(0))} cores; a step of {arguments.batch_size} images: {step:.3f} s, of that")
    for name, time_of_part in found.items():
        print(f"  {name:28} {1e3 * time_of_part:8.2f} ms {time_of_part / step:7.2%}")
    share = sum(found.values()) / step
    print(f"  {'together':28} {1e3 * sum(found.values()):8.2f} ms {share:7.2%}")
    row = {"batch_size": arguments.batch_size, "K": arguments.queue_size, "rounds": arguments.rounds}
    row |= {"step_s": step, "parts_s": found, "share": share}
    results.write(arguments.output, row)


if __name__ == "__main__":
    main()
