"""Several key views of an image: which they are, and that a run with them goes on."""

import dataclasses

import numpy as np
import pytest
import tensorflow as tf
from test_train import TINY, assert_a_run_goes_on, images, rows  # noqa: F401 - images is a fixture

from moco_tf import config as config_lib
from moco_tf.command import ConfigError
from moco_tf.data import sources
from moco_tf.data.inputs.image import CIFAR10
from moco_tf.pretext import crops
from moco_tf.train import main


@pytest.mark.parametrize("recipe", ["cifar", "v3"])
def test_more_keys_leave_the_query_and_the_first_key_as_they_are_and_differ(recipe):
    (record,) = sources.embedded("test").in_order(1)
    inputs = dataclasses.replace(CIFAR10, image_size=16)
    pair, several = (
        crops.views(record, tf.constant([3, 4], tf.int64), inputs, crops.Options(augment=recipe, positives=count))
        for count in (1, 3)
    )
    assert (len(pair), len(several)) == (2, 4)
    for one, other in zip(pair, several, strict=False):
        np.testing.assert_array_equal(one, other)
    assert len({view.numpy().tobytes() for view in several}) == 4


def test_a_run_with_several_keys_goes_on_bit_for_bit(tmp_path):
    arguments = [*TINY, "--positives=2", "--mask_siblings"]
    whole = assert_a_run_goes_on(tmp_path, arguments)
    assert float(rows(whole)[0]["loss"]) > 0


def test_no_key_is_refused_and_so_are_more_than_a_method_takes(tmp_path, capsys):
    with pytest.raises(ConfigError, match="--positives is at least 1 key view; got 0"):
        config_lib.parse(["--positives=0"])
    with pytest.raises(
        ConfigError, match=r"--positives sets further views, which a memory bank does not use: .*; got 2"
    ):
        config_lib.parse(["--method=memory_bank", "--positives=2"])
    arguments = [*TINY, "--method=moco_v3", "--positives=2", f"--run_dir={tmp_path / 'run'}"]
    assert main([flag for flag in arguments if not flag.startswith(("--queue", "--bn_", "--head"))]) == 2
    assert "trains on 2 views of each record; --pretext=crops gives 3" in capsys.readouterr().err
