"""Every file with classes of this package in it loads in a new process, after `import moco_tf` alone."""

import ast
import subprocess
import sys
from pathlib import Path

import keras
import pytest

import moco_tf
from moco_tf import registration, torch_weights
from moco_tf.encoders import resnet, vit
from moco_tf.evaluate import finetune

PACKAGE = Path(__file__).parent.parent / "moco_tf"
CHECKPOINT = Path(__file__).parent / "torch_files/v1_legacy.pth.tar"


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


def of_commands(folder):
    """What commands leave: fine-tuning's network, and the encoder that a PyTorch file becomes."""
    run, small = folder / "run", ["--image_size=16", "--augment=cifar", "--batch_size=40", "--bn_groups=4"]
    assert torch_weights.main([f"--checkpoint={CHECKPOINT}", f"--output={run}", *small]) == 0
    finetuned = [f"--output={folder / 'finetuned'}", "--dataset=embedded", "--limit=20", "--epochs=1"]
    assert finetune.main([f"--encoder={run}", *finetuned]) == 0
    converted = [f"--output={folder / 'converted'}", "--part=encoder"]
    assert torch_weights.main([f"--checkpoint={CHECKPOINT}", *converted]) == 0
    return [folder / "finetuned/model.keras", folder / "converted/encoder.keras"]


def test_models_and_what_commands_leave_load_in_another_process(tmp_path):
    paths = [tmp_path / f"{name}.keras" for name in FILES]
    for save, path in zip(FILES.values(), paths, strict=True):
        save(path)
    expected = [name if hasattr(moco_tf, name) else "Functional" for name in FILES]
    assert kinds([*paths, *of_commands(tmp_path)]) == [*expected, "Functional", "Functional"]


@pytest.mark.slow
@pytest.mark.parametrize("code", ["import moco_tf, keras", "import tensorflow, moco_tf, keras"])
def test_the_order_of_imports_does_not_matter(code, tmp_path):
    FILES["MoCo"](tmp_path / "model.keras")
    assert kinds([tmp_path / "model.keras"], code) == ["MoCo"]


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
