import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault(
    "OMP_NUM_THREADS", "1"
)  # scikit-learn's threads wait by spinning, where two processes share cores
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "1")  # as training has it: tests compare this process with commands

import keras
import pytest
import tensorflow as tf

(_CPU,) = tf.config.list_physical_devices("CPU")
# Replicas to try `tf.distribute` on; TensorFlow divides a CPU once, before its first operation.
tf.config.set_logical_device_configuration(_CPU, [tf.config.LogicalDeviceConfiguration()] * 4)
tf.config.experimental.enable_tensor_float_32_execution(False)  # GPUs would round to 10 bits: tolerances are float32's


@pytest.fixture(autouse=True)
def _float32():
    """Each test starts from Keras' own precision, whatever the one before has set."""
    keras.config.set_floatx("float32")
    keras.config.set_dtype_policy("float32")
    yield
    keras.config.set_floatx("float32")
    keras.config.set_dtype_policy("float32")
