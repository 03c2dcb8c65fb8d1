"""The projection head, and the encoder that it makes of a backbone. Axes: N batch, C features."""

import keras
from keras import layers

# PyTorch's default for linear layers: U(-1/sqrt(fan_in), 1/sqrt(fan_in)), for kernel and bias alike.
LINEAR = {"scale": 1 / 3, "mode": "fan_in", "distribution": "uniform"}


def encoder(backbone, image_shape, head, dim, hidden_dim=None):
    """Puts a projection head on a backbone.

    Args:
      backbone: a Keras model of images -> (N, C) or (N, H, W, C); the latter is averaged over H and W.
      image_shape: (H, W, 3) of its input; None for a free side.
      head: "linear" (MoCo v1) or "mlp" (v2: one hidden layer with ReLU, no BN), with biases.
      dim: length of the projection; 128 in the papers.
      hidden_dim: width of the MLP's hidden layer; None: the backbone's C, as in v2.

    Returns:
      A functional model of images -> {"features": (N, C), "projection": (N, dim)}; the projection is not
      normalised.
    """
    if head not in ("linear", "mlp"):
        raise ValueError(f"head is 'linear' or 'mlp', not {head!r}")
    inputs = keras.Input(image_shape)
    features = backbone(inputs)
    if len(features.shape) == 4:
        features = layers.GlobalAveragePooling2D(name="pool")(features)
    if len(features.shape) != 2:
        raise ValueError(f"a backbone gives (N, C) or (N, H, W, C); this one gives {tuple(features.shape)}")
    x = features
    if head == "mlp":
        x = layers.ReLU(name="fc.relu")(_linear(x, hidden_dim or features.shape[-1], "fc.0"))
    projection = _linear(x, dim, "fc.2" if head == "mlp" else "fc")
    return keras.Model(inputs, {"features": features, "projection": projection})


def _linear(x, units, name):
    limit = x.shape[-1] ** -0.5
    return layers.Dense(
        units,
        kernel_initializer=keras.initializers.VarianceScaling(**LINEAR),
        bias_initializer=keras.initializers.RandomUniform(-limit, limit),
        name=name,
    )(x)
