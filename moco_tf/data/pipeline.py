"""How this package runs tf.data: with fixed numbers, so that the end of a pipeline waits for nothing.

tf.data's autotuning is a thread that sleeps between its looks at a pipeline, longer each time, up to a minute; whoever
ends the pipeline waits for it to wake up. Every pipeline of the package goes through `fixed`; a served
graph has it off as well, but leaves the numbers to the server, whose processors are not known here.
"""

import os

import tensorflow as tf

PROCESSORS = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()  # of this process
PARALLEL = 2 * PROCESSORS  # records in work at a time: a slow one, which the others wait for, leaves none idle
PREFETCH = 2  # batches, or what else comes last, ready ahead


def parallel_map(dataset, function, deterministic=True):
    """`dataset.map`, several elements at a time. deterministic: whether they stay in their order."""
    return dataset.map(function, num_parallel_calls=PARALLEL, deterministic=deterministic)


def fixed(dataset):
    """The dataset without autotuning, nor do pipelines that are made of it have any."""
    options = tf.data.Options()
    options.autotune.enabled = False
    return dataset.with_options(options)
