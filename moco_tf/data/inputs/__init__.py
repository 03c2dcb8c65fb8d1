"""What encoders expect: `image.Preprocessing`, `image_and_depth.ImageAndDepth` or `text.Words`.

Each says what it reads of a source (`records_of`) and of an image's file (`channels_of_files`), how a record becomes
the encoder's input (`of_record`, `spec`), which signatures a server gets, and what kNN uses
without an encoder (`plain`).
"""

import dataclasses

from moco_tf.data.inputs.image import Preprocessing
from moco_tf.data.inputs.image_and_depth import ImageAndDepth
from moco_tf.data.inputs.text import Words


def of_settings(settings):
    """Makes inputs again from the settings that `dataclasses.asdict` made; raises KeyError if one is missing."""
    kind = Words if "hash_buckets" in settings else ImageAndDepth if "depth_max" in settings else Preprocessing
    return kind(**{field.name: settings[field.name] for field in dataclasses.fields(kind)})
