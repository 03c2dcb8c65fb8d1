"""Encoders: images -> features, as functional Keras models."""

from moco_tf.encoders import heads, resnet, vit
from moco_tf.encoders.batch_norm import BatchNorm

__all__ = ["BatchNorm", "heads", "resnet", "vit"]
