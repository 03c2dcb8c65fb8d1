"""Heads, and encoders that consist of a backbone and a head. Axes: N batch, C features.

MoCo v1 and v2 have a projection head. MoCo v3 has a projector in both encoders, and a predictor after the query
encoder's projector.
"""

import keras
from keras import layers

from moco_tf.encoders.batch_norm import BatchNorm

# PyTorch's default for linear layers: U(-1/sqrt(fan_in), 1/sqrt(fan_in)), for kernel and bias alike.
LINEAR = {"scale": 1 / 3, "mode": "fan_in", "distribution": "uniform"}

# MoCo v3 (section 4.3 and the authors' names): projector's name, number of its linear layers, whether BN ends the
# predictor.
V3 = {"resnet": ("fc", 2, False), "vit": ("head", 3, True)}


def encoder(backbone, image_shape, head, dim, hidden_dim=None):
    """Puts a head on a backbone.

    Args:
      backbone: a Keras model of images -> (N, C) or (N, H, W, C); the latter is averaged over H and W.
      image_shape: (H, W, C) of its input; None for a free side.
      head: "linear" (MoCo v1) or "mlp" (v2: one hidden layer with ReLU, no BN), with biases; or "resnet" or "vit":
        MoCo v3's projector for such a backbone, see `V3`. It has linear layers without biases, each followed by BN;
        the last BN has no gain and offset.
      dim: length of the projection; 128 in v1 and v2, 256 in v3.
      hidden_dim: width of the hidden layers; None: the backbone's C, as in v2. 4096 in v3.

    Returns:
      A functional model of images -> {"features": (N, C), "projection": (N, dim)}; the projection is not
      normalised.
    """
    if head not in ("linear", "mlp", *V3):
        raise ValueError(f"head is 'linear', 'mlp', 'resnet' or 'vit', not {head!r}")
    inputs = keras.Input(image_shape)
    features = _features(backbone, inputs)
    if head in V3:
        name, depth, _ = V3[head]
        hidden_dim = hidden_dim or features.shape[-1]
        projection = _norm_mlp(features, [hidden_dim] * (depth - 1) + [dim], last_norm=True, name=name)
    else:
        projection = _head(features, head, dim, hidden_dim, "fc")
    return keras.Model(inputs, {"features": features, "projection": projection})


def _features(backbone, inputs):
    """Returns a backbone's features (N, C) of symbolic inputs; refuses what is no features."""
    features = backbone(inputs)
    if not isinstance(features, keras.KerasTensor):
        raise ValueError(
            f"a backbone gives one output, (N, C) or (N, H, W, C); this one gives a {type(features).__name__}"
        )
    if len(features.shape) == 4:
        features = layers.GlobalAveragePooling2D(name="pool")(features)
    if len(features.shape) != 2:
        raise ValueError(f"a backbone gives (N, C) or (N, H, W, C); this one gives {tuple(features.shape)}")
    return features


def classifier(width, classes, hidden_dim=None):
    """A functional model of (N, width) -> logits (N, classes): linear, or with a hidden layer, BN and ReLU first.

    The last layer's weights start from N(0, 0.01), its biases from 0.
    """
    inputs = x = keras.Input((width,))
    if hidden_dim:
        x = layers.ReLU(name="relu")(BatchNorm(name="norm")(_linear(x, hidden_dim, "hidden", bias=False)))
    start = keras.initializers.RandomNormal(stddev=0.01)
    # In 16 bits many classes would tie.
    full = keras.config.dtype_policy().variable_dtype
    last = layers.Dense(classes, kernel_initializer=start, dtype=full, name="logits")
    return keras.Model(inputs, last(x), name="classifier")


def encoder_of_halves(backbone, image_shape, head, dim, hidden_dim=None):
    """Does the same as `encoder` for features whose two halves are two modalities: each half has its own head.

    A head is "linear" or "mlp". The projections stand one after the other, (N, 2 dim).
    """
    inputs = keras.Input(image_shape)
    features = _features(backbone, inputs)
    halves = Halves(features.shape[-1] // 2, name="halves")(features)
    projections = [_head(half, head, dim, hidden_dim, f"fc_{place}") for place, half in enumerate(halves)]
    projection = layers.Concatenate(name="projections")(projections)
    return keras.Model(inputs, {"features": features, "projection": projection})


def encoder_of_text(backbone, shape):
    """Puts SimCSE's head on a backbone: as many units as features, with tanh, for training alone.

    Args:
      backbone: a Keras model of words, int32 `(N, *shape)` -> features (N, D).

    Returns:
      A functional model of words -> {"features": (N, D), "projection": (N, D)}.
    """
    inputs = keras.Input(shape, dtype="int32")
    features = backbone(inputs)
    projection = layers.Dense(features.shape[-1], activation="tanh", name="fc")(features)
    return keras.Model(inputs, {"features": features, "projection": projection})


def encoder_without_head(backbone, image_shape):
    """A functional model of images -> {"features": (N, C), "projection": (N, C)}, two equal outputs."""
    inputs = keras.Input(image_shape)
    features = _features(backbone, inputs)
    return keras.Model(inputs, {"features": features, "projection": layers.Identity(name="no_head")(features)})


@keras.saving.register_keras_serializable("moco_tf")
class Halves(keras.layers.Layer):
    """Splits the last axis in two: (..., D) -> (..., `first`) and (..., D - `first`)."""

    def __init__(self, first, **kwargs):
        super().__init__(**kwargs)
        self.first = first

    def call(self, values):
        return [values[..., : self.first], values[..., self.first :]]

    def compute_output_shape(self, input_shape):
        return [(*input_shape[:-1], self.first), (*input_shape[:-1], input_shape[-1] - self.first)]

    def get_config(self):
        return super().get_config() | {"first": self.first}


def has_projector(encoder):
    """Whether the head of an encoder is MoCo v3's projector: BN follows its first linear layer."""
    names = {layer.name for layer in encoder.layers}
    return any(f"{name}.1" in names for name, _, _ in V3.values())


def backbone_of(encoder):
    """The backbone that `encoder` put a head on: the layer after the input."""
    return encoder.layers[1]


def projection(encoder):
    """The head alone, with the encoder's own layers: a functional model of features (N, C) -> projection (N, dim)."""
    return keras.Model(encoder.output["features"], encoder.output["projection"])


def predictor(head, dim, hidden_dim):
    """MoCo v3's predictor for a `head` of `V3`: a functional model of projections (N, dim) -> (N, dim)."""
    inputs = keras.Input((dim,))
    return keras.Model(inputs, _norm_mlp(inputs, [hidden_dim, dim], last_norm=V3[head][2], name="predictor"))


def _head(features, head, dim, hidden_dim, name):
    if head == "linear":
        return _linear(features, dim, name)
    x = _linear(features, hidden_dim or features.shape[-1], f"{name}.0")
    return _linear(layers.ReLU(name=f"{name}.relu")(x), dim, f"{name}.2")


def _norm_mlp(x, widths, last_norm, name):
    """Applies linear layers without biases, BN and ReLU between them, and BN that is not affine, or nothing, last.

    The number in a layer's name, a ReLU's too, is its place in PyTorch's `nn.Sequential`.
    """
    for place, width in enumerate(widths):
        x = _linear(x, width, f"{name}.{3 * place}", bias=False)
        last = place == len(widths) - 1
        if not last or last_norm:
            x = BatchNorm(affine=not last, name=f"{name}.{3 * place + 1}")(x)
        if not last:
            x = layers.ReLU(name=f"{name}.{3 * place + 2}")(x)
    return x


def _linear(x, units, name, bias=True):
    limit = x.shape[-1] ** -0.5
    return layers.Dense(
        units,
        use_bias=bias,
        kernel_initializer=keras.initializers.VarianceScaling(**LINEAR),
        bias_initializer=keras.initializers.RandomUniform(-limit, limit),
        name=name,
    )(x)
