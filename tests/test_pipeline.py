"""No pipeline of the package makes whoever ends it wait."""

import time
from pathlib import Path

import pytest
import tensorflow as tf

from moco_tf.data import augment, check, sources, views
from moco_tf.evaluate import extract

PACKAGE = Path(__file__).parent.parent / "moco_tf"
TASK = augment.cifar(32)


def of_arrays():
    images = tf.data.Dataset.from_tensors(tf.zeros((40, 40, 3), tf.uint8)).repeat()
    return views.views(images, TASK, 16)


PIPELINES = {
    "batches": lambda source: views.batches(source, TASK, 16, seed=0),
    "labelled": lambda source: views.labelled(source, augment.Labelled(TASK.preprocessing), 16, seed=0, epoch=1),
    "in_order": lambda source: source.in_order(),
    "shuffled": lambda source: source.shuffled(0),
    "views": lambda source: of_arrays(),
}


@pytest.mark.parametrize("name", PIPELINES)
def test_a_pipeline_has_no_autotuning(name):
    dataset = PIPELINES[name](sources.embedded("test"))
    assert dataset.options().autotune.enabled is False


def test_nothing_is_left_to_autotuning():
    assert not [path.name for path in PACKAGE.rglob("*.py") if ".AUTOTUNE" in path.read_text()]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["pairs", "views"])
def test_the_end_of_a_pipeline_takes_less_than_a_second_after_it_has_lived_for_twenty(name):
    iterator = iter(PIPELINES[name](sources.embedded("test")))
    begun = time.perf_counter()
    while time.perf_counter() - begun < 20:
        next(iterator)
        time.sleep(0.05)
    ended = time.perf_counter()
    del iterator
    assert time.perf_counter() - ended < 1


def test_features_and_the_check_of_a_folder_go_through_it(monkeypatch):
    """Their datasets are made inside functions: what `map` is called on tells."""
    seen = []

    def noted(dataset, function, deterministic=True):
        seen.append(dataset.options().autotune.enabled)
        return dataset.map(function, num_parallel_calls=2, deterministic=deterministic)

    for module in (views, check):
        monkeypatch.setattr(module, "parallel_map", noted)
    monkeypatch.setattr(check, "FEW", 0)
    source = sources.embedded("test")
    extract.extract(lambda images: tf.zeros((len(images), 2)), source, TASK.preprocessing, limit=8)
    items = tf.data.Dataset.from_tensor_slices(source.contents[:4])
    check.verdicts(items, tf.identity, 4)
    assert seen == [False, False]
