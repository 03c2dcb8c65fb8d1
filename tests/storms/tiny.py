"""The pretext task of the storms' runs, as small as one can be: a start is quick.

`--pretext=tests.storms.tiny`: MoCo with one dense layer; two crops of an image are its views.
"""

import dataclasses

import keras
import tensorflow as tf

import moco_tf

SIZE = 8  # pixels


@dataclasses.dataclass(frozen=True)
class Options:
    """None."""


def views(record, seed, inputs, options):
    image = tf.image.decode_jpeg(record["image"], channels=3)
    seeds = tf.random.split(seed, 2)
    return tuple(
        inputs.normalize(tf.cast(tf.image.stateless_random_crop(image, (SIZE, SIZE, 3), seeds[i]), tf.float32))
        for i in range(2)
    )


def model(config, options, inputs, source):
    images = keras.Input((SIZE, SIZE, 3))
    features = keras.layers.Dense(4, name="dense")(keras.layers.Flatten()(images))
    return moco_tf.MoCo(
        keras.Model(images, features), dim=4, head="linear", queue_size=16, preprocessing=inputs, seed=config.seed
    )
