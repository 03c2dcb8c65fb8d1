"""Every pretext task of the package with data and flags of a run that takes seconds, for tests and storms."""

import functools
import pkgutil
from pathlib import Path

import numpy as np
import tensorflow as tf

from moco_tf import build, pretext
from moco_tf import config as config_lib
from moco_tf.encoders import vit

TASKS = [module.name for module in pkgutil.iter_modules(pretext.__path__)]
FLAGS = [
    *("--arch=resnet10", "--width=4", "--stem=cifar", "--image_size=8", "--batch_size=8", "--queue_size=16"),
    *("--knn_every=0", "--epochs=2", "--lr=0.01", "--lr_scaling=none", "--positives_from=keys"),
]
small_transformer = functools.partial(vit.vit, 8, 2, 2)  # for vit_tiny, whose twelve blocks take a minute to trace


def write(folder, number, size=12):
    folder.mkdir(parents=True, exist_ok=True)
    for place in range(number):
        pixels = np.random.default_rng(place).integers(0, 256, (size, size, 3), np.uint8)
        (folder / f"{size}-{place}.png").write_bytes(tf.io.encode_png(pixels).numpy())


def write_data(folder):
    """Sixteen things, which are classes, too, of three pictures each; and as many labelled sentences."""
    for thing in range(16):
        write(Path(folder, "images/train", f"thing-{thing:02}"), 3)
    Path(folder, "sentences").mkdir()
    lines = [f"thing-{thing:02}\tthing {thing} number {number}" for thing in range(16) for number in range(3)]
    Path(folder, "sentences/train.txt").write_text("\n".join(lines))


def of_text(task):
    return build.inputs(config_lib.parse([f"--pretext={task}"])).unit == "sentences"


def flags(task, data):
    if of_text(task):
        return [f"--pretext={task}", f"--dataset={data / 'sentences'}", *FLAGS]
    wanted = config_lib.task_module(task).Options.__dataclass_fields__
    own = [flag for flag in FLAGS if task != "labels" or "positives_from" not in flag]
    more = ["--augment=cifar"] if "augment" in wanted else []
    more += ["--image_size=21"] if "tile_size" in wanted else []  # nine tiles
    more += ["--clusters=4"] if "clusters" in wanted else []
    if "arch" in wanted:  # takes ViTs alone
        more += ["--arch=vit_tiny", "--patch_size=4", "--hidden_dim=16"]
    return [f"--pretext={task}", f"--dataset={data / 'images'}", *own, *more]
