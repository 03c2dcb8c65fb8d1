"""A task of a user's own: the document's example, whole, and what a method and a metric cost."""

import csv
import re
import shutil
import sys
from pathlib import Path

import keras
import numpy as np
import pytest

import moco_tf
from moco_tf import config as config_lib
from moco_tf import frozen
from moco_tf.checkpoint import Checkpoints
from moco_tf.command import ConfigError, HelpAsked
from moco_tf.evaluate import knn
from moco_tf.methods.pretrainer import Pretrainer
from moco_tf.serving import model_card, saved_model
from moco_tf.train import main

DOCUMENT = Path(__file__).parent.parent / "docs/pretext.md"
SMALL = [
    *("--pretext=turns", "--arch=resnet10", "--width=4", "--image_size=32", "--augment=cifar", "--train_split=test"),
    *("--batch_size=40", "--lr_per=step", "--epochs=2", "--knn_every=0", "--checkpoint_every=3"),
]


@pytest.fixture(scope="module")
def example():
    (code,) = re.findall(r"```python\n(.*?)```", DOCUMENT.read_text(), re.S)
    assert code.count("\n") < 60  # what a task of one's own costs, with a model and a metric
    return code


@pytest.fixture(scope="module")
def turns(example, tmp_path_factory):
    """The example as a module that can be imported; its folder."""
    folder = tmp_path_factory.mktemp("own")
    (folder / "turns.py").write_text(example)
    sys.path.insert(0, str(folder))
    yield folder
    sys.path.remove(str(folder))


@pytest.fixture(scope="module")
def run(turns):
    assert main([*SMALL, "--max_steps=4", f"--run_dir={turns / 'run'}"]) == 0
    return turns / "run"


def rows(run):
    with open(run / "metrics.csv", newline="") as file:
        return list(csv.DictReader(file))


def test_the_example_is_a_file_of_under_60_lines(example):
    assert len(example.splitlines()) < 60


def test_a_run_of_it_has_its_own_metrics_and_none_of_contrast(run):
    (row,) = rows(run)
    assert list(row) == [
        "epoch",
        "step",
        "loss",
        "accuracy",
        "learning_rate",
        "images_per_second",
        "step_share",
        "data_wait",
        "knn_top1",
    ]
    assert 0.1 < float(row["accuracy"]) < 1 and float(row["loss"]) < 3


def test_it_goes_on_bit_for_bit(run, turns):
    shutil.copytree(run, turns / "cut")
    shutil.rmtree(turns / "cut/checkpoints/step-000000004")  # as if killed before it was there
    assert main([*SMALL, "--max_steps=4", f"--run_dir={turns / 'cut'}"]) == 0
    assert "Going on from step 3 of 4." in (turns / "cut/train.log").read_text()
    from moco_tf import build

    whole, cut = (build.trained(folder) for folder in (run, turns / "cut"))
    for a, b in zip(whole.variables, cut.variables, strict=True):
        np.testing.assert_array_equal(a, b, err_msg=a.path)


def test_views_that_the_step_is_to_finish_are_refused_where_the_task_says_no_way_to(turns, capsys):
    assert main([*SMALL, "--views_on=device", f"--run_dir={turns / 'unfinished'}"]) == 2
    assert "no on_device" in capsys.readouterr().err


def test_it_is_judged_and_exported_like_any_other(run, turns, capsys):
    arguments = [f"--encoder={run}", "--dataset=embedded", "--limit=200", f"--output={turns / 'knn'}"]
    assert knn.main(arguments) == 0
    assert "kNN" in capsys.readouterr().out
    saved_model.export_run(run, turns / "encoder/1")
    assert frozen.read(turns / "encoder").encode(np.zeros((1, 32, 32, 3), np.float32))["embedding"].shape == (1, 4)


def test_its_model_is_saved_and_loaded_by_keras(turns):
    from turns import Turns

    inputs = keras.Input((32, 32, 3))
    backbone = keras.Model(inputs, keras.layers.GlobalAveragePooling2D()(inputs))
    model = Turns(backbone, moco_tf.Preprocessing(32))
    model.compile(moco_tf.SGD(0.1))
    model.save(turns / "model.keras")
    again = keras.models.load_model(turns / "model.keras")
    images = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), "uint8")
    np.testing.assert_array_equal(model.predict(images, verbose=0), again.predict(images, verbose=0))


def test_its_flags_stand_under_its_own_title_and_wrong_ones_are_refused(turns):
    with pytest.raises(HelpAsked, match="--pretext=turns:"):
        config_lib.parse(["--pretext=turns", "--help"])
    with pytest.raises(ConfigError, match="--crop_min lies between 0 and 1; got 2"):
        config_lib.parse(["--pretext=turns", "--crop_min=2"])


@pytest.mark.parametrize(
    "code, message",
    [
        ("x = 1", r"--pretext=broken: its module has a dataclass Options and views\(record"),
        ("1 / 0", "--pretext=broken: the module does not load: ZeroDivisionError"),
        ("import no_such_package", "--pretext=broken: the module does not load: ModuleNotFoundError"),
    ],
)
def test_a_module_that_is_no_task_is_refused_in_one_line(tmp_path, monkeypatch, code, message):
    (tmp_path / "broken.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "broken", raising=False)
    with pytest.raises(ConfigError, match=message) as refusal:
        config_lib.parse(["--pretext=broken"])
    assert "\n" not in str(refusal.value)
    monkeypatch.delitem(sys.modules, "broken", raising=False)


def test_an_unknown_task_or_method_is_refused_with_the_known_ones():
    with pytest.raises(ConfigError, match=r"--pretext is one of .*crops, .* or a module .* got 'cropz'"):
        config_lib.parse(["--pretext=cropz"])
    with pytest.raises(ConfigError, match=r"--method is one of moco, moco_v3, .* got 'moko'"):
        config_lib.parse(["--method=moko"])
    with pytest.raises(ConfigError, match="--method=queue: its module has a dataclass Options and model"):
        config_lib.parse(["--method=queue"])  # Python's own module, as a file of the methods' folder is no method


def test_a_method_of_ones_own_is_a_file_too(tmp_path, monkeypatch, capsys):
    (tmp_path / "mine.py").write_text(
        "from moco_tf.methods import moco\n"
        "from moco_tf.methods.flags import MoCo as Options\n"
        "def model(config, options, inputs, source):\n"
        "    return moco.model(config, options, inputs, source)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    small = [flag for flag in SMALL if "pretext" not in flag]
    arguments = [*small, "--method=mine", "--queue_size=8", "--max_steps=1", f"--run_dir={tmp_path / 'run'}"]
    assert main(arguments) == 0
    assert "Done: step 1" in capsys.readouterr().out


UNEQUAL = """
import dataclasses
import tensorflow as tf
from moco_tf.pretext.crops import Options

def views(record, seed, inputs, options):
    return tf.zeros((32, 32, 3)), tf.zeros((16, 16, 3))
"""


def test_views_of_unequal_shapes_are_refused_before_training(tmp_path, monkeypatch, capsys):
    (tmp_path / "unequal.py").write_text(UNEQUAL)
    monkeypatch.syspath_prepend(tmp_path)
    assert main([*SMALL, "--pretext=unequal", "--queue_size=8", f"--run_dir={tmp_path / 'run'}"]) == 2
    assert "all views of a record are of one shape; got (32, 32, 3), (16, 16, 3)" in capsys.readouterr().err


class Watched(moco_tf.MoCo):
    METRICS = moco_tf.MoCo.METRICS | {"hardest_negative": lambda terms: terms.hardest}


def fitted(kind):
    """A model of this class after a step, and what `fit` gave."""
    inputs = keras.Input((8, 8, 3))
    model = kind(keras.Model(inputs, keras.layers.GlobalAveragePooling2D()(inputs)), dim=4, queue_size=8)
    model.compile(moco_tf.SGD(0.1))
    pair = np.random.default_rng(0).normal(size=(2, 4, 8, 8, 3)).astype("float32")
    return model, model.fit(*pair, batch_size=4, verbose=0).history


def test_files_with_other_metrics_are_read_and_only_the_running_sums_begin_anew(tmp_path):
    before, _ = fitted(moco_tf.MoCo)
    before.save_weights(tmp_path / "model.weights.h5")
    Checkpoints(tmp_path / "checkpoints", before).save()
    for read in (
        lambda model: model.load_weights(tmp_path / "model.weights.h5"),
        lambda model: Checkpoints(tmp_path / "checkpoints", model).restore_last(),
    ):
        model, _ = fitted(Watched)
        read(model)
        for a, b in zip(before.variables, model.variables, strict=True):
            np.testing.assert_array_equal(np.zeros(7) if b is model.totals else a, b, err_msg=b.path)


def test_another_weight_of_another_shape_is_refused(tmp_path):
    class Centred(moco_tf.MoCo):
        WIDTH = 3

        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.centre = self.add_weight(name="centre", shape=(self.WIDTH,), trainable=False)

    class Wider(Centred):
        WIDTH = 7  # as many as totals of one metric more

    fitted(Centred)[0].save_weights(tmp_path / "model.weights.h5")
    with pytest.raises(ValueError, match=r"\(3,\)"):
        fitted(Wider)[0].load_weights(tmp_path / "model.weights.h5")


def test_a_metric_is_a_line_in_one_class():
    model, logs = fitted(Watched)
    assert logs["hardest_negative"][0] >= logs["negative_similarity"][0]
    assert "hardest_negative" in model.columns() and issubclass(Watched, Pretrainer)


def test_small_views_are_refused_by_a_method_that_has_none(tmp_path, capsys):
    for method in ("moco_v3", "end_to_end"):
        flags = [*SMALL, "--pretext=crops", f"--method={method}", "--small_views=2"]
        assert main([*flags, f"--run_dir={tmp_path / method}"]) == 2
        assert f"{method} has no small views; got --small_views=2: leave it out" in capsys.readouterr().err


STEMLESS = """
from moco_tf.pretext.crops import Options, views

UNUSED = ("stem", "width")
"""


def test_a_task_without_stem_has_a_model_card(tmp_path, monkeypatch):
    (tmp_path / "stemless.py").write_text(STEMLESS)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "run").mkdir()
    (tmp_path / "run/config.flags").write_text("--pretext=stemless\n")
    assert model_card.of_run(tmp_path / "run")["architecture"] == {"arch": "resnet50"}
