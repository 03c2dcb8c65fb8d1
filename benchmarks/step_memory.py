"""How much memory a training step of MoCo v3 with ViT-B takes at 224 pixels, in float32 and in bfloat16.

    python -m benchmarks.step_memory --arch=vit_base --batch_size=16

Each precision gets a process of its own, which makes two steps with AdamW and reports the process's peak, and the part
of it beyond TensorFlow's own. Writes docs/results/bench/step_memory.json.
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path

from benchmarks import results

OUTPUT = results.file("step_memory")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", default="vit_base", choices=("vit_tiny", "vit_small", "vit_base"))
    parser.add_argument("--image_size", type=int, default=224, help="pixels")
    parser.add_argument("--batch_size", type=int, default=16, help="images, two views each")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    parser.add_argument("--precision", help=argparse.SUPPRESS)  # measure this precision, in this process
    arguments = parser.parse_args()
    if arguments.precision:
        print(json.dumps(measure(arguments)))
        return
    rows = []
    print(f"{arguments.arch}, {arguments.image_size} px, batch {arguments.batch_size}: peak memory of a v3 step, GB")
    for precision in ("float32", "bfloat16"):
        command = [sys.executable, "-m", "benchmarks.step_memory", f"--precision={precision}", *sys.argv[1:]]
        row = json.loads(
            subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1]
        )
        print(
            f"{precision:>9} {row['peak_gb']:6.2f}, {row['beyond_tensorflow_gb']:6.2f} of it beyond TensorFlow's own"
        )
        rows.append(row)
    results.write(arguments.output, {"command": " ".join(sys.argv[1:]), "rows": rows})


def measure(arguments):
    from moco_tf.startup import load_tensorflow

    load_tensorflow(training=True)
    import keras
    import tensorflow as tf

    import moco_tf
    from moco_tf.build import POLICIES

    keras.config.set_dtype_policy(POLICIES[arguments.precision])
    before = peak_gb()
    backbone = getattr(moco_tf.encoders.vit, arguments.arch)(image_size=arguments.image_size)
    model = moco_tf.MoCoV3(backbone, head="vit", temperature=0.2)
    model.compile(moco_tf.AdamW(1e-4, weight_decay=0.1))
    shape = (arguments.batch_size, arguments.image_size, arguments.image_size, 3)
    views = tuple(tf.random.stateless_normal(shape, (0, view)) for view in (0, 1))
    step = tf.function(model.train_step)
    for _ in range(2):  # the first also traces and makes the graph's constants
        began = time.perf_counter()
        loss = float(step(views)["loss"])
    return {
        "precision": arguments.precision,
        "peak_gb": peak_gb(),
        "beyond_tensorflow_gb": peak_gb() - before,
        "step_s": time.perf_counter() - began,
        "loss": loss,
    }


def peak_gb():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


if __name__ == "__main__":
    main()
