import numpy as np
import pytest
import tensorflow as tf

from moco_tf import replicas
from moco_tf.methods.losses import info_nce, unit_length
from moco_tf.methods.queue import Queue


@pytest.mark.parametrize("size, batch", [(8, 4), (8, 3), (7, 5), (4, 4), (4, 11), (1, 3), (5, 1)])
def test_any_batch_size_wraps_around_as_a_naive_loop_does(size, batch):
    queue = Queue(size, 2)
    expected, pointer = queue.keys.numpy(), 0
    enqueue = tf.function(queue.enqueue)
    for step in range(6):
        keys = np.random.default_rng(step).normal(size=(batch, 2)).astype("float32")
        enqueue(keys)
        for key in keys:
            expected[pointer % size] = key
            pointer += 1
        np.testing.assert_array_equal(queue.keys.numpy(), expected)
        assert int(queue.pointer) == pointer % size


def test_it_starts_with_unit_vectors_that_the_seed_determines():
    a, b, c = (Queue(16, 8, seed=seed).keys.numpy() for seed in (0, 0, 1))
    np.testing.assert_allclose(np.linalg.norm(a, axis=1), 1.0, rtol=1e-6)
    np.testing.assert_array_equal(a, b)
    assert (a != c).all()


def test_it_is_never_coarser_than_float32_nor_trained():
    queue = Queue(4, 2, dtype="bfloat16")
    assert queue.keys.dtype == "float32"
    assert not queue.trainable_variables


@pytest.mark.parametrize("number", [1, 2])
def test_neither_enqueuing_nor_the_loss_reads_the_queue_as_a_whole(number):
    strategy = replicas.on_one_cpu(number) if number > 1 else tf.distribute.get_strategy()
    with strategy.scope():
        queue = Queue(9000, 2)  # two blocks of the loss, and a rest
    batch = unit_length(tf.ones((3, 2)))

    def step():
        loss = info_nce(batch, batch, queue.keys.value, 0.2).loss
        with tf.control_dependencies([loss]):
            queue.enqueue(batch)
        return loss

    graph = tf.function(lambda: strategy.run(step)).get_concrete_function().graph.as_graph_def()
    nodes = [*graph.node, *(node for function in graph.library.function for node in function.node_def)]
    uses = {node.op for node in nodes if node.attr["dtype"].type == tf.float32.as_datatype_enum}  # the queue's only
    assert {"ResourceGather", "ResourceScatterUpdate"} <= uses
    assert not uses & {"ReadVariableOp", "AssignVariableOp"}
