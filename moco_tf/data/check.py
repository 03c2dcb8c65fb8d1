"""Finds which images can be decoded: a folder's before training, a stream's while it is read."""

import functools
import os
from typing import NamedTuple

import tensorflow as tf

from moco_tf import progress
from moco_tf.data import encoded
from moco_tf.data.errors import ERRORS, reason
from moco_tf.data.pipeline import fixed, parallel_map
from moco_tf.startup import stderr_to

WINDOW = 64  # consecutive records of a stream that stand in for one another
FEW = 16  # images, even of 12 megapixels, that are checked one by one before a pipeline has checked them
DARK = 2**14  # a PNG of 16 bits whose values are all below this has 63 of 255 at most when it is read


class Verdict(NamedTuple):
    """What is known of an image: why it cannot be decoded, or its format and size if `problem` is empty.

    peak: the largest value of a PNG of 16 bits. orientation: 2 to 8 for a JPEG that EXIF says to turn or mirror.
    Either is None where it does not apply, or where the run folder of an earlier version does not have it.
    """

    problem: str
    format: str = ""
    height: int = 0
    width: int = 0
    peak: int | None = None
    orientation: int | None = None


@functools.cache
def _verify(channels):
    """`encoded.verify`, traced once a process, not once a split: tracing takes longer than a thousand checks."""
    verify = functools.partial(encoded.verify, channels=channels)
    return tf.function(verify, input_signature=[tf.TensorSpec((), tf.string)], autograph=False)


def verdicts(items, read, total, channels=3):
    """Returns a list with a `Verdict` for each of `total` items; shows a progress bar.

    More than `FEW` items are checked by all processors.

    items: a dataset that is cheap to iterate over; read: an item -> its encoded bytes, in the graph.
    channels: how many channels the images are read with.
    """
    known = [None] * total
    items = fixed(items)
    with progress.bar(total, "images", "Checking") as bar, _silent_decoders():
        if total > FEW:
            for number, verdict in _good_ones(items, read, channels):
                known[number] = verdict
                bar.update()
        if None in known:
            missing = tf.constant([verdict is None for verdict in known])
            # In a graph, as in the pipeline: there an exception of Python is an error of TensorFlow.
            read = tf.function(read, input_signature=[items.element_spec], autograph=False)
            for number, item in items.enumerate().filter(lambda i, _: missing[i]):
                known[int(number)] = _verdict(item, read, channels)
                bar.update()
    return known


def _good_ones(items, read, channels):
    """Yields (number, `Verdict`) of the items that can be decoded, in any order."""

    @tf.autograph.experimental.do_not_convert  # tracing takes half as long
    def look(number, item):
        image = read(item)
        return number, _verify(channels)(image), tf.strings.substr(image, 0, encoded.HEAD)

    facts = parallel_map(items.enumerate(), look, deterministic=False)
    # An item that fails leaves no trace.
    for numbers, batch, heads in facts.ignore_errors().batch(256).as_numpy_iterator():
        for number, facts_of, head in zip(numbers.tolist(), batch.tolist(), heads, strict=True):
            yield number, _good(head, *facts_of)


def _verdict(item, read, channels):
    try:
        image = read(item)
        facts = _verify(channels)(image)
    except ERRORS as error:
        return Verdict(reason(error))
    return _good(image.numpy()[: encoded.HEAD], *facts.numpy().tolist())


def remarks(verdicts, exif=False):
    """Returns sentences on images that are read differently than people may think; exif: whether EXIF turns them."""
    peaks = [verdict.peak for verdict in verdicts if verdict.peak is not None]
    dark = sum(peak < DARK for peak in peaks)
    turned = sum(verdict.orientation is not None for verdict in verdicts)
    sentences = []
    if peaks:
        sentences.append(
            f"PNGs of 16 bits: {len(peaks)}, largest value {max(peaks)} of 65535; the upper eight bits are read"
            + (f", which leaves {dark} of them dark or black: stretch their values up to 65535." if dark else ".")
        )
    if turned:
        how = "so they are read" if exif else "that is not applied, they are read as stored"
        sentences.append(f"Turned or mirrored by EXIF: {turned} JPEGs; {how}.")
    return sentences


def replace_bad(records, note):
    """(place, record) pairs -> the same, with each bad record replaced by the next good one.

    "Next" wraps around within a window of `WINDOW` records, so the replacement depends on the window alone. If
    `records` begin at a multiple of `WINDOW`, a stream entered there equals the stream entered earlier.
    note: a function that Python calls with the ids of a window's bad records; an exception from it ends the stream.
    """

    @tf.autograph.experimental.do_not_convert
    def mend(places, window):
        good = _decodable(window["image"])
        count = tf.size(good, tf.int64)
        nothing_left = "none of the {} records from id {} on can be decoded"

        def mended():
            bad = tf.boolean_mask(window["id"], ~good)
            noted = tf.numpy_function(lambda ids: note(ids.tolist()) or 0, [bad], tf.int64)
            any_good = tf.debugging.Assert(
                tf.reduce_any(good), [tf.strings.format(nothing_left, (count, window["id"][0]))]
            )
            with tf.control_dependencies([noted, any_good]):
                numbers = tf.range(count)
                # (from, to): how many places further on each good record lies
                distance = tf.math.floormod(numbers[tf.newaxis, :] - numbers[:, tf.newaxis], count)
                nearest = tf.argmin(tf.where(good[tf.newaxis, :], distance, count), axis=1)
            return {name: tf.gather(values, nearest) for name, values in window.items()}

        return places, tf.cond(tf.reduce_all(good), lambda: dict(window), mended)

    return parallel_map(records.ragged_batch(WINDOW), mend).unbatch()


def good_only(records):
    """Drops the records whose image cannot be decoded."""

    @tf.autograph.experimental.do_not_convert
    def mark(window):
        return window, _decodable(window["image"])

    marked = parallel_map(records.ragged_batch(WINDOW), mark).unbatch()
    passing = marked.filter(lambda record, good: good)
    return passing.map(lambda record, good: record)


def _good(head, kind, height, width, peak):
    orientation = encoded.orientation(head) if kind == encoded.JPEG else 1
    return Verdict(
        "",
        encoded.FORMATS[kind],
        height,
        width,
        peak if peak >= 0 else None,
        orientation if orientation > 1 else None,
    )


@tf.function(input_signature=[tf.TensorSpec((None,), tf.string)], autograph=False)  # once a process, as `_verify`
def _decodable(images):
    """(N,) strings -> (N,) booleans."""
    # An operation that fails makes its whole function fail; only a dataset can skip the failure.
    count = tf.size(images, tf.int64)
    numbered = tf.data.Dataset.from_tensor_slices(images).enumerate()
    passing = numbered.map(lambda i, image: (i, encoded.verify(image))).ignore_errors().map(lambda i, facts: i)
    # All numbers as one element, with `count`, so that there is always one: `reduce` would optimise its graph anew
    # each time, at thirty times the cost.
    passed = passing.concatenate(tf.data.Dataset.from_tensors(count)).batch(count + 1).get_single_element()
    return tf.reduce_any(passed[:, tf.newaxis] == tf.range(count), axis=0)


def _silent_decoders():
    """Hides libjpeg's remarks about damaged files, which go straight to stderr."""
    return stderr_to(open(os.devnull, "w"))
