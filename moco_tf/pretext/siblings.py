"""Several pictures of one thing: the views of a record are crops of different pictures, such as frames of a clip.

Data: a folder with one sub-folder per thing. Supervision: that two pictures show one thing. Sources: rho-MoCo (arXiv:
2104.14558) and VINCE (arXiv:2003.07990), where each of a query's several keys is compared with the negatives alone;
CVRL (arXiv:2008.03800), where the probability falls linearly with the distance. Things are drawn equally often,
however many pictures they have.

Axes: F pictures of a thing, P keys.
"""

import dataclasses
import logging

from moco_tf import command
from moco_tf.pretext import crops
from moco_tf.recorded import flag

log = logging.getLogger("moco_tf")


@dataclasses.dataclass(frozen=True)
class Options(crops.Options):
    """Which pictures are drawn, and how a view of each is cropped and distorted."""

    positives: int = flag(1, "P: key views of a thing beside the query view. rho-MoCo: 1 or 3, VINCE: 4.")
    max_distance: int = flag(
        0, "Query and key pictures are at most so many places apart in the order of their names; 0: any."
    )
    distance: str = flag(
        "uniform",
        "How far apart they are drawn. uniform: all pairs equally likely (rho-MoCo, VINCE); linear: the further the "
        "rarer, rarest at the longest distance (CVRL).",
        choices=("uniform", "linear"),
    )

    def check(self):
        command.require(
            self, self.views_on != "device", "views_on", "is host or both, since pictures are read one by one"
        )
        command.require(self, self.max_distance >= 0, "max_distance", "is 0 or more places")


def records(source, options):
    """Returns the things of a source of images; logs how many they are, and of how many pictures.

    Raises:
      ValueError: no thing has a different picture for the query and each key.
    """
    from moco_tf.data import things

    grouped = things.of_images(source)
    counts = grouped.counts
    if counts.max() <= options.positives:
        raise ValueError(
            f"--positives={options.positives} and a query are drawn from {options.positives + 1} different pictures "
            f"of a thing; the largest of {grouped.size} things has {counts.max()}: take fewer, or --pretext=crops"
        )
    log.info(
        f"  Things: {grouped.size}, of {counts.min()} to {counts.max()} pictures, {counts.sum()} in all; an epoch "
        "draws from each once"
    )
    if left_out := len(source.good) - counts.sum():
        log.warning(f"  Left out: {left_out} pictures that lie in no sub-folder, and so are of no thing")
    if alone := int((counts == 1).sum()):
        log.warning(f"  Things with a single picture: {alone}; all their views are crops of it")
    if few := int(((counts > 1) & (counts <= options.positives)).sum()):
        log.warning(f"  Things with fewer than {options.positives + 1} pictures: {few}; some of their keys share one")
    if 0 < 2 * options.max_distance < options.positives:
        log.warning(
            f"  --max_distance={options.max_distance} leaves at most {2 * options.max_distance} pictures for "
            f"--positives={options.positives} keys: some share one"
        )
    return grouped


def views(record, seed, inputs, options):
    """(query view, P key views, M small views of the query's picture) of a thing, float32 (S, S, 3) each, normalised.

    record: a dict with "files", the thing's pictures in order (F,); seed: int64 (2,); inputs: the encoder's
    `Preprocessing`.
    """
    import tensorflow as tf

    from moco_tf.data.encoded import decode
    from moco_tf.data.sources import read_file

    fold_in = tf.random.experimental.stateless_fold_in
    kinds = crops.kinds(inputs, options)
    places = pictures(tf.size(record["files"]), fold_in(seed, len(kinds)), options)
    made = ()
    for number, kind in enumerate(kinds):
        place = places[number] if number <= options.positives else places[0]  # small views: of the query's picture
        picture = {"image": read_file(record["files"][place])}
        if inputs.channels != 3:
            picture["image"] = decode(picture["image"], inputs.channels)
        made += crops.host_part(picture, fold_in(seed, number), (kind,), inputs, options)
    return made


on_device = crops.on_device


def pictures(count, seed, options):
    """Returns the places (1 + P,) of the pictures of query and keys among `count`, a function of the seed.

    The distance t of the query and its first key is drawn first, then the place of the earlier of the two, then which
    of the two is the query. With "uniform" all pairs are equally likely. With "linear"
    P(t) = (2 (D - t) + 1) / D^2, the share of CVRL's density 2 / D (1 - t / D) between t - 1 and t, where D is the
    longest distance. The other keys are drawn without replacement, each as likely as it would have been as the first
    key. The query's picture is not a key's, unless there is no other picture. If the others are too few, they repeat.
    """
    import tensorflow as tf

    count = tf.cast(count, tf.int32)
    longest = tf.minimum(options.max_distance or count - 1, count - 1)  # D

    def weights(distances):
        """Returns how likely one pair at each distance is, up to a factor."""
        if options.distance == "uniform":
            return tf.ones_like(distances, tf.float32)
        return tf.cast(2 * (longest - distances) + 1, tf.float32) / tf.cast(count - distances, tf.float32)

    def drawn():
        uniforms = tf.random.stateless_uniform((3,), seed, alg="philox")
        distances = tf.range(1, longest + 1)
        sums = tf.cumsum(weights(distances) * tf.cast(count - distances, tf.float32))
        place = tf.searchsorted(sums, uniforms[:1] * sums[-1], side="right")[0]
        distance = 1 + tf.minimum(place, longest - 1)
        room = count - distance
        earlier = tf.minimum(tf.cast(uniforms[1] * tf.cast(room, tf.float32), tf.int32), room - 1)
        pair = tf.stack([earlier, earlier + distance])
        pair = tf.where(uniforms[2] < 0.5, pair, pair[::-1])
        return pair if options.positives == 1 else tf.concat([pair[:1], keys(pair[0], pair[1])], axis=0)

    def keys(query, first):
        # A race: each candidate arrives after a time drawn from the exponential distribution of its weight.
        others = tf.random.experimental.stateless_fold_in(seed, 1)
        distances = tf.abs(tf.range(count) - query)
        times = -tf.math.log(1.0 - tf.random.stateless_uniform(tf.shape(distances), others, alg="philox"))
        candidate = (distances >= 1) & (distances <= longest)
        times = tf.where(candidate, times / weights(distances), float("inf"))
        order = tf.argsort(tf.where(tf.range(count) == first, -1.0, times))
        return tf.gather(order, tf.range(options.positives) % tf.reduce_sum(tf.cast(candidate, tf.int32)))

    places = tf.cond(count == 1, lambda: tf.zeros(1 + options.positives, tf.int32), drawn)
    return tf.ensure_shape(places, (1 + options.positives,))
