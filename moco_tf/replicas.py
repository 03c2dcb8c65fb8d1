"""What the replicas of a model do together, called inside a training step; a single replica sends nothing.

Axes: n images of this replica, N = n x replicas of the global batch; replica r has rows r * n to (r + 1) * n of it.

Shuffling BN (MoCo, section 3.3): BatchNorm lets the images of one normalisation group see each other. A query could
then find its key by the other images in its group. Keys are therefore encoded in another order than queries.
"""

import tensorflow as tf


def on_one_cpu(number):
    """Returns a strategy of `number` logical CPU devices, to try replicas on a machine with one processor.

    TensorFlow's own choice there, a ring, takes several times as long for a ResNet-50's gradients as one addition.
    """
    devices = [f"CPU:{index}" for index in range(number)]
    return tf.distribute.MirroredStrategy(devices, cross_device_ops=tf.distribute.ReductionToOneDevice())


def count():
    """The number of replicas of the strategy in force, a Python integer."""
    return tf.distribute.get_strategy().num_replicas_in_sync


def check_shared(size, number):
    """Refuses a batch of `size` images that `number` replicas cannot share evenly."""
    if size % number:
        raise ValueError(
            f"each of {number} replicas takes the same number of a batch's images; a batch of {size} does not divide: "
            f"take a multiple of {number}, and leave a partial batch out (drop_remainder=True)"
        )


def gather(values):
    """(n, ...) of each replica -> (N, ...) on all of them, in the order of the replicas; n is the same on all."""
    if count() == 1:
        return values
    values = tf.identity(values)  # on this replica's device: TensorFlow cannot send inputs without a device
    gathered = tf.distribute.get_replica_context().all_gather(values, axis=0)
    size, here = gathered.shape[0], values.shape[0]
    if None not in (size, here) and size == here * count():
        return gathered
    size, here = tf.shape(gathered)[0], tf.shape(values)[0]
    text = tf.strings.format(f"a batch of {{}} images is not shared evenly by {count()} replicas", size)
    with tf.control_dependencies([tf.debugging.Assert(size == here * count(), [text])]):
        return tf.identity(gathered)


def own(values):
    """This replica's rows (n, ...) of the values (N, ...) of the global batch."""
    if count() == 1:
        return values
    rows = tf.shape(values)[0] // count()
    first = tf.distribute.get_replica_context().replica_id_in_sync_group * rows
    return values[first : first + rows]


def draw(random, rows, shape, seed, **more):
    """This replica's rows (n, *shape) of random numbers (N, *shape), a function of `seed` (two integers).

    random: one of `tf.random`'s stateless functions; rows: n, the same on all replicas; more: its other arguments.
    """
    return own(random((rows * count(), *shape), seed, alg="philox", **more))


def add_up(tensors):
    """The sums over all replicas of a list of tensors of one dtype, computed in a single all-reduce."""
    if count() == 1:
        return tensors
    flat = tf.concat([tf.reshape(tensor, [-1]) for tensor in tensors], axis=0)
    flat = tf.distribute.get_replica_context().all_reduce(tf.distribute.ReduceOp.SUM, flat)
    parts = tf.split(flat, [tensor.shape.num_elements() for tensor in tensors])
    return [tf.reshape(part, tensor.shape) for part, tensor in zip(parts, tensors, strict=True)]


def shuffle(images, seed):
    """Redistributes the images of all replicas in a random order that is a function of `seed` (two integers).

    images: (n, ...) of this replica.

    Returns:
      This replica's share (n, ...) and the permutation (N,) that `unshuffle` needs, the same on all replicas.
    """
    everything = gather(images)
    # XLA cannot compile TensorFlow's own shuffles. The generator is named; otherwise the device would choose one.
    keys = tf.random.stateless_uniform(tf.shape(everything)[:1], seed, None, None, tf.int32, alg="philox")
    permutation = tf.argsort(keys)
    # A gather across machines loses the static number of images; oneDNN would then use kernels that round differently.
    return tf.ensure_shape(tf.gather(everything, own(permutation)), images.shape), permutation


def unshuffle(features, permutation):
    """Features (n, ...) of this replica's shuffled images -> (N, ...) of all, in the images' own order."""
    return tf.gather(gather(features), tf.math.invert_permutation(permutation))
