import gc
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # scikit-learn's threads wait by spinning, where processes share cores

from moco_tf.startup import load_tensorflow

# As training does, since tests compare this process with commands; and with replicas to try `tf.distribute` on.
load_tensorflow(virtual_cpus=4, training=True)

import keras  # noqa: E402
import pytest  # noqa: E402
import tensorflow as tf  # noqa: E402

tf.config.experimental.enable_tensor_float_32_execution(False)  # GPUs would round to 10 bits: tolerances are float32's


@pytest.fixture(autouse=True)
def _float32():
    """Each test starts from Keras' own precision, whatever the one before has set."""
    keras.config.set_floatx("float32")
    keras.config.set_dtype_policy("float32")
    yield
    keras.config.set_floatx("float32")
    keras.config.set_dtype_policy("float32")


@pytest.fixture
def float64():
    """Layers compute in float64, so that losses can be held against loops to the last digits."""
    keras.config.set_floatx("float64")
    keras.config.set_dtype_policy("float64")


@pytest.fixture(autouse=True, scope="module")
def _no_garbage_of_other_files():
    """The collector looks at what a file of tests leaves (Keras keeps it) once, and not at each collection after."""
    yield
    gc.collect()
    gc.freeze()
