"""From one run to the next: the encoder that a run keeps, and weights that another starts from."""

import subprocess
import sys

import keras
import numpy as np
import pytest

from moco_tf import build, start_from, torch_weights
from moco_tf.command import ConfigError
from moco_tf.data.inputs.image import Preprocessing
from moco_tf.encoders import resnet, two_modalities, vit
from moco_tf.train import main

TINY = ["--dataset=embedded", "--arch=resnet10", "--width=4", "--image_size=32", "--augment=cifar", "--batch_size=16",
        "--queue_size=32", "--dim=8", "--knn_every=0"]  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of three steps."""
    folder = tmp_path_factory.mktemp("start") / "run"
    assert main([*TINY, "--max_steps=3", "--lr=0.5", f"--run_dir={folder}"]) == 0
    return folder


def test_a_run_ends_with_its_encoder_in_a_file_and_names_what_comes_next(run):
    kept = keras.models.load_model(run / "encoder.keras")
    images = np.random.default_rng(0).normal(size=(4, 32, 32, 3)).astype(np.float32)
    assert np.array_equal(kept(images), build.trained(run).backbone(images))
    text = (run / "train.log").read_text()
    for words in (f"Encoder: {run}/encoder.keras", f"moco_tf.evaluate.look --encoder={run}",
                  f"moco_tf.search.build --encoder={run}", f"moco_tf.serving.export --run_dir={run}"):  # fmt: skip
        assert words in text


@pytest.mark.parametrize("kind", ["torch", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("run", "keras"))])
def test_a_run_starts_from_an_encoder_with_a_fresh_queue_at_step_0(run, tmp_path, kind):
    place = {"run": run, "keras": run / "encoder.keras", "torch": tmp_path / "encoder.safetensors"}[kind]
    if kind == "torch":
        assert torch_weights.main([f"--encoder={run}", f"--output={place}"]) == 0
    # At a rate of 0 a step moves no weight.
    new = tmp_path / "new"
    flags = [*TINY, f"--start_from={place}", "--max_steps=1", "--lr=1e-30", "--weight_decay=0", "--seed=1"]
    assert main([*flags, f"--run_dir={new}"]) == 0
    assert "Starts from" in (new / "train.log").read_text()
    begun, plain, trained = build.trained(new), build.trained(run), build.trained(run).backbone
    for mine, its in zip(begun.backbone.trainable_weights, trained.trainable_weights, strict=True):
        np.testing.assert_allclose(mine, its, rtol=1e-6)
    key, query = begun.key_encoder.weights, begun.query_encoder.weights
    for mine, its in zip(key, query, strict=True):
        if "moving" not in mine.path:
            np.testing.assert_allclose(mine, its, rtol=1e-5, atol=1e-6)
    assert begun.steps_done == 1 and not np.array_equal(begun.queue.keys, plain.queue.keys)
    assert main([*flags, f"--run_dir={new}", "--max_steps=2"]) == 0  # goes on from its checkpoint
    assert (new / "train.log").read_text().count("Starts from") == 1


def test_layers_that_do_not_fit_are_listed_and_an_encoder_of_another_kind_is_refused(run, tmp_path, capsys):
    other = resnet.resnet10(image_size=32, width=4, stem="cifar")
    other.save(tmp_path / "other.keras")
    flags = [*TINY, "--max_steps=1", f"--run_dir={tmp_path}/new"]
    assert main([*flags, f"--start_from={tmp_path}/other.keras"]) == 0
    assert "Not taken: conv1 is [(3, 3, 3, 4)] there and [(7, 7, 3, 4)] here" in capsys.readouterr().out
    vit.vit(16, 1, 2, image_size=32).save(tmp_path / "vit.keras")
    flags = [*TINY, "--max_steps=1", f"--run_dir={tmp_path}/other"]
    assert main([*flags, f"--start_from={tmp_path}/vit.keras"]) == 2
    assert "conv1 is not there, nor does another fit" in capsys.readouterr().err
    for name, content, said in (("gone.keras", None, "no such file"), ("bad.keras", b"", "cannot be read"),
                                ("bad.pth", b"bad", "bad.pth:")):  # fmt: skip
        if content is not None:
            (tmp_path / name).write_bytes(content)
        assert main([*flags, f"--start_from={tmp_path / name}"]) == 2
        assert said in capsys.readouterr().err
    (tmp_path / "folder").mkdir()
    assert main([*flags, f"--start_from={tmp_path}/folder"]) == 2
    assert "none of a run" in capsys.readouterr().err


def test_a_vits_positions_stay_where_sizes_differ():
    small, large = (vit.vit(16, 1, 2, image_size=size) for size in (32, 64))
    positions = large.get_layer("tokens").pos_embed.numpy()
    taken = start_from.copy_by_name(small, large)
    assert not taken.left and np.array_equal(large.get_layer("tokens").pos_embed, positions)
    assert np.array_equal(large.get_layer("blocks.0.attn.qkv").kernel, small.get_layer("blocks.0.attn.qkv").kernel)


def test_an_encoder_without_a_path_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"--start_from=.*there is no such file"):
        start_from.encoder(tmp_path / "nothing", "--start_from")


def test_both_networks_of_two_modalities_take_their_weights():
    def make(seed):
        keras.utils.set_random_seed(seed)
        color = lambda channels: resnet.resnet10(image_size=16, width=2, stem="cifar", channels=channels)  # noqa: E731
        return two_modalities.of_two_colors(color, "lab", Preprocessing(image_size=16))

    source, target = make(0), make(1)
    taken = start_from.copy_by_name(source, target)
    assert not taken.left and len(set(taken.layers)) == len(taken.layers)
    for mine, its in zip(target.weights, source.weights, strict=True):
        np.testing.assert_array_equal(mine, its)


def test_a_run_on_two_replicas_starts_from_one_on_a_single_device(run, tmp_path):
    flags = [*TINY, f"--start_from={run}", "--max_steps=1", "--virtual_replicas=2", f"--run_dir={tmp_path}/new"]
    code = "import sys; from moco_tf.train import main; sys.exit(main(sys.argv[1:]))"
    done = subprocess.run([sys.executable, "-c", code, *flags], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "Starts from" in done.stdout, done.stderr
