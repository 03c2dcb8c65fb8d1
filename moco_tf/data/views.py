"""From records to batches of views: `batches` for the trainer, `views` for a user's own tf.data.

`labelled` is for classifiers, `central` is for frozen encoders, and `first` is for the picture of a run's views. A
task is a function of (record, seed) that gives views.
"""

import tensorflow as tf

from moco_tf.data import arrays, encoded
from moco_tf.data.pipeline import PREFETCH, fixed, parallel_map

CENTRAL = 256  # records in a batch of central views


def batches(source, task, batch_size, seed, step=0, replicas=1, worker=(0, 1), most=None, at_once=None):
    """Endless batches from number `step` on: {"views": what the task gives, (N, ...), "id", "label": int64 (N,)}.

    most: how many of the task's views are wanted; None: all. TensorFlow leaves out the work on other views.
    at_once: does for a whole batch what `task` does per record: (numbers int64 (n,), seeds int64 (n, 2)) -> views.

    With several `replicas`, each batch has N / replicas records; successive batches belong to the replicas of this
    `worker` (its number, the number of workers) in their order. Together they make the batches that one replica sees.

    A view is a function of (seed, epoch, record): `batches(..., step=k)` is `batches(...).skip(k)` without the work.
    An epoch has the whole batches of the source in a new order; its last partial batch is dropped.
    """
    if source.size < batch_size:
        raise ValueError(
            f"A batch of {batch_size} needs as many images, but {source.name} has {source.size}. "
            f"Take a batch size of at most {source.size}."
        )
    per_epoch = source.size // batch_size * batch_size
    number, workers = worker
    here = batch_size // workers
    place = {"start": step * batch_size, "per_epoch": per_epoch, "share": (number * here, here, batch_size)}
    if at_once:

        def batch(epoch, numbers):
            made = at_once(numbers, tf.stack([tf.fill(tf.shape(numbers), seed * 2**32 + epoch), numbers], axis=1))
            return {"views": tuple(made)[:most], "id": numbers, "label": tf.gather(source.labels, numbers)}

        numbers = source.shuffled_numbers(batch_size // replicas, seed, **place)
        return _in_order(numbers.map(batch, num_parallel_calls=PREFETCH, deterministic=True))
    records = source.shuffled(seed, **place)

    def view(epoch, record):
        made = tuple(task(record, _seed(seed, epoch, record)))
        return {"views": made[:most], "id": record["id"], "label": record["label"]}

    return _batches(parallel_map(records, view), batch_size // replicas)


def first(source, task, number, seed, on_device=None):
    """Makes the views of the first batch of `batches(source, task, number, seed)` one by one: pipelines begin slowly.

    on_device: the function that the training step calls on the views first, if any.
    """
    with tf.device("CPU:0"):  # as in a pipeline
        made = [
            tuple(task(record, _seed(seed, epoch, record))) for epoch, record in source.shuffled(seed).take(number)
        ]
    views = tf.nest.map_structure(lambda *each: tf.stack(each), *made)
    return on_device(views) if on_device else views


def central(records, preprocessing):
    """Batches of (central view (N, S, S, 3) normalised, label (N,), id (N,)) of records, for frozen encoders."""

    def central_view(record):
        return preprocessing.of_record(record), record["label"], record["id"]

    return parallel_map(records, central_view).batch(CENTRAL).prefetch(PREFETCH)


def labelled(source, task, batch_size, seed, epoch):
    """An epoch's batches of (view, label), float32 (N, S, S, 3) and int64 (N,), of all images that have a label.

    task: a function (record, seed) -> view. Order and views are functions of (seed, epoch); the last batch may be
    smaller.
    """
    records = source.shuffled(seed, epoch * source.size).take(source.size)

    def view(epoch, record):
        return task(record, _seed(seed, epoch, record)), record["label"]

    known = records.filter(lambda epoch, record: record["label"] >= 0)
    return _batches(parallel_map(known, view), batch_size, drop_remainder=False)


def views(dataset, task, batch_size, seed=0):
    """Batches of (query, key), float32 (N, S, S, C) each, of any dataset of images; new views in every iteration.

    dataset: a tf.data.Dataset of records ({"image": ...}), of images (uint8 or 0-255 floats, (H, W, 3) or grey
    (H, W, 1)), of encoded images (string), or of batches of them, with labels or without: labels are ignored. Or all
    images as one array, or as a list of arrays of one shape. The order is the dataset's: shuffle it before. The last
    partial batch is dropped. Two datasets made by equal calls give equal views.
    task: makes the views, for example `moco_tf.augment.v2(224)`: a function of a record and a seed, int64 (2,), that
    returns (query, key). Its `preprocessing`, if it has one, says C. If C is not 3, the images have C channels.

    Raises:
      ValueError: the elements are not images, their values are plainly not 0..255, or there are fewer than a batch.
    """
    if not isinstance(dataset, tf.data.Dataset):
        dataset = tf.data.Dataset.from_tensor_slices(arrays.as_array(dataset))
    channels = getattr(getattr(task, "preprocessing", None), "channels", 3)
    images = _unbatched(parallel_map(dataset, lambda *element: _image_of(element, channels)))
    arrays.check_dataset(images)
    if 0 <= (size := int(images.cardinality())) < batch_size:
        raise ValueError(f"A batch of {batch_size} needs as many images, but the dataset has {size}.")
    seeds = tf.data.Dataset.random(seed=seed, rerandomize_each_iteration=True).batch(2)

    def view(image, seed):
        if image.dtype == tf.string and channels != 3:
            image = encoded.decode(image, channels)
        return task({"image": arrays.of_eight_bits(image)}, seed)

    numbered = tf.data.Dataset.zip(images, seeds)
    batches = _batches(parallel_map(numbered, view), batch_size)
    batches.preprocessing = getattr(task, "preprocessing", None)  # `fit` compares it with the model's
    return batches


def _seed(seed, epoch, record):
    """Returns the seed of a view: int64 (2,), a function of (seed, epoch, record)."""
    return tf.stack([seed * 2**32 + epoch, record["id"]])


def _batches(examples, batch_size, drop_remainder=True):
    return _in_order(examples.batch(batch_size, drop_remainder=drop_remainder))


def _in_order(batches):
    options = tf.data.Options()
    options.deterministic = True
    options.threading.max_intra_op_parallelism = 1  # records run in parallel; threads within one only wait
    return fixed(batches.prefetch(PREFETCH).with_options(options))


def _image_of(element, channels):
    """Like `arrays.image_of`, but takes only an image or a batch, with so many channels; grey becomes RGB."""
    image = arrays.image_of(*element)
    rank = image.shape.rank
    if image.dtype == tf.string:
        if rank not in (0, 1):
            raise ValueError(f"Encoded images come one by one or in batches of shape (N,), not {image.shape}.")
        return image
    if rank not in (3, 4) or image.shape[-1] not in ((1, 3) if channels == 3 else (channels,)):
        grey = ", 1 in place of 3 if they are grey" if channels == 3 else ""
        raise ValueError(
            f"Images have the shape (H, W, {channels}) or, in batches, (N, H, W, {channels}){grey}, not "
            f"{image.shape}. Use ensure_shape in a map if the shape is lost."
        )
    return arrays.rgb(image) if channels == 3 else image


def _unbatched(images):
    spec = images.element_spec
    if spec.shape.rank in (0, 3):
        return images
    batches, length = int(images.cardinality()), spec.shape[0]
    images = images.unbatch()
    if batches >= 0 and length is not None:  # else the last batch may be partial
        images = images.apply(tf.data.experimental.assert_cardinality(batches * length))
    return images
