"""Holds this project against recorded results of the papers' own code: `python tests/replay_goldens.py FILE...`

Prints a line a file: its name, the deviation that is nearest to its tolerance, that tolerance, ok or FAIL. Exits 1 if
a file fails. A replay is a list of (name, deviation, tolerance), one for each number that was recorded.
"""

import json
import pathlib
import sys

import numpy as np
import tensorflow as tf

from moco_tf.data import augment, image_ops
from moco_tf.data.encoded import decode
from moco_tf.data.inputs.image import Preprocessing

# Mean absolute difference to Pillow's 8-bit result, of 255, that a record must stay within.
TOLERANCES = {
    "decode_jpeg": 0.0,
    "brightness": 0.55,
    "contrast": 0.55,
    "saturation": 0.55,
    "grayscale": 0.55,
    "hflip": 0.55,
    "solarize": 0.55,
    "resized_crop": 0.4,
    "center_crop_eval": 0.4,
    "gaussian_blur": 1.0,
    "hue": 2.0,
    "jitter_blur_flip": 2.2,
}
MEAN_TOLERANCE, QUANTILE_TOLERANCE = 0.01, 0.02  # of crop statistics


def main(files):
    if not files:
        sys.exit("usage: python tests/replay_goldens.py FILE...")
    results = [report(pathlib.Path(file)) for file in files]
    sys.exit(0 if all(results) else 1)


def report(path):
    """Replays one file and prints its line; says whether all was within tolerance."""
    try:
        deviations = replay(path)
    except Exception as error:  # a file that cannot be replayed is a failure like any other
        print(f"{path.name} nan 0 FAIL")
        print(f"    {type(error).__name__}: {error}", file=sys.stderr)
        return False
    # `not <=` also catches a deviation that is not a number.
    failed = [item for item in deviations if not item[1] <= item[2]]
    name, deviation, tolerance = max(deviations, key=_nearness)
    print(f"{path.name} {deviation:.3g} {tolerance:.3g} ({name}) {'FAIL' if failed else 'ok'}")
    for name, deviation, tolerance in failed:
        print(f"    {name}: {deviation:.6g}, tolerance {tolerance:.3g}", file=sys.stderr)
    return not failed


def replay(path):
    """All deviations of one golden file: a list of (name, deviation, tolerance)."""
    if path.suffix == ".npz":
        return replay_augmentation(path)
    from replay_trajectories import replay as replay_trajectory

    return replay_trajectory(path)


def replay_augmentation(path):
    with np.load(path, allow_pickle=False) as archive:
        arrays = dict(archive)
    meta = json.loads(str(arrays.pop("meta")))
    deviations = []
    for record in meta["records"]:
        expected = arrays[record["out"]].astype(np.float64)
        actual = np.asarray(apply(record["op"], record["params"], arrays[f"image_{record['image']}"], arrays))
        difference = np.abs(actual - expected).mean() if actual.shape == expected.shape else np.inf
        deviations.append((f"{record['op']} {record['out']}", difference, TOLERANCES[record["op"]]))
    for name, expected in meta["random_resized_crop"].items():
        deviations += crop_deviations(name, expected)
    return deviations


def apply(op, params, image, arrays):
    """One recorded operation on a uint8 image, by this project's functions."""
    pixels = tf.cast(image, tf.float32)
    if op == "decode_jpeg":
        return decode(tf.constant(arrays[params["bytes"]].tobytes()))
    if op in ("brightness", "contrast", "saturation", "hue"):
        return getattr(image_ops, op)(pixels, params["factor"])
    if op == "grayscale":
        return image_ops.grayscale(pixels)
    if op == "hflip":
        return image_ops.flip(pixels)
    if op == "solarize":
        return image_ops.solarize(pixels, params["threshold"])
    if op == "gaussian_blur":
        return image_ops.gaussian_blur(pixels, params["sigma"])
    if op == "resized_crop":
        box = [params[name] for name in ("top", "left", "height", "width")]
        (part,) = image_ops.crops(tf.constant(image), lambda *_: [box])
        return image_ops.resized(part, params["size"])
    if op == "center_crop_eval":
        preprocessing = Preprocessing(params["crop"], params["crop"] / params["resize_shorter"])
        return preprocessing.denormalize(preprocessing(image[np.newaxis]))[0]
    if op == "jitter_blur_flip":
        operations = (image_ops.brightness, image_ops.contrast, image_ops.saturation, image_ops.hue)
        factors = [params[name] for name in ("brightness", "contrast", "saturation", "hue")]
        for place in params["order"]:
            pixels = operations[place](pixels, factors[place])
        return image_ops.flip(image_ops.gaussian_blur(pixels, params["sigma"]))
    raise ValueError(f"There is no replay for the operation {op!r}. Add it to `apply`.")


def crop_deviations(name, expected):
    """Statistics of as many crops as were recorded, beside the recorded ones."""
    height, width = expected["height"], expected["width"]
    uniforms = tf.random.stateless_uniform((expected["samples"], 2 * augment.CROP_TRIES + 2), (0, 0))
    boxes = augment.random_resized_crop_box(height, width, expected["scale"], uniforms)
    top, left, rows, columns = np.asarray(boxes, np.float64).T
    area, aspect = rows * columns / (height * width), np.log(columns / rows)
    centre_x = (left + columns / 2) / width
    actual = {
        "area_mean": area.mean(),
        "area_q": np.quantile(area, expected["quantiles"]),
        "logaspect_mean": aspect.mean(),
        "logaspect_q": np.quantile(aspect, expected["quantiles"]),
        "centre_x_mean": centre_x.mean(),
        "centre_y_mean": ((top + rows / 2) / height).mean(),
        "centre_x_std": centre_x.std(),
    }
    return [
        (
            f"{name} {statistic}",
            np.max(np.abs(value - np.array(expected[statistic]))),
            QUANTILE_TOLERANCE if statistic.endswith("_q") else MEAN_TOLERANCE,
        )
        for statistic, value in actual.items()
    ]


def _nearness(item):
    _, deviation, tolerance = item
    if not np.isfinite(deviation):
        return np.inf
    return deviation / max(tolerance, 1e-12)


if __name__ == "__main__":
    main(sys.argv[1:])
