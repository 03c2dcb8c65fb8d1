"""Replays the golden training runs of the authors' PyTorch code through this project's models, in float64."""

import json
import sys
from pathlib import Path

import keras
import numpy as np
import tensorflow as tf

sys.path.insert(0, str(Path(__file__).parent / "goldens"))
import tensors

import moco_tf
from moco_tf.methods.ema import copy_weights
from moco_tf.pytorch.tensor_names import names, to_keras, to_torch

LOSS, RELATIVE = 1e-7, 1e-6  # the golden files' own tolerances


def replay(path):
    """Returns a list of (what, deviation, tolerance) for one golden `.json` file."""
    golden = json.loads(Path(path).read_text())
    floatx = keras.config.floatx()
    keras.config.set_floatx("float64")
    keras.config.set_dtype_policy("float64")
    try:
        return {"moco_v1_v2": _replay_moco, "moco_v3": _replay_moco_v3}[golden["kind"]](golden)
    finally:
        keras.config.set_floatx(floatx)
        keras.config.set_dtype_policy(floatx)


def _replay_moco(golden):
    g = golden
    bottleneck = g["block"] == "Bottleneck"
    backbone = moco_tf.encoders.resnet.resnet(
        g["layers"],
        bottleneck,
        image_size=g["image_size"],
        stem="cifar" if g["cifar_stem"] else "imagenet",
    )
    model = moco_tf.MoCo(
        backbone,
        dim=g["dim"],
        head="mlp" if g["mlp"] else "linear",
        queue_size=g["K"],
        momentum=g["m"],
        temperature=g["T"],
        symmetric=g.get("symmetric", False),
    )
    rates = [g["lr"]] * g["lr_drop_at_step"] + [g["lr"] * g["lr_drop"]] * (g["steps"] - g["lr_drop_at_step"])
    model.compile(
        moco_tf.SGD(
            lambda: tf.gather(tf.constant(rates, tf.float64), model.step.value),
            momentum=g["sgd_momentum"],
            weight_decay=g["weight_decay"],
        )
    )
    for name, variable in names(model.query_encoder):
        variable.assign(to_keras(golden_parameter(g["seed"], f"encoder_q.{name}", variable)))
    copy_weights(model.query_encoder, model.key_encoder)
    model.queue.keys.assign(tensors.queue(g["seed"], g["dim"], g["K"]).astype("float32").T)

    step = tf.function(model.train_step, autograph=False)  # as `fit` traces it
    checks = []
    for t in range(g["steps"]):
        query, key = (
            tensors.images(g["seed"], t, view, g["batch"], g["image_size"]).transpose(0, 2, 3, 1) for view in (0, 1)
        )
        model.reset_metrics()
        logs = step((tf.constant(query, tf.float64), tf.constant(key, tf.float64)))
        checks.append((f"loss[{t}]", abs(float(logs["loss"]) - g["loss"][t]), LOSS))
        if "mean_positive_cosine" in g:
            cosine = float(logs["positive_similarity"])
            checks.append((f"mean_positive_cosine[{t}]", abs(cosine - g["mean_positive_cosine"][t]), LOSS))

    values = {"queue": model.queue.keys.numpy().T, "queue_ptr": model.queue.pointer.numpy().reshape(1)}
    values |= _values("encoder_q.", model.query_encoder) | _values("encoder_k.", model.key_encoder)
    projection = model.query_encoder(_evaluation_images(g), training=False)["projection"]
    checks += _compare_final(values, g)
    return [*checks, ("eval_head_output", relative(projection, g["eval_head_output"]), RELATIVE)]


def _replay_moco_v3(golden):
    g = golden
    if g["arch"] == "vit":
        backbone = moco_tf.encoders.vit.vit(
            g["embed_dim"],
            g["depth"],
            g["heads"],
            image_size=g["image_size"],
            patch_size=g["patch"],
            freeze_patch=g["stop_grad_patch"],
        )
    else:
        backbone = moco_tf.encoders.resnet.resnet(
            (1, 1, 1, 1), g["arch"] == "bottleneck", image_size=g["image_size"], zero_init_residual=True
        )
    model = moco_tf.MoCoV3(
        backbone,
        head="vit" if g["arch"] == "vit" else "resnet",
        dim=g["dim"],
        hidden_dim=g["mlp_dim"],
        momentum=g["m0"],
        momentum_rise_steps=g["steps"],
        temperature=g["T"],
    )
    times = np.arange(g["steps"])
    rates = g["lr"] * np.minimum(1, (times + 1) / 3) * 0.5 * (1 + np.cos(np.pi * times / g["steps"]))
    optimizer = {"lars": moco_tf.LARS, "adamw": moco_tf.AdamW}[g["optimizer"]]
    model.compile(
        optimizer(lambda: tf.gather(tf.constant(rates, tf.float64), model.step.value), weight_decay=g["weight_decay"])
    )
    for prefix, part in (("base_encoder.", model.query_encoder), ("", model.predictor)):
        for name, variable in names(part):
            if name == "pos_embed":  # no parameter: computed by the reference in float32, whose last digit it keeps
                variable.assign(np.reshape(g["pos_embed"], variable.shape))
            else:
                variable.assign(to_keras(golden_parameter(g["seed"], f"{prefix}{name}", variable)))
    copy_weights(model.query_encoder, model.key_encoder)

    step = tf.function(model.train_step, autograph=False)  # as `fit` traces it
    checks = []
    for t in range(g["steps"]):
        views = [
            tensors.images(g["seed"], t, view, g["batch"], g["image_size"]).transpose(0, 2, 3, 1) for view in (0, 1)
        ]
        model.reset_metrics()
        logs = step(tuple(tf.constant(view, tf.float64) for view in views))
        checks.append((f"loss[{t}]", abs(float(logs["loss"]) - g["loss"][t]), LOSS))

    values = _values("base_encoder.", model.query_encoder) | _values("momentum_encoder.", model.key_encoder)
    checks += _compare_final(values | _values("", model.predictor), g)
    projection = model.query_encoder(_evaluation_images(g), training=False)["projection"]
    return [*checks, ("eval_projector_output", relative(projection, g["eval_projector_output"]), RELATIVE)]


def _values(prefix, encoder):
    """{PyTorch's name: array in its layout}."""
    return {f"{prefix}{name}": to_torch(variable.numpy()) for name, variable in names(encoder)}


def _evaluation_images(g):
    return tensors.images(g["seed"], 10**6, 0, 4, g["image_size"]).transpose(0, 2, 3, 1).astype("float64")


def _compare_final(values, g):
    """The checks of the tensors after the last step."""
    checks = []
    expected = {name: v for name, v in g["final"].items() if not name.endswith("num_batches_tracked")}
    if values.keys() != expected.keys():
        raise ValueError(f"tensors differ: {sorted(values.keys() ^ expected.keys())}")
    for name, value in values.items():
        norm, mean, first = expected[name]
        deviation = max(
            relative(np.linalg.norm(value), norm),
            abs(value.mean() - mean) / max(abs(mean), np.abs(value).mean(), 1e-9),
            relative(value.ravel()[:4], first),
        )
        checks.append((name, deviation, RELATIVE))
    return checks


def relative(value, expected):
    """The largest deviation over the largest expected magnitude; what is below 1e-9 is zero but for rounding."""
    value, expected = np.asarray(value), np.asarray(expected)
    return float(np.abs(value - expected).max() / max(np.abs(expected).max(), 1e-9))


def golden_parameter(seed, name, variable):
    shape = to_torch(variable.numpy()).shape
    return tensors.parameter(seed, name, shape).astype("float32").astype("float64")
