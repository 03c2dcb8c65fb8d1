"""Checkpoints under other libraries' names: read as what they are, or refused in one line."""

import functools
import json

import keras
import numpy as np
import pytest

from moco_tf import config as config_lib
from moco_tf.config import make
from moco_tf.pytorch import checkpoint_files, conversion, tensor_names
from moco_tf.torch_weights import main

ONES = np.ones(3, "float32")
STAGES = {"conv1": 0, "bn1": 1, "layer1": 4, "layer2": 5, "layer3": 6, "layer4": 7}  # torchvision's children
DEMO = {"conv1": 0, "bn1": 1, "layer1": 3, "layer2": 4, "layer3": 5, "layer4": 6, "fc": 9}
LIGHTLY = {"conv1": 0, "bn1": 1, "layer1": 2, "layer2": 3, "layer3": 4, "layer4": 5}


def run(*arguments):
    return main([str(argument) for argument in arguments])


def network(head="", stem="imagenet", seed=0, arch="resnet10", features=32):
    """A ResNet of width 4 under torchvision's names, no two tensors alike."""
    rng = np.random.default_rng(seed)
    tensors = {name: rng.normal(0, 0.3, shape) for name, shape in shapes(head, stem, arch, features).items()}
    return {
        name: np.array(3) if name.endswith("tracked") else (abs(v) if name.endswith("var") else v).astype("float32")
        for name, v in tensors.items()
    }


@functools.cache
def shapes(head, stem, arch, features):
    """{name: shape} of such a network."""
    dims = {"mlp": {"dim": 5, "hidden_dim": 32}, "linear": {"dim": 5}, "classifier": {"dim": 7}}.get(head, {})
    model = conversion.encoder(tensor_names.Architecture(arch, 4, stem, features, head, **dims), 32)
    return {name: value.shape for name, value in tensor_names.state_dict(model).items()}


def prefixed(tensors, prefix):
    return {prefix + name: value for name, value in tensors.items()}


def split(tensors, prefix, head):
    """The backbone behind a prefix and `fc` as a head of another name."""
    backbone = prefixed(tensor_names.without_head(tensors), prefix)
    return backbone | {name.replace("fc", head, 1): v for name, v in tensors.items() if name.startswith("fc")}


def numbered(tensors, places):
    """nn.Sequential's numbers in place of names."""
    found = {}
    for name, value in tensors.items():
        child, _, rest = name.partition(".")
        found[f"{places[child]}.{rest}"] = value
    return found


def moco(head="mlp", stem="imagenet", arch="resnet10"):
    """What both encoders, the queue and its pointer hold."""
    rng = np.random.default_rng(9)
    queue = {"queue": rng.normal(size=(5, 24)).astype("float32"), "queue_ptr": np.array([8])}
    return network(head, stem, 1, arch), network(head, stem, 2, arch), queue


def authors(head="mlp", stem="imagenet", arch="resnet10"):
    query, key, queue = moco(head, stem, arch)
    return prefixed(query, "encoder_q.") | prefixed(key, "encoder_k.") | queue


def of_mm():
    query, key, queue = moco()
    key = split(key, "encoder_k.module.0.", "encoder_k.module.1.mlp")
    preprocessor = {"data_preprocessor.mean": ONES, "data_preprocessor.std": ONES}
    return split(query, "backbone.", "neck.mlp") | key | queue | {"encoder_k.steps": np.array(40)} | preprocessor


def of_old_mm():
    query, key, queue = moco("mlp")
    tensors = split(query, "encoder_q.0.", "encoder_q.1.mlp") | split(key, "encoder_k.0.", "encoder_k.1.mlp")
    return tensors | split(query, "backbone.", "neck.mlp") | queue


def of_openselfsup():
    query, key, queue = moco("linear")
    tensors = split(query, "encoder_q.0.", "encoder_q.1.fc") | split(key, "encoder_k.0.", "encoder_k.1.fc")
    return tensors | prefixed(tensor_names.without_head(query), "backbone.") | queue


def of_the_demo():
    query, key, queue = (
        part if "queue" in part else numbered(part, DEMO) for part in moco("linear", "cifar", "resnet18")
    )
    return prefixed(query, "encoder_q.net.") | prefixed(key, "encoder_k.net.") | queue


def of_solo_learn(encoder="backbone", stem="imagenet"):
    tensors = split(network("mlp", stem), f"{encoder}.", "projector")
    tensors |= split(network("mlp", stem, 5), f"momentum_{encoder}.", "momentum_projector")
    queue = {"queue": np.ones((2, 5, 24), "float32"), "queue_ptr": np.array([8])}
    return tensors | {"classifier.weight": np.ones((7, 32), "float32"), "classifier.bias": np.ones(7)} | queue


def of_lightly():
    found = {}
    for seed, head in ((0, "projection_head.layers"), (5, "projection_head_momentum.layers")):
        tensors = network("mlp", seed=seed)
        found |= {name.replace("fc", head, 1): value for name, value in tensors.items() if name.startswith("fc")}
    query, key = (tensor_names.without_head(network("mlp", seed=seed)) for seed in (0, 5))
    found |= prefixed(numbered(query, STAGES), "backbone.") | prefixed(numbered(key, STAGES), "backbone_momentum.")
    return found | {"criterion.bank": ONES}


def of_lightlys_own_resnet():
    tensors = numbered(network(stem="cifar"), LIGHTLY)
    tensors = {name.replace("downsample", "shortcut"): value for name, value in tensors.items()}
    return prefixed(tensors, "backbone.") | {"projection_head.layers.0.weight": ONES}


@pytest.fixture
def written(tmp_path):
    def write(tensors, name="in.safetensors"):
        checkpoint_files.write(tmp_path / name, tensors)
        return tmp_path / name

    return write


@pytest.fixture
def outputs(written, tmp_path):
    """Brings a state dict in as an encoder and gives what it computes, by name."""

    def convert(tensors, name, *flags):
        path, output = written(tensors, f"{name}.safetensors"), tmp_path / name
        assert run(f"--checkpoint={path}", f"--output={output}", "--image_size=32", *flags) == 0
        image = np.random.default_rng(3).normal(size=(2, 32, 32, 3)).astype("float32")
        return keras.models.load_model(output / "encoder.keras")(image)

    return convert


# Read as an encoder.

PROJECTS = {
    "solo-learn": of_solo_learn,
    "solo-learn 1.0": lambda: of_solo_learn("encoder"),
    "lightly": of_lightly,
    "lightly in model.": lambda: prefixed(of_lightly(), "model."),
    "mmselfsup's SimCLR": lambda: split(network("mlp"), "backbone.", "neck.mlp"),
}
CLASSIFIES = {
    "mmpretrain": lambda: split(network("classifier"), "backbone.", "head.fc"),
    "mmselfsup 0.x": lambda: split(network("classifier"), "backbone.", "head.fc_cls"),
    "solo-learn's linear probe": lambda: split(network("classifier"), "backbone.", "classifier"),
    "BYOL's head before the classifier": lambda: (
        split(network("classifier"), "backbone.", "classifier") | {"projector.1.running_mean": ONES}
    ),
    "a backbone with its own fc": lambda: (
        prefixed(network("classifier"), "backbone.")
        | {f"projection_head.layers.{name}": ONES for name in tensor_names.MLP}
    ),
    "net.": lambda: prefixed(network("classifier"), "net."),
    "module.model.": lambda: prefixed(network("classifier"), "module.model."),
    "_orig_mod.": lambda: prefixed(network("classifier"), "_orig_mod."),
}
FEATURES = {
    "backbone.": lambda: prefixed(network(), "backbone."),
    "encoder.": lambda: prefixed(network(), "encoder."),
    "resnet.": lambda: prefixed(network(), "resnet."),
    "torchvision's children": lambda: numbered(network(), STAGES),
    "mmselfsup with another neck": lambda: prefixed(network(), "backbone.") | {"neck.fc0.weight": ONES},
    "DenseCL": lambda: of_mm() | {"neck.mlp2.0.weight": ONES, "queue2": ONES},
}


def plain(name):
    """The tensors of one of these files under torchvision's names."""
    if name in PROJECTS:
        return prefixed(network("mlp"), "encoder_q.")
    if name in CLASSIFIES:
        return network("classifier")
    return tensor_names.without_head(moco()[0] if name == "DenseCL" else network())


@pytest.mark.parametrize("name", [*PROJECTS, *CLASSIFIES, *FEATURES])
def test_a_librarys_file_has_its_tensors_under_torchvisions_names(name):
    found = tensor_names.contents((PROJECTS | CLASSIFIES | FEATURES)[name]()).query
    expected = tensor_names.contents(plain(name)).query
    assert found.keys() == expected.keys()
    for key in expected:
        np.testing.assert_array_equal(found[key], expected[key])


def some_every_day(names, *often):
    """All have the same tensors: what these compute stands for the others."""
    return [name if name in often else pytest.param(name, marks=pytest.mark.slow) for name in names]


@pytest.mark.parametrize("name", some_every_day([*PROJECTS, *CLASSIFIES], "lightly", "mmpretrain"))
def test_a_librarys_file_computes_what_its_tensors_do_under_torchvisions_names(name, outputs):
    tensors = (PROJECTS | CLASSIFIES)[name]()
    found, expected = outputs(tensors, "found"), outputs(plain(name), "plain", "--part=encoder")
    assert found.keys() == expected.keys() and len(found) == 2
    for key in expected:
        np.testing.assert_array_equal(found[key], expected[key])


@pytest.mark.parametrize("name", some_every_day(FEATURES, "torchvision's children", "DenseCL"))
def test_a_backbone_is_read_where_its_head_is_none_of_ours_or_missing(name, outputs):
    found, expected = outputs(FEATURES[name](), "found"), outputs(plain(name), "plain")
    assert found.keys() == expected.keys() == {"features"}
    np.testing.assert_array_equal(found["features"], expected["features"])


@pytest.mark.parametrize(
    "make", [of_lightlys_own_resnet, lambda: prefixed(numbered(network(stem="cifar"), DEMO), "net.")]
)
def test_a_numbered_resnet_without_a_pool_is_one_of_the_3x3_stem(make, outputs):
    found, expected = outputs(make(), "found"), outputs(network(stem="cifar"), "plain")
    np.testing.assert_array_equal(found["features"], expected["features"])


def test_the_3x3_stem_of_solo_learn_pads_by_2_and_a_flag_says_so_of_other_files(outputs, tmp_path, capsys):
    solo = outputs(of_solo_learn(stem="cifar"), "solo")["features"]
    assert "cifar stem padded by 2" in capsys.readouterr().out
    backbone = tensor_names.without_head(network("mlp", "cifar"))
    plain = outputs(backbone, "plain")["features"]
    flagged = outputs(backbone, "flagged", "--stem_padding=2")["features"]
    unpadded = outputs(of_solo_learn(stem="cifar"), "unpadded", "--stem_padding=1")["features"]
    np.testing.assert_array_equal(solo, flagged)
    np.testing.assert_array_equal(plain, unpadded)
    assert np.abs(solo - plain).max() > 1e-3
    assert run(f"--encoder={tmp_path / 'solo'}", f"--output={tmp_path / 'back.safetensors'}") == 0
    assert "Its 3x3 stem pads by 2" in capsys.readouterr().out
    found = checkpoint_files.read(tmp_path / "back.safetensors")
    assert found.keys() == backbone.keys()
    for name, value in backbone.items():
        np.testing.assert_array_equal(found[name], value, strict=True)
    model = conversion.encoder(tensor_names.Architecture("resnet10", 4, "cifar", 32, "", stem_padding=2), 32)
    assert model.get_layer(index=2).get_layer("conv1").output.shape[1:3] == (34, 34)  # 32 + 2 x 2 - 3 + 1


def test_what_is_left_out_is_named_in_one_line(written, tmp_path, capsys):
    assert run(f"--checkpoint={written(of_solo_learn())}", f"--output={tmp_path / 'out'}", "--verbose") == 0
    output = capsys.readouterr().out
    (line,) = [line for line in output.splitlines() if line.startswith("Left out: ")]
    for part in (
        "classifier.* (2 tensors), momentum_backbone.* (",
        "), momentum_projector.* (4 tensors), queue, queue_ptr.",
    ):
        assert part in line
    assert " projector" not in line
    for name in of_solo_learn():
        if not name.endswith("num_batches_tracked") or name.startswith("momentum"):
            names = {name, name.removeprefix("backbone."), name.replace("projector", "fc", 1)}
            assert any(f"{each} " in output for each in names), name
    assert (
        run(f"--checkpoint={written(authors(), 'a.safetensors')}", f"--output={tmp_path / 'a'}", "--part=encoder") == 0
    )
    assert "Left out: encoder_k.* (" in capsys.readouterr().out


ALL = {**PROJECTS, **CLASSIFIES, **FEATURES, "mmpretrain's MoCo": of_mm, "the demo": of_the_demo}


@pytest.mark.parametrize("name", ALL)
def test_each_tensor_is_used_or_named_a_stray_beside_any_of_them_too(name):
    tensors = ALL[name]()
    heads = {name.rpartition(".")[0] for name in tensors}
    for more in [{}, *({f"{head}.stray".removeprefix("."): ONES} for head in heads)]:
        try:
            found = tensor_names.contents(tensors | more)
        except tensor_names.Mismatch as error:
            assert more
            assert next(iter(more)).rpartition("model.")[2] in str(error) or "is not a head" in str(error)
            continue
        parts = (found.query, found.key, found.rest, found.left_out)
        assert sum(map(len, parts)) == len(tensors | more), more


# Read as a run.

SMALL = ["--image_size=32", "--augment=cifar", "--batch_size=8", "--bn_groups=4", "--knn_every=0"]
RUNS = {
    "mmpretrain": (of_mm, authors),
    "mmselfsup 0.x": (of_old_mm, authors),
    "OpenSelfSup's MoCo v1": (of_openselfsup, lambda: authors("linear")),
    "the demo": (of_the_demo, lambda: authors("linear", "cifar", "resnet18")),
}


@pytest.mark.parametrize("name", RUNS)
def test_a_whole_run_comes_out_under_the_authors_names_bit_for_bit(name, written, tmp_path):
    make, expected = RUNS[name]
    assert run(f"--checkpoint={written(make())}", f"--output={tmp_path / 'run'}", *SMALL) == 0
    assert run(f"--encoder={tmp_path / 'run'}", f"--output={tmp_path / 'out.safetensors'}", "--part=whole") == 0
    found, expected = checkpoint_files.read(tmp_path / "out.safetensors"), prefixed(expected(), "module.")
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        np.testing.assert_array_equal(found[key], value, strict=True)


def test_the_demos_run_has_the_demos_settings(written, tmp_path):
    paper = config_lib.read("configs/cifar10_v2.flags")
    found = tensor_names.Architecture("resnet18", 64, "cifar", 512, "linear", 128)
    config = conversion.run_config(found, 4096, vars(make()), set(), tensor_names.DEMO)
    assert [d for d in config.differences(paper) if d != "knn_every"] == []
    path = written(of_the_demo())
    assert run(f"--checkpoint={path}", f"--output={tmp_path / 'run'}", "--queue_size=24", "--batch_size=16") == 0
    written_config = config_lib.read(tmp_path / "run/config.flags")
    assert (written_config.temperature, written_config.batch_size, written_config.width) == (0.1, 16, 4)
    assert json.loads((tmp_path / "run/torch.json").read_text())["architecture"]["arch"] == "resnet18"


# Refused.


def without(tensors, name):
    return {key: value for key, value in tensors.items() if key != name}


SPLIT = of_lightlys_own_resnet() | {"backbone.1.running_mean": np.ones(32, "float32")}
DIFFER = of_old_mm() | {"backbone.bn1.weight": np.zeros(4, "float32")}
MM_VIT = {"backbone.cls_token": ONES, "backbone.patch_embed.projection.weight": ONES}


@pytest.mark.parametrize(
    "tensors, messages",
    [
        (
            of_mm() | {"encoder_k.module.1.more": ONES},
            ["encoder_k.module.1.* is not a head as neck.* is", "--part=encoder"],
        ),
        (
            of_mm() | {"projector.0.weight": ONES},
            ["left over: projector.0.weight (3,)", "of mmselfsup or mmpretrain;"],
        ),
        (of_solo_learn() | {"neck.0.weight": ONES}, ["left over: neck.0.weight (3,)", "a checkpoint of solo-learn;"]),
        (of_lightly() | {"stray": ONES}, ["left over: stray (3,)", "a checkpoint of lightly;", "backbone.* alone"]),
        (prefixed(network(), "encoder.") | {"stray": ONES}, ["stray (3,), beside encoder.*", "encoder.* alone"]),
        (of_lightly() | {"backbone.9.weight": ONES}, ["left over: backbone.9.weight (3,)"]),
        (of_the_demo() | {"encoder_q.stray": ONES}, ["left over: encoder_q.stray (3,)", "encoder_q.net.*"]),
        (of_the_demo() | {"encoder_q.net.8.weight": ONES}, ["left over: encoder_q.net.8.weight (3,)"]),
        (without(of_the_demo(), "encoder_k.net.1.bias"), ["MoCo's CIFAR-10 demo", "missing: encoder_k.bn1.bias"]),
        (without(of_mm(), "encoder_k.module.0.bn1.bias"), ["mmpretrain (backbone.*)", "missing: encoder_k.bn1.bias"]),
        (without(of_the_demo(), "encoder_k.net.0.weight"), ["demo", "missing: encoder_k.conv1.weight"]),
        (without(of_mm(), "queue"), ["mmpretrain", "missing: queue; --part=encoder takes"]),
        (without(of_solo_learn(), "backbone.bn1.bias"), ["solo-learn (backbone.*)", "missing: bn1.bias"]),
        (DIFFER, ["backbone.bn1.weight and encoder_q.0.bn1.weight are one", "differ"]),
        (SPLIT, ["backbone.1.running_mean has shape (32,)", "SplitBatchNorm", "average"]),
        (MM_VIT, ["backbone.patch_embed.projection.weight", "Vision Transformers", "only ResNets"]),
        (prefixed(numbered(network(), DEMO), "net."), ["net.0.weight has shape (4, 3, 7, 7)", "3x3 kernel"]),
        ({"0.weight": ONES, "8.0.conv1.weight": ONES}, ["8.0.conv1.weight is the first block"]),
        (
            {"backbone.stem.0.weight": ONES},
            ["no encoder that is known here", "backbone.stem.0.weight", "timm's names"],
        ),
    ],
)
def test_what_is_of_no_scheme_or_of_two_is_refused_by_name_in_one_line(tensors, messages, written, tmp_path, capsys):
    path = written(tensors)
    assert run(f"--checkpoint={path}", f"--output={tmp_path / 'out'}", *SMALL) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    for message in messages:
        assert message in error
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize(
    "make, origin",
    [
        (of_solo_learn, "solo-learn (backbone.*)"),
        (of_lightly, "lightly (backbone.*)"),
        (FEATURES["DenseCL"], "mmselfsup or mmpretrain (backbone.*)"),
        (FEATURES["encoder."], "(encoder.*)"),
    ],
)
def test_a_run_asked_for_of_a_file_without_one_ends_with_the_way_out(make, origin, written, tmp_path, capsys):
    assert run(f"--checkpoint={written(make())}", f"--output={tmp_path / 'out'}", "--part=whole") == 1
    error = capsys.readouterr().err
    assert origin in error and "--part=encoder takes it" in error and error.count("\n") == 1


@pytest.mark.parametrize("flags", [["--stem_padding=2"], ["--stem_padding=3", "--part=encoder"]])
def test_a_padding_that_is_none_of_the_stems_is_refused(flags, written, tmp_path, capsys):
    path = written(of_the_demo())
    assert run(f"--checkpoint={path}", f"--output={tmp_path / 'out'}", *flags) == 2
    assert f"{flags[0]} is 1 or 2, for a 3x3 stem" in capsys.readouterr().err
