"""Compares steps of MAE, and of MAE with MoCo v3's contrast, half and three quarters hidden, with a step of MoCo v3.

    python -m benchmarks.masking

The setting is vit_tiny, 4-pixel patches at 32 pixels, batches of 64 random images, AdamW, projectors of width 512, and
the tasks' default decoders. All ways take turns in one process, a step each. MAE has one view of an image, the others
have two.
Writes docs/results/bench/masking.json.
"""

import argparse
import statistics
import time
from pathlib import Path

from benchmarks import results, turns

BATCH, SIZE = 64, 32


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--output", type=Path, default=results.file("masking"))
    arguments = parser.parse_args()
    from moco_tf.startup import load_tensorflow

    load_tensorflow(training=True)
    steps = {name: step(name, ratio) for name, ratio in WAYS}
    for take in steps.values():
        take()  # traces
    seconds = {name: [] for name in steps}
    for _ in range(arguments.rounds):
        for name, take in steps.items():
            begun = time.perf_counter()
            take()
            seconds[name].append(time.perf_counter() - begun)
    rows = {}
    for name, times in seconds.items():
        share = turns.ratio(times, seconds["moco_v3"])
        rows[name] = {"step_s": round(statistics.median(times), 3), "times_moco_v3": share}
        low, high = share["quartiles"]
        print(
            f"{name:14} {rows[name]['step_s']:7.3f} s a step, {share['median']:.2f} ({low:.2f} to {high:.2f}) of v3's"
        )
    results.write(arguments.output, {"machine": turns.machine(), "rounds": arguments.rounds, "ways": rows})


WAYS = (("moco_v3", 0.0), ("mae_moco 50 %", 0.5), ("mae_moco 75 %", 0.75), ("mae 50 %", 0.5), ("mae 75 %", 0.75))


def step(name, ratio):
    """Returns a function that takes a training step."""
    import tensorflow as tf

    import moco_tf
    from moco_tf.encoders import vit
    from moco_tf.methods.mae import MAE
    from moco_tf.methods.mae_moco import MAEMoCo

    backbone = vit.vit_tiny(image_size=SIZE, patch_size=4, freeze_patch=False)
    contrast = {"head": "vit", "dim": 128, "hidden_dim": 512, "temperature": 0.2}
    if name == "moco_v3":
        model = moco_tf.MoCoV3(backbone, **contrast)
    elif name.startswith("mae_moco"):
        model = MAEMoCo(backbone, mask_ratio=ratio, **contrast)
    else:
        model = MAE(backbone, mask_ratio=ratio)
    model.compile(moco_tf.AdamW(1e-4, weight_decay=0.05))
    number = model.VIEWS[1]
    views = tuple(tf.random.stateless_normal((BATCH, SIZE, SIZE, 3), (0, view)) for view in range(number))
    take = tf.function(lambda: model.train_step({"views": views}), autograph=False)
    return lambda: float(take()["loss"])


if __name__ == "__main__":
    main()
