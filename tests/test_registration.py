"""Every file with classes of this package in it loads in a new process, after `import moco_tf` alone."""

import ast
import subprocess
import sys
from pathlib import Path

import keras
import pytest

import moco_tf
from moco_tf import registration, torch_weights, train
from moco_tf.encoders import resnet, vit
from moco_tf.evaluate import finetune

PACKAGE = Path(__file__).parent.parent / "moco_tf"


def small(stem="cifar", size=16):
    return resnet.resnet14(image_size=size, stem=stem, width=4)


def of_method(cls, *args, optimizer=moco_tf.SGD, **kwargs):
    def save(path):
        model = cls(small(), *args, dim=4, **kwargs)
        model.compile(optimizer(0.1))
        model.save(path)

    return save


FILES = {
    "MoCo": of_method(moco_tf.MoCo, queue_size=8),
    "MoCoV3": of_method(moco_tf.MoCoV3, hidden_dim=4, optimizer=moco_tf.LARS),
    "EndToEnd": of_method(moco_tf.EndToEnd, optimizer=moco_tf.AdamW),
    "MemoryBank": of_method(moco_tf.MemoryBank, 16, queue_size=8),
    "a ResNet": lambda path: small("imagenet", 32).save(path),
    "a ViT": lambda path: vit.vit(16, 1, 2, image_size=8, patch_size=4).save(path),
}


def kinds(paths, code="import keras, moco_tf"):
    """The classes of the models in files, loaded in one new process."""
    code += "; import sys; print(*(type(keras.models.load_model(path)).__name__ for path in sys.argv[1:]))"
    done = subprocess.run([sys.executable, "-c", code, *paths], capture_output=True, text=True, cwd=PACKAGE.parent)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_saved_models_load_in_another_process(tmp_path):
    paths = [tmp_path / f"{name}.keras" for name in FILES]
    for save, path in zip(FILES.values(), paths, strict=True):
        save(path)
    assert kinds(paths) == [name if hasattr(moco_tf, name) else "Functional" for name in FILES]


@pytest.mark.slow
@pytest.mark.parametrize("code", ["import moco_tf, keras", "import tensorflow, moco_tf, keras"])
def test_the_order_of_imports_does_not_matter(code, tmp_path):
    FILES["MoCo"](tmp_path / "model.keras")
    assert kinds([tmp_path / "model.keras"], code) == ["MoCo"]


def test_what_commands_leave_loads_in_another_process(tmp_path):
    """Fine-tuning's network, and the encoder that a PyTorch file becomes."""
    run, tensors = tmp_path / "run", tmp_path / "encoder.safetensors"
    small = ["--arch=resnet10", "--width=4", "--stem=cifar", "--image_size=16", "--augment=cifar", "--knn_every=0"]
    data = ["--train_split=test", "--batch_size=8", "--queue_size=8", "--max_steps=1"]
    assert train.main([*small, *data, f"--run_dir={run}"]) == 0
    assert finetune.main([f"--encoder={run}", "--limit=20", "--epochs=1", f"--output={tmp_path / 'finetuned'}"]) == 0
    assert torch_weights.main([f"--encoder={run}", f"--output={tensors}"]) == 0
    assert torch_weights.main([f"--checkpoint={tensors}", f"--output={tmp_path / 'converted'}"]) == 0
    paths = [tmp_path / "finetuned/model.keras", tmp_path / "converted/encoder.keras"]
    assert kinds(paths) == ["Functional", "Functional"]


def test_every_registered_class_is_listed():
    registered = {}
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            decorators = getattr(node, "decorator_list", ())
            if any("register_keras_serializable" in ast.unparse(decorator) for decorator in decorators):
                registered[node.name] = ".".join(("moco_tf", *path.relative_to(PACKAGE).with_suffix("").parts))
    assert registered == registration.CLASSES


def test_a_class_that_is_loaded_is_not_replaced_by_a_stand_in():
    registration.register_with(keras)
    assert keras.saving.get_custom_objects()["moco_tf>MoCo"] is moco_tf.MoCo
