"""Loads TensorFlow for the commands without its greetings, and with its fastest kernels for training.

The commands print only messages about the user's work.
"""

import contextlib
import gc
import math
import os
import re
import sys
import tempfile

from moco_tf.command import ConfigError


def load_tensorflow(virtual_cpus=0, training=False):
    """Imports TensorFlow and Keras; passes on what they wrote to stderr only if the import fails.

    virtual_cpus: logical devices to divide the CPU into, 0 for none; TensorFlow can divide it once, before its first
      operation.
    training: whether to use oneDNN's kernels on any CPU. TensorFlow leaves them off on CPUs without VNNI, where they
      make training faster, and the encoding of single images slower.
    """
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    if training:
        os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "1")
    # Keras imports these packages, if installed, for wrappers that no command uses; this takes a second.
    with _no_garbage_in_imports(), _hidden("sklearn", "matplotlib"), tempfile.TemporaryFile() as greetings:
        try:
            with stderr_to(greetings):
                import absl.logging
                import keras  # noqa: F401
                import tensorflow as tf

                absl.logging.set_verbosity(absl.logging.ERROR)  # Keras and TFDS warn of what users cannot change
                devices = tf.config.list_physical_devices()  # probing for a GPU prints its own messages
                if all(device.device_type == "CPU" for device in devices):
                    # It looks for layouts that suit GPUs, which takes a third of a second of a ResNet-50's start.
                    tf.config.optimizer.set_experimental_options({"layout_optimizer": False})
                if virtual_cpus:
                    (cpu,) = tf.config.list_physical_devices("CPU")
                    parts = [tf.config.LogicalDeviceConfiguration()] * virtual_cpus
                    if tf.config.get_logical_device_configuration(cpu) != parts:
                        _divide(tf, cpu, parts)
        except BaseException:
            greetings.seek(0)
            sys.stderr.buffer.write(greetings.read())
            raise


def computes_bfloat16(cpuinfo="/proc/cpuinfo"):
    """Whether the training device, a GPU or else the processor, multiplies matrices in bfloat16."""
    import tensorflow as tf

    if gpus := tf.config.list_physical_devices("GPU"):
        return tf.config.experimental.get_device_details(gpus[0]).get("compute_capability", (0,))[0] >= 8
    try:
        with open(cpuinfo) as file:
            flags = file.read()
    except OSError:  # not Linux
        return False
    return bool(re.search(r"\b(avx512_bf16|amx_bf16)\b", flags))


def memory():
    """Bytes of this machine's memory; infinity if the system does not say (Windows), so that nothing is refused."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else math.inf


def _divide(tf, cpu, parts):
    try:
        tf.config.set_logical_device_configuration(cpu, parts)
    except RuntimeError:  # TensorFlow has begun to compute
        raise ConfigError(
            "a process divides its CPU once, before TensorFlow computes anything; got "
            f"--virtual_replicas={len(parts)} after that: start it in a process of its own"
        ) from None


@contextlib.contextmanager
def _no_garbage_in_imports():
    """Keeps the collector, now and later, away from the million objects of TensorFlow's import, which all stay."""
    if "tensorflow" in sys.modules or not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
        gc.freeze()
    finally:
        gc.enable()


@contextlib.contextmanager
def _hidden(*modules):
    """Makes imports of `modules` fail in this context, as if not installed, except those already imported."""
    hidden = dict.fromkeys(set(modules) - set(sys.modules))
    sys.modules.update(hidden)
    try:
        yield
    finally:
        for module in hidden:
            del sys.modules[module]


@contextlib.contextmanager
def stderr_to(file):
    """Sends file descriptor 2 to a file: the libraries' C++ code writes to it before any log level is read."""
    sys.stderr.flush()
    kept = os.dup(2)
    os.dup2(file.fileno(), 2)
    try:
        yield
    finally:
        sys.stderr.flush()
        os.dup2(kept, 2)
        os.close(kept)
