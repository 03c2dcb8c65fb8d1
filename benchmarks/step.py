"""Compares a training step of moco_tf with the same step in PyTorch, in each of PyTorch's ways.

    python -m benchmarks.step --arch=resnet50 --image_size=224 --batch_size=16
    python -m benchmarks.step --arch=vit_small --method=moco_v3 --image_size=224 --batch_size=16
    TF_FORCE_GPU_ALLOW_GROWTH=true python -m benchmarks.step --batch_size=128 --ways=moco_tf+xla,channels_last

All ways take turns, a step each, in processes of their own with all cores, or with the GPU if there is one. Prints
medians, and each way's time as a multiple of moco_tf's (median and quartiles of the rounds). Needs the extra `torch`.
Writes docs/results/bench/step.json, one row per setting.
"""

import argparse
import os
import statistics
from pathlib import Path

from benchmarks import results, turns

OUTPUT = results.file("step")
WAYS = "moco_tf+xla,eager,compiled,channels_last,compiled+channels_last"  # PyTorch's ways have no prefix


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", default="moco", choices=("moco", "moco_v3"))
    parser.add_argument("--arch", default="resnet50")
    parser.add_argument("--image_size", type=int, default=224, help="pixels; below 64 ResNets get a CIFAR stem")
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--precision", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--ways", default=WAYS.partition(",")[2], help=f"beside moco_tf, some of {WAYS}")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    parser.add_argument("--one", help=argparse.SUPPRESS)  # serve this way, in this process
    arguments = parser.parse_args()
    if unknown := set(arguments.ways.split(",")) - set(WAYS.split(",")):
        parser.error(f"--ways lists some of {WAYS}; got {', '.join(unknown)}")
    if arguments.one:
        turns.serve(ours(arguments) if arguments.one.startswith("moco_tf") else peer(arguments))
        return
    setting = {name: getattr(arguments, name) for name in ("method", "arch", "image_size", "batch_size", "precision")}
    flags = [f"--{name}={value}" for name, value in setting.items()]
    setting["machine"] = turns.machine()
    commands = {
        name: ["-m", "benchmarks.step", *flags, f"--one={name}"] for name in ("moco_tf", *arguments.ways.split(","))
    }
    seconds = turns.take(commands, arguments.rounds)

    print(f"{setting}, {arguments.rounds} rounds")
    row = setting | {"rounds": arguments.rounds, "ways": {}}
    for name, times in seconds.items():
        found = {"step_s": round(statistics.median(times), 4)}
        found["images_per_second"] = round(arguments.batch_size / statistics.median(times), 2)
        found["times_ours"] = turns.ratio(times, seconds["moco_tf"])
        row["ways"][name] = found
        low, high = found["times_ours"]["quartiles"]
        print(
            f"{name:24} {found['step_s']:8.3f} s a step {found['images_per_second']:8.2f} images/s, "
            f"{found['times_ours']['median']:.2f} ({low:.2f} to {high:.2f}) times moco_tf's time"
        )
    rows = results.read(arguments.output) if arguments.output.exists() else []
    rows = [other for other in rows if any(other.get(name) != value for name, value in setting.items())]
    results.write(arguments.output, [*rows, row])


def ours(arguments):
    from moco_tf.startup import load_tensorflow

    load_tensorflow(training=True)
    import keras
    import tensorflow as tf

    import moco_tf
    from moco_tf.build import POLICIES

    if turns.gpu() and not tf.config.list_physical_devices("GPU"):
        raise SystemExit(
            "TensorFlow finds no GPU here (tensorflow[and-cuda] has its libraries); CUDA_VISIBLE_DEVICES=-1: CPUs"
        )
    keras.config.set_dtype_policy(POLICIES[arguments.precision])
    if arguments.method == "moco":
        stem = "cifar" if arguments.image_size < 64 else "imagenet"
        build = getattr(moco_tf.encoders.resnet, arguments.arch)
        model = moco_tf.MoCo(build(image_size=arguments.image_size, stem=stem), head="mlp", temperature=0.2)
        model.compile(moco_tf.SGD(0.03, momentum=0.9, weight_decay=1e-4))
    else:
        backbone = getattr(moco_tf.encoders.vit, arguments.arch)(image_size=arguments.image_size)
        model = moco_tf.MoCoV3(backbone, head="vit", temperature=0.2)
        model.compile(moco_tf.AdamW(1.5e-4, weight_decay=0.1))
    shape = (arguments.batch_size, arguments.image_size, arguments.image_size, 3)
    views = tuple(tf.random.stateless_normal(shape, (0, view)) for view in (0, 1))
    step = tf.function(model.train_step, jit_compile="xla" in arguments.one)
    return lambda: float(step(views)["loss"])


def peer(arguments):
    import torch

    from benchmarks import torch_peer

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    make = torch_peer.moco_step if arguments.method == "moco" else torch_peer.moco_v3_step
    return make(
        arguments.arch,
        arguments.image_size,
        arguments.batch_size,
        compiled="compiled" in arguments.one,
        channels_last="channels_last" in arguments.one,
        bfloat16=arguments.precision == "bfloat16",
        device="cuda" if turns.gpu() else "cpu",
    )


if __name__ == "__main__":
    main()
