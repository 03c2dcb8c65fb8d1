"""What TensorFlow's errors say, in a line."""

import contextlib
import errno
import logging
import os
import re

import tensorflow as tf

from moco_tf.command import Stopped

# The errors that can end a step or a pipeline; the second one if a message names a path that is not text.
ERRORS = tf.errors.OpError, UnicodeDecodeError

STORAGE = {os.strerror(number) for number in errno.errorcode}  # how the line of a failed system call ends

log = logging.getLogger("moco_tf")


@contextlib.contextmanager
def in_a_line(what_next=""):
    """Ends a command with a line if an image changed after it was checked, or memory ran out; what_next: its end."""
    try:
        yield
    except ERRORS as error:
        log.error(f"Stopped: {reason(error)}.{what_next}")
        raise Stopped from None


def of_the_system(text):
    """Whether a reason is a system call's, such as "a.jpg: Permission denied", and not the content's."""
    return any(text == word or text.endswith(f": {word}") for word in STORAGE)


def reason(error):
    """The cause in the message of TensorFlow's error, one of `ERRORS`, in a few words."""
    message = error.object.decode(errors="backslashreplace") if isinstance(error, UnicodeError) else error.message
    raised = re.search(r"ValueError: (.*)", message)  # raised in Python by `note`
    if raised:
        return raised[1]
    assertion = re.search(r"assertion failed: \[(.*?)\]", message)
    if assertion:
        return assertion[1]
    lines = [line.strip() for line in message.splitlines() if not line.strip().startswith("[[")]
    # Collectives end their messages with advice for programs that go on; a command ends.
    lines = [line for line in lines if line and not line.startswith("The error could be from a previous operation")]
    lines = [re.sub(r"{{.*?}}\s*|\s*\[Op:.*", "", line) for line in lines]
    refused = [line.rpartition("; ") for line in lines]
    lines = [f"{path}: {why}" for path, _, why in refused if path and why in STORAGE] or lines
    return lines[-1] if lines else type(error).__name__
