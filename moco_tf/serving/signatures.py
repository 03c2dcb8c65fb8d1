"""The signatures of a SavedModel: what a client may ask a server, as functions of a request.

The encoder's input decides which signatures exist: its `signatures` names them (`data/inputs/`).
"""

import tensorflow as tf

from moco_tf.data.encoded_batch import REQUEST_MEGAPIXELS, all_valid


def of(encoder, on_bad_image="error", request_megapixels=REQUEST_MEGAPIXELS):
    """Returns {name: (function, the specification of its argument)}; the first is the server's default."""
    return {
        name: (_answer(encoder, signature.of_batch, on_bad_image), signature.argument)
        for name, signature in encoder.preprocessing.signatures(request_megapixels).items()
    }


def _answer(encoder, of_batch, on_bad_image):
    """Returns a function of a request's batch; `of_batch` turns the batch into the encoder's input."""

    def answer(images):
        views, valid = of_batch(images)
        if valid is None:
            return _encode(encoder, views)
        if on_bad_image == "error":
            with tf.control_dependencies([all_valid(valid)]):
                return _encode(encoder, tf.identity(views))
        outputs = {name: _keep(valid, value) for name, value in _encode(encoder, views).items()}
        return outputs | {"valid": valid}

    return answer


def _encode(encoder, views):
    """Calls `encoder.encode`; adds a view to an empty batch, for which oneDNN's convolutions give a wrong shape."""
    number = tf.shape(views)[0]
    missing = tf.zeros([tf.cast(number == 0, tf.int32), *views.shape[1:]], views.dtype)
    return {name: value[:number] for name, value in encoder.encode(tf.concat([views, missing], axis=0)).items()}


def _keep(valid, rows):
    """Keeps rows (N,) or (N, C) where valid; elsewhere returns 0, or -1 for integers."""
    valid = tf.reshape(valid, [-1] + [1] * (rows.shape.rank - 1))
    return tf.where(valid, rows, tf.zeros_like(rows) - (1 if rows.dtype.is_integer else 0))
