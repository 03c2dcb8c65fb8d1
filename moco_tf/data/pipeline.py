"""How this package runs tf.data: with fixed numbers, so that the end of a pipeline waits for nothing.

tf.data's autotuning is a thread that sleeps between its looks at a pipeline, longer each time, up to a minute. Whoever
ends the pipeline waits for the thread to wake up. Every pipeline of the package goes through `fixed`. A served graph
has autotuning off as well, but leaves the numbers to the server, whose processors are not known here.
"""

import os

import tensorflow as tf

PROCESSORS = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()  # of this process
PARALLEL = 2 * PROCESSORS  # records in work at a time: no processor is idle while the others wait for a slow record
PREFETCH = 2  # batches, or other last elements, that are ready ahead


def parallel_map(dataset, function, deterministic=True):
    """`dataset.map`, several elements at a time. deterministic: whether they stay in their order."""
    return dataset.map(function, num_parallel_calls=PARALLEL, deterministic=deterministic)


def fixed(dataset):
    """Returns the dataset without autotuning; pipelines that are made of it have none either."""
    options = tf.data.Options()
    options.autotune.enabled = False
    return dataset.with_options(options)
