"""Holds the converted networks against torchvision's and timm's in PyTorch: python tests/torch_agreement.py [ARCH...]

Prints a line a network: deviations over the largest value of PyTorch's float64 answer, for equal weights and images.
"""

import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE / "goldens")]

import keras  # noqa: E402
import make_torch_fixtures as reference  # noqa: E402
import named_weights  # noqa: E402
import numpy as np  # noqa: E402
import tensorflow as tf  # noqa: E402
import torch  # noqa: E402

from moco_tf.pytorch import conversion, tensor_names  # noqa: E402

COLUMNS = ("evaluation", "training", "statistics", "gradients", "float32", "PyTorch's float32")


def deviations(name, gradients=True):
    """A network's deviations from PyTorch, {column: number}, each over the largest value of its tensor.

    evaluation, training: features in float64; statistics: running statistics after the training step; gradients: of
    all parameters for the mean square of features in training mode; float32: features of the Keras network in float32
    in evaluation mode; PyTorch's float32: of its own.
    """
    network = reference.network(name)
    images = torch.from_numpy(named_weights.images(reference.SEED))
    state = {key: value.numpy().copy() for key, value in network.state_dict().items()}

    with torch.no_grad():
        evaluated = network.eval()(images).numpy()
        single = network.float()(images.float()).numpy()
    network.double().load_state_dict({key: torch.from_numpy(value) for key, value in state.items()})
    trained = network.train()(images)
    if gradients:
        trained.square().mean().backward()
    after = {key: value.numpy() for key, value in network.state_dict().items()}
    slopes = {key: value.grad.numpy() for key, value in network.named_parameters() if gradients}
    trained = trained.detach().numpy()
    del network

    inputs = images.numpy().transpose(0, 2, 3, 1)
    found = {"float32": relative(_model(state, "float32")(inputs.astype("float32"))["features"], evaluated)}
    found["PyTorch's float32"] = relative(single, evaluated)
    model = _model(state, "float64")
    found["evaluation"] = relative(model(inputs)["features"], evaluated)
    variables = dict(tensor_names.names(model))
    with tf.GradientTape() as tape:
        tape.watch([variables[key].value for key in slopes])  # a ViT's positions and patches, too, which are frozen
        features = model(inputs, training=True)["features"]
        loss = tf.reduce_mean(tf.square(features))
    found["training"] = relative(features, trained)
    running = [key for key in variables if key.endswith(("running_mean", "running_var"))]  # ViTs have none
    found["statistics"] = max((relative(variables[key], after[key]) for key in running), default=0.0)
    if gradients:
        computed = tape.gradient(loss, [variables[key].value for key in slopes])
        found["gradients"] = max(
            relative(tensor_names.to_torch(slope.numpy()), slopes[key])
            for key, slope in zip(slopes, computed, strict=True)
        )
    return found


def relative(value, expected):
    """The largest deviation over the largest expected magnitude."""
    return float(np.abs(np.asarray(value) - expected).max() / np.abs(expected).max())


def _model(state, precision):
    policy = keras.config.dtype_policy().name
    keras.config.set_dtype_policy(precision)
    keras.config.set_floatx(precision)
    try:
        model = conversion.encoder(tensor_names.recognise(state), named_weights.IMAGE_SIZE)
        conversion.load_encoder(model, state)
        return model
    finally:
        keras.config.set_dtype_policy(policy)
        keras.config.set_floatx(policy)


def main(names):
    print(f"| network | {' | '.join(COLUMNS)} |\n|{'---|' * (len(COLUMNS) + 1)}")
    for name in names or reference.ARCHITECTURES:
        found = deviations(reference.ARCHITECTURES[name])
        print(f"| {name} | " + " | ".join(f"{found[column]:.0e}" for column in COLUMNS) + " |", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
