"""Weights for Detectron2: what the authors' converter makes, for every ResNet that Detectron2 can build."""

import json
import pickletools
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))
from make_detectron2_names import NAMES, checkpoint, summary  # noqa: E402

from moco_tf import build  # noqa: E402
from moco_tf.config import make  # noqa: E402
from moco_tf.data.inputs.image import CIFAR10, IMAGENET  # noqa: E402
from moco_tf.encoders import resnet, vit  # noqa: E402
from moco_tf.pytorch import checkpoint_files, detectron2, tensor_names  # noqa: E402
from moco_tf.torch_weights import main  # noqa: E402

# As DetectionCheckpointer._load_file reads a .pkl, with nothing but NumPy; prints what it finds.
READER = """
import pickle, sys
with open(sys.argv[1], "rb") as file:
    contents = pickle.load(file, encoding="latin1")
assert "moco_tf" not in sys.modules
import json, numpy
model = contents.pop("model")
assert all(type(value) is numpy.ndarray and value.flags.writeable for value in model.values())
rows = {name: [value.dtype.str, value.shape, value.tobytes().hex()] for name, value in model.items()}
print(json.dumps([contents, rows]))
"""


def run(*arguments):
    return main([str(argument) for argument in arguments])


def read(path):
    """(What stands beside the model, {name: array}) of a .pkl, by a process that knows nothing of this package."""
    process = subprocess.run([sys.executable, "-I", "-c", READER, path], check=True, capture_output=True, text=True)
    beside, rows = json.loads(process.stdout)
    return beside, {
        name: np.frombuffer(bytes.fromhex(data), kind).reshape(shape) for name, (kind, shape, data) in rows.items()
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The converter's checkpoint as a run and as an encoder, and the .pkl of the run."""
    folder = tmp_path_factory.mktemp("detectron2")
    checkpoint_files.write(folder / "in.safetensors", checkpoint())
    flags = ["--image_size=32", "--batch_size=8", "--bn_groups=1", "--augment=cifar"]
    assert run(f"--checkpoint={folder / 'in.safetensors'}", f"--output={folder / 'run'}", *flags) == 0
    assert run(f"--checkpoint={folder / 'in.safetensors'}", f"--output={folder / 'enc'}", "--part=encoder") == 0
    assert run(f"--encoder={folder / 'run'}", f"--output={folder / 'run.pkl'}", "--to=detectron2") == 0
    return folder


def test_names_shapes_and_sums_are_those_of_the_authors_converter(folder):
    golden = json.loads(NAMES.read_text())
    beside, model = read(folder / "run.pkl")
    assert beside == golden["beside"]
    expected = {name: row for name, row in golden["model"].items() if not name.startswith("stem.fc.")}  # their head
    assert len(golden["model"]) - len(expected) == 4
    found = summary(model)
    assert found.keys() == expected.keys()
    for name, (kind, shape, *sums) in expected.items():
        assert found[name][:2] == [kind, shape], name
        np.testing.assert_allclose(found[name][2:], sums, rtol=1e-12, atol=1e-9, err_msg=name)


def test_an_encoder_gives_what_its_run_gives_in_both_formats(folder):
    assert run(f"--encoder={folder / 'enc'}", f"--output={folder / 'enc.safetensors'}", "--to=detectron2") == 0
    _, of_run = read(folder / "run.pkl")
    of_encoder = checkpoint_files.read(folder / "enc.safetensors")
    assert of_encoder.keys() == of_run.keys()
    for name, value in of_run.items():
        assert (value.dtype, value.tobytes()) == (of_encoder[name].dtype, of_encoder[name].tobytes()), name


def test_the_pickle_names_numpys_array_and_nothing_else(folder):
    operations = [(op.name, argument) for op, argument, _ in pickletools.genops((folder / "run.pkl").read_bytes())]
    named = [place for place, (name, _) in enumerate(operations) if name in ("GLOBAL", "INST", "STACK_GLOBAL")]
    strings = [argument for name, argument in operations[: named[0]] if name == "SHORT_BINUNICODE"]
    assert len(named) == 1 and strings[-2:] == ["numpy", "ndarray"]
    others = ("OBJ", "NEWOBJ", "NEWOBJ_EX", "BUILD", "EXT1", "EXT2", "EXT4", "PERSID", "BINPERSID")
    assert not {name for name, _ in operations}.intersection(others)


# Every ResNet that Detectron2 can build.


def detectron2s(settings):
    """{name: shape} of the ResNet that Detectron2 builds, by the rules of its `build_resnet_backbone`."""
    depth, groups, width, stem, out = (
        settings[f"MODEL.RESNETS.{key}"]
        for key in ("DEPTH", "NUM_GROUPS", "WIDTH_PER_GROUP", "STEM_OUT_CHANNELS", "RES2_OUT_CHANNELS")
    )
    blocks = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3)}[depth]
    assert depth > 34 or (out == 64 and groups == 1)
    shapes, channels, inner = convolution("stem.conv1", stem, 3, 7), stem, groups * width
    for stage, count in enumerate(blocks):
        for block in range(count):
            name = f"res{stage + 2}.{block}"
            if channels != out:
                shapes |= convolution(f"{name}.shortcut", out, channels, 1)
            if depth <= 34:
                shapes |= convolution(f"{name}.conv1", out, channels, 3) | convolution(f"{name}.conv2", out, out, 3)
            else:
                shapes |= convolution(f"{name}.conv1", inner, channels, 1)
                shapes |= convolution(f"{name}.conv2", inner, inner // groups, 3)
                shapes |= convolution(f"{name}.conv3", out, inner, 1)
            channels = out
        out, inner = 2 * out, 2 * inner
    return shapes


def convolution(name, out, channels, side):
    shapes = {f"{name}.weight": (out, channels, side, side), f"{name}.norm.num_batches_tracked": ()}
    return shapes | {f"{name}.norm.{kind}": (out,) for kind in ("weight", "bias", "running_mean", "running_var")}


def torchvisions(arch, **settings):
    """The tensors of a fresh ResNet under torchvision's names."""
    return tensor_names.state_dict(getattr(resnet, arch)(**settings))


@pytest.mark.parametrize(
    "arch, width, expected",
    [
        ("resnet18", 64, (18, 1, 64, 64, 64)),
        ("resnet34", 64, (34, 1, 64, 64, 64)),
        ("resnet50", 64, (50, 1, 64, 64, 256)),  # Detectron2's defaults
        ("resnet50", 12, (50, 1, 12, 12, 48)),
        ("resnet101", 4, (101, 1, 4, 4, 16)),
        ("resnet152", 4, (152, 1, 4, 4, 16)),
        ("resnext50", 32, (50, 32, 2, 32, 128)),
        ("wide_resnet50", 4, (50, 1, 8, 4, 16)),
        ("wide_resnet101", 4, (101, 1, 8, 4, 16)),
    ],
)
def test_the_settings_build_a_network_of_exactly_these_names_and_shapes(arch, width, expected):
    tensors = torchvisions(arch, width=width)
    settings = detectron2.settings(tensors, IMAGENET)
    assert tuple(settings.values())[:5] == expected
    assert {name: value.shape for name, value in detectron2.state_dict(tensors).items()} == detectron2s(settings)


def test_every_architecture_of_a_depth_of_detectron2s_is_known():
    blocks = {row[:2] for row, name in tensor_names.RESNETS.items() if name in detectron2.DEPTHS}
    assert {name for row, name in tensor_names.RESNETS.items() if row[:2] in blocks} == detectron2.DEPTHS.keys()


def test_detectron2_gets_the_mean_and_deviation_of_the_runs_own_images():
    settings = detectron2.settings(torchvisions("resnet50", width=4), CIFAR10)
    assert settings["MODEL.PIXEL_MEAN"] == "[125.307,122.961,113.8575]"
    assert settings["MODEL.PIXEL_STD"] == "[51.5865,50.847,51.255]"


def assert_words_of(text, settings):
    words = shlex.split(text)
    assert dict(zip(words[::2], words[1::2], strict=True)) == {key: str(value) for key, value in settings.items()}


def test_the_documented_settings_are_those_of_a_resnet50():
    text = (HERE.parent / "docs/torch_weights.md").read_text()
    (block,) = re.findall(r"```\n(MODEL\..*?)```", text, re.DOTALL)
    assert_words_of(block, detectron2.settings(torchvisions("resnet50"), IMAGENET))


def test_the_settings_are_printed_as_words_of_a_command_line(folder, capsys):
    assert run(f"--encoder={folder / 'run'}", f"--output={folder / 'again.pkl'}", "--to=detectron2") == 0
    *_, last = capsys.readouterr().out.splitlines()
    assert_words_of(last.partition(": ")[2], detectron2.settings(torchvisions("resnet50", width=8), CIFAR10))


def test_a_classifier_stays_behind_and_other_floats_become_float32():
    tensors = torchvisions("resnet50", width=2) | {"fc.weight": np.ones((3, 64), "float32"), "fc.bias": np.ones(3)}
    double = {name: value.astype("float64") if value.ndim else value for name, value in tensors.items()}
    found = detectron2.state_dict(double)
    assert not any("fc" in name for name in found)
    assert {value.dtype for value in found.values()} == {np.dtype("float32"), np.dtype("int64")}


# What Detectron2 cannot hold.

SMALL = {"image_size": 32, "width": 2}


def colorize():
    """The backbone of a run, which sees luminance."""
    return build.backbone(make(pretext="colorize", arch="resnet50", **SMALL))


@pytest.mark.parametrize(
    "backbone, rule",
    [
        (lambda: vit.vit_tiny(image_size=8, patch_size=4), "names are those of ResNets; this is vit_tiny"),
        (lambda: resnet.resnet10(**SMALL), "DEPTH is one of 18, 34, 50, 101, 152; this is resnet10, width 2"),
        (lambda: resnet.resnet26(**SMALL), "DEPTH is one of 18, 34, 50, 101, 152; this is resnet26, width 2"),
        (lambda: resnet.resnet50(**SMALL, stem="cifar"), "a 7x7 convolution and a max-pool (--stem=imagenet)"),
        (lambda: resnet.resnet18(**SMALL), "MODEL.RESNETS.RES2_OUT_CHANNELS is 64 for depths 18 and 34"),
        (colorize, "3 channels, and conv1 takes 1; this is resnet50, width 2"),
    ],
)
def test_what_detectron2_cannot_build_is_refused(backbone, rule):
    with pytest.raises(tensor_names.Mismatch, match=re.escape(rule)):
        detectron2.settings(tensor_names.state_dict(backbone()), IMAGENET)


def test_a_refusal_is_one_line_and_nothing_is_written(tmp_path, capsys):
    resnet.resnet10(**SMALL).save(tmp_path / "e.keras")
    assert run(f"--encoder={tmp_path / 'e.keras'}", f"--output={tmp_path / 'e.pkl'}", "--to=detectron2") == 1
    error = capsys.readouterr().err
    assert "e.keras: MODEL.RESNETS.DEPTH" in error and "--to=pytorch writes it" in error and error.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["e.keras"]


@pytest.mark.parametrize(
    "arguments, message, status",
    [
        (["--checkpoint=c.pth", "--output=r", "--to=detectron2"], "give that as --encoder", 2),
        (["--encoder=r", "--output=r.pkl", "--to=detectron2", "--part=whole"], "leave out --part=whole", 2),
        (["--encoder=r", "--output=r.pth", "--to=detectron2"], "a file that ends in .pkl or .safetensors", 1),
        (["--encoder=r", "--output=r.pkl"], "a file that ends in .safetensors, .pth or .pt", 1),
        (["--encoder=r", "--output=r.pkl", "--to=tf"], "--to=tf", 2),
    ],
)
def test_a_flag_that_does_not_fit_is_answered_in_one_line(arguments, message, status, capsys):
    assert run(*arguments) == status
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
