"""Converts the weights of an encoder's first convolution to images with another number of channels.

`moco_tf.start_from` and `moco_tf.torch_weights` call it.
"""

import numpy as np

LAYERS = ("conv1", "patch_embed.proj")  # its name in ResNets and in ViTs


def of_channels(kernel, channels, axis):
    """Converts a kernel to images with another number of channels, and keeps its dtype.

    Each new channel gets the sum over the old channels, divided by the new number of channels. So an image with equal
    channels gives the same output as before. One channel gets the sum. From red, green and blue, each of N channels
    gets 3/N of their mean.

    axis: axis of the channels.
    """
    total = np.sum(kernel, axis=axis, keepdims=True, dtype=np.result_type(kernel.dtype, np.float32))
    return np.repeat(total / channels, channels, axis=axis).astype(kernel.dtype)


def said(layer, before, channels):
    """Returns a part of a sentence: what `of_channels` does to a layer that had `before` channels."""
    if channels == 1:
        return f"{layer} is the sum over the {before} channels there"
    return f"{layer} is {before}/{channels} of the mean over the {before} channels there, for each of {channels}"
