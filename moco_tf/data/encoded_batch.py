"""Turns the encoded images of a request into views: counts their pixels by headers, then decodes a few at a time.

Serving's signatures for files use this module. It has only graph operations, as a server has no Python. Axes: N
images, H W their sides.

An operation that fails makes the whole graph fail; only a dataset can skip its error. But TensorFlow prepares a
dataset's function anew at each request. That takes a quarter of a second if the function does all the work on headers.
So a dataset does only the work that may fail: reading headers by libjpeg, and decoding.
"""

import tensorflow as tf

from moco_tf.data import encoded

REQUEST_MEGAPIXELS = 500  # the most that the images of a request may have together
IN_FLIGHT = encoded.MAX_PIXELS  # pixels that are decoded at a time, or one image
MOST_IN_FLIGHT = 16  # images that are decoded at a time


@tf.autograph.experimental.do_not_convert
def views(images, view, spec, request_megapixels=REQUEST_MEGAPIXELS):
    """Makes a view of each image that can be decoded; one bad image spoils no other.

    Args:
      images: string (N,), of any format and size.
      view: uint8 (H, W, 3) -> a tensor, or a tuple of tensors.
      spec: the `TensorSpec`s of what `view` returns, with known shapes.
      request_megapixels: the most that the images may have together; more is an error, before anything is decoded.

    Returns:
      What `view` returns, with N rows, zeros where an image cannot be decoded; bool (N,): which images can be.
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
    """Returns an operation that fails if images are not `valid`, (N,); its error names them by their indices."""
    bad = tf.where(~valid)[:, 0]
    text = tf.strings.format(
        "images that cannot be decoded, by their index in the batch of {}: {}", (tf.size(valid), bad), summarize=-1
    )
    return tf.debugging.Assert(tf.reduce_all(valid), [text])


def _pixels(images):
    """Returns each image's number of pixels, int64 (N,), 0 if it must not be decoded; and the images for decoding.

    A JPEG counts once for every `MAX_SCANS` scans, since each scan goes through all pixels.
    """
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
    end = tf.data.Dataset.from_tensors((number, tf.constant(0, tf.int64)))  # else there might be no batch
    sizes = _passing(jpegs, tf.gather(images, jpegs), encoded.jpeg_pixels, 1).concatenate(end).batch(number + 1)
    known, of_jpegs = sizes.with_options(_plain()).get_single_element()
    known, of_jpegs = known[:-1], of_jpegs[:-1]
    scans = encoded.scans(tf.gather(images, known))
    fits = tf.cast(encoded.jpeg_fits(of_jpegs, scans), tf.int64)
    times = 1 + tf.maximum(scans - 1, 0) // encoded.MAX_SCANS
    return tf.tensor_scatter_nd_add(pixels, known[:, tf.newaxis], of_jpegs * fits * times), files


def _passing(places, files, function, parallel):
    """Returns a dataset of (place, `function` of the file), in order, for files on which it does not fail."""
    return (
        tf.data.Dataset.from_tensor_slices((places, files))
        .map(lambda place, file: (place, function(file)), num_parallel_calls=parallel)
        .ignore_errors()
        .with_options(_plain())
    )


def _plain():
    """Options of a dataset that is made for each request: optimising it would take longer than running it."""
    options = tf.data.Options()
    options.experimental_optimization.apply_default_optimizations = False
    options.autotune.enabled = False
    return options


def _as_stored(file):
    """Decodes a file: uint8 (H, W, 3 for a JPEG, any number for others)."""
    return tf.cond(tf.io.is_jpeg(file), lambda: encoded.decode_jpeg(file), lambda: encoded.decode_as_stored(file))


def _rows(decoded, view, spec, files):
    """Like `views`, for a dataset of (place, pixels) of some of the files (N,); takes them one after another."""
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
