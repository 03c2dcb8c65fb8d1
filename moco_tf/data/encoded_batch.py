"""Encoded images as a request brings them: counted by their headers, decoded a few at a time, each kept as a view.

What serving's signatures of files do. Only graph operations: a server has no Python. Axes: N images, H W their sides.

An operation that fails, fails the whole graph; only a dataset can pass over its error. TensorFlow prepares what a
dataset maps anew at each request, though, and takes a quarter of a second where that is all that looks at headers. So
a dataset does what may fail and nothing else: libjpeg's headers, and the decoding.
"""

import tensorflow as tf

from moco_tf.data import encoded

REQUEST_MEGAPIXELS = 500  # that the images of a request may have together
IN_FLIGHT = encoded.MAX_PIXELS  # pixels that are being decoded at a time, or one image
MOST_IN_FLIGHT = 16  # images


@tf.autograph.experimental.do_not_convert
def views(images, view, spec, request_megapixels=REQUEST_MEGAPIXELS):
    """A view of each image that can be decoded; one bad image spoils no other.

    Args:
      images: string (N,), of any format and size.
      view: uint8 (H, W, 3) -> a tensor, or a tuple of some.
      spec: the `TensorSpec`s of what it returns, their shapes known.
      request_megapixels: an error, before anything is decoded, where the images have more together.

    Returns:
      What `view` returns, with N rows, zeros where an image cannot be decoded; bool (N,), whether it can.
    """
    pixels, files = _pixels(images)
    total, most = tf.reduce_sum(pixels), round(request_megapixels * 1e6)
    rule = (
        "the images of a request have at most {} pixels together, these {} have {}: send fewer or smaller ones in a "
        "request, or export with a larger --request_megapixels"
    )
    says = tf.strings.format(rule, (tf.constant(most, tf.int64), tf.size(images), total))
    with tf.control_dependencies([tf.debugging.Assert(total <= most, [says])]):
        places = tf.where(pixels > 0)[:, 0]
    decoding = tf.clip_by_value(IN_FLIGHT // tf.maximum(tf.reduce_max(pixels, keepdims=True), 1), 1, MOST_IN_FLIGHT)
    decoded = _passing(places, tf.gather(files, places), _as_stored, tf.squeeze(decoding))
    return _rows(decoded, view, spec, files)


def all_valid(valid):
    """An operation that fails where an image is not valid, (N,), and names all that are not by their indices."""
    bad = tf.where(~valid)[:, 0]
    text = tf.strings.format(
        "images that cannot be decoded, by their index in the batch of {}: {}", (tf.size(valid), bad), summarize=-1
    )
    return tf.debugging.Assert(tf.reduce_all(valid), [text])


def _pixels(images):
    """int64 (N,), how many pixels each image has, 0 where it is not to be decoded; the images as they are decoded."""
    is_jpeg = tf.io.is_jpeg(images)
    others, jpegs = tf.where(~is_jpeg)[:, 0], tf.where(is_jpeg)[:, 0]

    def look(image):
        facts = encoded.examine(image)
        fits = facts[3] == 0
        return facts[1] * facts[2] * tf.cast(fits, tf.int64), tf.cond(fits, lambda: encoded.ready(image), lambda: "")

    outputs = tf.TensorSpec((), tf.int64), tf.TensorSpec((), tf.string)
    of_others, files = tf.map_fn(look, tf.gather(images, others), fn_output_signature=outputs)
    pixels = tf.scatter_nd(others[:, tf.newaxis], of_others, tf.shape(images, tf.int64))
    files = tf.tensor_scatter_nd_update(images, others[:, tf.newaxis], files)

    number = tf.size(images, tf.int64)
    end = tf.data.Dataset.from_tensors((number, tf.constant(0, tf.int64)))  # without which there might be no batch
    sizes = _passing(jpegs, tf.gather(images, jpegs), encoded.jpeg_pixels, 1).concatenate(end).batch(number + 1)
    known, of_jpegs = sizes.with_options(_plain()).get_single_element()
    known, of_jpegs = known[:-1], of_jpegs[:-1]
    fits = encoded.jpeg_fits(of_jpegs, encoded.scans(tf.gather(images, known)))
    return tf.tensor_scatter_nd_add(pixels, known[:, tf.newaxis], of_jpegs * tf.cast(fits, tf.int64)), files


def _passing(places, files, function, parallel):
    """A dataset of (place, `function` of the file) of the files for which that does not fail, in their order."""
    return (
        tf.data.Dataset.from_tensor_slices((places, files))
        .map(lambda place, file: (place, function(file)), num_parallel_calls=parallel)
        .ignore_errors()
        .with_options(_plain())
    )


def _plain():
    """Options of a dataset that is made for each request: to study it would take longer than to run it."""
    options = tf.data.Options()
    options.experimental_optimization.apply_default_optimizations = False
    options.autotune.enabled = False
    return options


def _as_stored(file):
    """uint8 (H, W, 3 of a JPEG, any number of others)."""
    return tf.cond(tf.io.is_jpeg(file), lambda: encoded.decode_jpeg(file), lambda: encoded.decode_as_stored(file))


def _rows(decoded, view, spec, files):
    """As `views`, of a dataset of (place, pixels) of some of the files (N,), which are taken one after another."""
    decoded, number = iter(decoded), tf.size(files)

    def step(_, valid, *arrays):
        following = decoded.get_next_as_optional()

        def put():
            place, image = following.get_value()
            parts = tf.nest.flatten(view(encoded.three_channels(files[place], image)))
            written = [array.write(tf.cast(place, tf.int32), part) for array, part in zip(arrays, parts, strict=True)]
            return tf.tensor_scatter_nd_update(valid, place[tf.newaxis, tf.newaxis], [True]), *written

        is_there = following.has_value()
        return is_there, *tf.cond(is_there, put, lambda: (valid, *arrays))

    nothing = [tf.TensorArray(of.dtype, number, element_shape=of.shape) for of in tf.nest.flatten(spec)]
    start = True, tf.zeros((number,), tf.bool), *nothing
    _, valid, *arrays = tf.while_loop(lambda more, *_: more, step, start, parallel_iterations=1)
    return tf.nest.pack_sequence_as(spec, [array.stack() for array in arrays]), valid
