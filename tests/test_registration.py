"""Every file with classes of this package in it loads in a new process, after `import moco_tf` alone."""

import ast
import subprocess
import sys
from pathlib import Path

import keras
import pytest

import moco_tf
from moco_tf import registration
from moco_tf.encoders import resnet, vit

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


def loads(path, code="import keras, moco_tf"):
    code += "; import sys; print(type(keras.models.load_model(sys.argv[1])).__name__)"
    done = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True, cwd=PACKAGE.parent)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()[-1]


@pytest.mark.parametrize("name", FILES)
def test_a_saved_model_loads_in_another_process(name, tmp_path):
    FILES[name](tmp_path / "model.keras")
    assert loads(tmp_path / "model.keras") == (name if hasattr(moco_tf, name) else "Functional")


@pytest.mark.parametrize("code", ["import moco_tf, keras", "import tensorflow, moco_tf, keras"])
def test_the_order_of_imports_does_not_matter(code, tmp_path):
    FILES["MoCo"](tmp_path / "model.keras")
    assert loads(tmp_path / "model.keras", code) == "MoCo"


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
