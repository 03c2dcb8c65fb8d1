"""Loads TensorFlow without its greetings, for the commands: what they print should be about the user's work."""

import contextlib
import os
import sys
import tempfile


def load_tensorflow():
    """Imports TensorFlow and Keras; passes on what they wrote to stderr only if that fails."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    with tempfile.TemporaryFile() as greetings:
        try:
            with stderr_to(greetings):
                import absl.logging
                import keras  # noqa: F401
                import tensorflow as tf

                absl.logging.set_verbosity(absl.logging.ERROR)  # Keras and TFDS warn of what users cannot change
                tf.config.list_physical_devices()  # probing for a GPU has its own messages
        except BaseException:
            greetings.seek(0)
            sys.stderr.buffer.write(greetings.read())
            raise


@contextlib.contextmanager
def stderr_to(file):
    """Sends file descriptor 2 elsewhere: the libraries' C++ writes to it before any log level is read."""
    sys.stderr.flush()
    kept = os.dup(2)
    os.dup2(file.fileno(), 2)
    try:
        yield
    finally:
        sys.stderr.flush()
        os.dup2(kept, 2)
        os.close(kept)
