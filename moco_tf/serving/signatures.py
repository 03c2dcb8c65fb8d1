"""The signatures of a SavedModel: what a server may be asked, as functions of a request.

Which there are is a matter of the encoder's input: its `signatures` names them (`data/inputs/`).
"""

import tensorflow as tf

from moco_tf.data.encoded_batch import REQUEST_MEGAPIXELS, all_valid


def of(encoder, on_bad_image="error", request_megapixels=REQUEST_MEGAPIXELS):
    """{name: (function, the specification of its argument)}; the first is the server's default."""
    return {
        name: (_answer(encoder, signature.of_batch, on_bad_image), signature.argument)
        for name, signature in encoder.preprocessing.signatures(request_megapixels).items()
    }


def _answer(encoder, of_batch, on_bad_image):
    """A function of a request's batch, of which `of_batch` makes the encoder's input."""

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
    """`encoder.encode`, also of no view at all, to which oneDNN's convolutions give a wrong shape: one is added."""
    number = tf.shape(views)[0]
    missing = tf.zeros([tf.cast(number == 0, tf.int32), *views.shape[1:]], views.dtype)
    return {name: value[:number] for name, value in encoder.encode(tf.concat([views, missing], axis=0)).items()}


def _keep(valid, rows):
    """Rows (N,) or (N, C) where valid, elsewhere 0, of integers -1."""
    valid = tf.reshape(valid, [-1] + [1] * (rows.shape.rank - 1))
    return tf.where(valid, rows, tf.zeros_like(rows) - (1 if rows.dtype.is_integer else 0))
