"""The first convolution of an encoder, where weights of other images than the encoder's come in.

`moco_tf.start_from` and `moco_tf.torch_weights` call it.
"""

import numpy as np

LAYERS = ("conv1", "patch_embed.proj")  # its name in ResNets and in ViTs


def of_channels(kernel, channels, axis):
    """A kernel for images of another number of channels, in the type that it has.

    Each channel gets the sum over the channels that there are, divided by the new number. So an image whose channels
    are all alike gives what it gave: the sum for one channel, and of red, green and blue 3/N of their mean for N.

    axis: of the channels.
    """
    total = np.sum(kernel, axis=axis, keepdims=True, dtype=np.result_type(kernel.dtype, np.float32))
    return np.repeat(total / channels, channels, axis=axis).astype(kernel.dtype)


def said(layer, before, channels):
    """What `of_channels` does to a layer of so many channels, a sentence's part."""
    if channels == 1:
        return f"{layer} is the sum over the {before} channels there"
    return f"{layer} is {before}/{channels} of the mean over the {before} channels there, for each of {channels}"
