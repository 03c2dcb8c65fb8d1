import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tensorflow as tf

from moco_tf import startup

REPOSITORY = Path(__file__).parent.parent


@pytest.mark.parametrize("flags, computes", [("fma avx512_bf16 fsrm", True), ("amx_bf16", True), ("avx2 bf16", False)])
def test_the_processors_flags_tell_whether_it_computes_in_bfloat16(flags, computes, tmp_path):
    (tmp_path / "cpuinfo").write_text(f"processor\t: 0\nflags\t\t: {flags}\n")
    assert startup.computes_bfloat16(tmp_path / "cpuinfo") == computes
    assert not startup.computes_bfloat16(tmp_path / "none")


@pytest.mark.parametrize("given, found", [(None, "1"), ("0", "0")])
def test_training_turns_onednn_on_unless_the_environment_says_otherwise(given, found):
    environment = {name: value for name, value in os.environ.items() if name != "TF_ENABLE_ONEDNN_OPTS"}
    if given:
        environment["TF_ENABLE_ONEDNN_OPTS"] = given
    code = (
        "import gc, os; from moco_tf import startup; startup.load_tensorflow(training=True); "
        "print(os.environ.get('TF_ENABLE_ONEDNN_OPTS'), gc.isenabled(), gc.get_freeze_count() > 0)"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    assert done.stdout.split() == [found, "True", "True"]


def test_other_commands_leave_onednn_to_tensorflow_and_what_keras_would_import_for_itself_to_those_who_use_it():
    environment = {name: value for name, value in os.environ.items() if name != "TF_ENABLE_ONEDNN_OPTS"}
    code = (
        "import os, sys; sys.modules['matplotlib'] = kept = object(); from moco_tf import startup; "
        "startup.load_tensorflow(); assert 'TF_ENABLE_ONEDNN_OPTS' not in os.environ; "
        "assert sys.modules.pop('matplotlib') is kept; "
        "assert 'sklearn' not in sys.modules; import sklearn; import matplotlib.pyplot"
    )
    subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, env=environment, stderr=subprocess.DEVNULL, check=True
    )


def test_only_where_there_is_a_gpu_does_tensorflow_look_for_its_layouts():
    looks = tf.config.optimizer.get_experimental_options().get("layout_optimizer", True)  # as conftest.py loads it
    assert looks == bool(tf.config.list_physical_devices("GPU"))


@pytest.mark.parametrize("module", ["train", "evaluate.finetune", "evaluate.compare"])
def test_the_commands_that_train_ask_for_it(module, monkeypatch, tmp_path):
    class Enough(BaseException):
        pass

    def load(*_, training=False):
        raise Enough(training)

    monkeypatch.setattr("moco_tf.train.load_tensorflow", load)
    monkeypatch.setattr("moco_tf.evaluate.settings.load_tensorflow", load)
    (tmp_path / "config.flags").write_text("--dataset=embedded\n")
    main = importlib.import_module(f"moco_tf.{module}").main
    flags = [f"--run_dir={tmp_path}"] if module == "train" else [f"--encoder={tmp_path}"]
    with pytest.raises(Enough, match="True"):
        main(flags)
