"""What several replicas cost: a MoCo step beside the same encoder passes alone, at one global batch.

    python -m benchmarks.replicas --arch=resnet50 --batch_size=32 --replicas=1,2,4

Each number of replicas gets a process of its own (TensorFlow divides a CPU once). In this process, the whole step and
the passes alone (query forward and backward, key forward, on each replica) take turns. The figures are medians of
paired runs, and the quartiles of the share of a step that is neither forward nor backward. Writes
docs/results/bench/replicas.json.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

from benchmarks import results

OUTPUT = results.file("replicas")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", default="resnet50")
    parser.add_argument("--image_size", type=int, default=224, help="pixels")
    parser.add_argument("--batch_size", type=int, default=32, help="images, over all replicas")
    parser.add_argument("--replicas", default="1,2,4")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--output", type=Path, default=OUTPUT)
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)  # measure this number, in this process
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(measure(arguments)))
        return
    rows = []
    print(f"{arguments.arch}, {arguments.image_size} px, global batch {arguments.batch_size}, medians of seconds")
    print(f"{'replicas':>8} {'step':>8} {'passes':>8} {'the rest':>9} {'quartiles':>15}")
    for replicas in map(int, arguments.replicas.split(",")):
        command = [sys.executable, "-m", "benchmarks.replicas", f"--one={replicas}", *sys.argv[1:]]
        output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        row = json.loads(output.splitlines()[-1])
        low, middle, high = row["rest_share_quartiles"]
        print(f"{replicas:8} {row['step_s']:8.3f} {row['passes_s']:8.3f} {middle:9.1%} {low:7.1%} {high:7.1%}")
        rows.append(row)
    results.write(arguments.output, {"command": " ".join(sys.argv[1:]), "rows": rows})


def measure(arguments):
    from moco_tf.startup import load_tensorflow

    load_tensorflow(arguments.one if arguments.one > 1 else 0, training=True)
    import numpy as np
    import tensorflow as tf

    import moco_tf
    from moco_tf import replicas

    number = arguments.one
    strategy = replicas.on_one_cpu(number) if number > 1 else tf.distribute.get_strategy()
    with strategy.scope():
        backbone = getattr(moco_tf.encoders.resnet, arguments.arch)(image_size=arguments.image_size)
        model = moco_tf.MoCo(backbone, head="mlp", queue_size=65536, temperature=0.2)
        model.compile(moco_tf.SGD(0.03, momentum=0.9, weight_decay=1e-4))
    shape = (arguments.batch_size, arguments.image_size, arguments.image_size, 3)
    batch = tf.random.stateless_normal(shape, (0, 0)), tf.random.stateless_normal(shape, (0, 1))
    data = next(iter(strategy.experimental_distribute_dataset(tf.data.Dataset.from_tensors(batch))))

    def passes(pair):
        query, key = pair
        keys = model.key_encoder(key, training=True)["projection"]
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean(model.query_encoder(query, training=True)["projection"])
        return tf.reduce_sum(keys), tape.gradient(loss, model.query_encoder.trainable_variables)

    step = tf.function(lambda: strategy.run(model.train_step, (data,)))
    alone = tf.function(lambda: strategy.run(passes, (data,)))
    times = []
    for repeat in range(arguments.repeats + 1):  # the first traces
        pair = {}
        for function in (step, alone) if repeat % 2 else (alone, step):  # each comes first equally often
            begin = time.perf_counter()
            tf.nest.map_structure(lambda x: x.numpy(), strategy.experimental_local_results(function())[0])
            pair[function] = time.perf_counter() - begin
        times.append([pair[step], pair[alone]])
    step_s, passes_s = np.array(times[1:]).T
    return {
        "replicas": number,
        "step_s": float(np.median(step_s)),
        "passes_s": float(np.median(passes_s)),
        "rest_share_quartiles": [float(q) for q in np.quantile(1 - passes_s / step_s, (0.25, 0.5, 0.75))],
    }


if __name__ == "__main__":
    main()
