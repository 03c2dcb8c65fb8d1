"""The authors' checkpoints go in, torchvision's names come out."""

import functools
import json
import sys
from pathlib import Path

import keras
import numpy as np
import pytest

from moco_tf import config as config_lib
from moco_tf.config import make
from moco_tf.pytorch import checkpoint_files, conversion, tensor_names
from moco_tf.torch_weights import main
from moco_tf.train import main as train

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))
import named_weights  # noqa: E402

FILES = HERE / "torch_files"
ANSWERS = json.loads((FILES / "features.json").read_text())["networks"]
V1, V2 = FILES / "v1_legacy.pth.tar", FILES / "v2_zip.pth.tar"
SEED = 4
SMALL = ["--image_size=32", "--augment=cifar", "--batch_size=40", "--bn_groups=4", "--knn_every=0"]


def run(*arguments):
    return main([str(argument) for argument in arguments])


def assert_same_tensors(a, b):
    assert a.keys() == b.keys()
    for name in a:
        same = (a[name].dtype, a[name].shape, a[name].tobytes()) == (b[name].dtype, b[name].shape, b[name].tobytes())
        assert same, name


def plain(prefix=None):
    """The query encoder of the v2 fixture without its head, under torchvision's names."""
    query = tensor_names.contents(checkpoint_files.read(V2)).query
    return {f"{prefix or ''}{name}": value for name, value in tensor_names.without_head(query).items()}


def with_head():
    """The query encoder of the v2 fixture with its head, saved alone."""
    return tensor_names.contents(checkpoint_files.read(V2)).query


def classifier():
    rng = np.random.default_rng(0)
    fc = {"fc.weight": rng.normal(size=(10, 8)).astype("float32"), "fc.bias": rng.normal(size=10).astype("float32")}
    return plain() | fc


def batch_norm(name, width, affine=True):
    rng = np.random.default_rng(width)
    kinds = ["running_mean", "running_var"] + ["weight", "bias"] * affine
    tensors = {f"{name}.{kind}": rng.uniform(0.5, 1.5, width).astype("float32") for kind in kinds}
    return tensors | {f"{name}.num_batches_tracked": np.array(40)}


def linear(name, inputs, outputs, bias=False):
    rng = np.random.default_rng(inputs + outputs)
    tensors = {f"{name}.weight": rng.normal(size=(outputs, inputs)).astype("float32")}
    return tensors | ({f"{name}.bias": rng.normal(size=outputs).astype("float32")} if bias else {})


def v3():
    """A MoCo v3 checkpoint around the same backbone, under the authors' names."""
    projector = linear("fc.0", 8, 6) | batch_norm("fc.1", 6) | linear("fc.3", 6, 4) | batch_norm("fc.4", 4, False)
    predictor = linear("predictor.0", 4, 6) | batch_norm("predictor.1", 6) | linear("predictor.3", 6, 4)
    return official_v3(plain() | projector, predictor)


@functools.cache
def vit_backbone():
    """A ViT of timm's names and vit_tiny's shapes, for images of 8 pixels in patches of 4."""
    rng = np.random.default_rng(0)
    shapes = {"cls_token": (1, 1, 192), "pos_embed": (1, 5, 192), "patch_embed.proj.weight": (192, 3, 4, 4)}
    shapes |= {"patch_embed.proj.bias": (192,), "norm.weight": (192,), "norm.bias": (192,)}
    tensors = {name: rng.normal(size=shape).astype("float32") for name, shape in shapes.items()}
    for block in (f"blocks.{i}" for i in range(12)):
        for name, inputs, outputs in (
            ("attn.qkv", 192, 576),
            ("attn.proj", 192, 192),
            ("mlp.fc1", 192, 768),
            ("mlp.fc2", 768, 192),
        ):
            tensors |= linear(f"{block}.{name}", inputs, outputs, bias=True)
        for norm in ("norm1", "norm2"):
            tensors |= {f"{block}.{norm}.{kind}": np.ones(192, "float32") for kind in ("weight", "bias")}
    return tensors


def v3_vit():
    head = linear("head.0", 192, 6) | batch_norm("head.1", 6) | linear("head.3", 6, 6) | batch_norm("head.4", 6)
    head |= linear("head.6", 6, 4) | batch_norm("head.7", 4, False)
    predictor = linear("predictor.0", 4, 6) | batch_norm("predictor.1", 6)
    predictor |= linear("predictor.3", 6, 4) | batch_norm("predictor.4", 4, False)
    return official_v3(vit_backbone() | head, predictor)


def official_v3(encoder, predictor):
    key = {name: value + 1 for name, value in encoder.items()}
    parts = (("base_encoder.", encoder), ("momentum_encoder.", key), ("", predictor))
    return {f"module.{prefix}{name}": value for prefix, part in parts for name, value in part.items()}


@pytest.fixture
def written(tmp_path):
    """Writes a state dict to a file and gives its path."""

    def write(tensors, name="in.safetensors"):
        checkpoint_files.write(tmp_path / name, tensors)
        return tmp_path / name

    return write


# The same function.

EVERY_DAY = ("resnet18", "resnext50", "vit_small")


@pytest.mark.parametrize(
    "name", [name if name in EVERY_DAY else pytest.param(name, marks=pytest.mark.slow) for name in ANSWERS]
)
def test_a_converted_network_computes_what_torchvisions_does_in_float64(name):
    keras.config.set_floatx("float64")
    keras.config.set_dtype_policy("float64")
    if name.startswith("vit"):
        width, sizes = {"vit_small": 384, "vit_base": 768}[name], {"patch_size": 16, "image_size": 64}
        found = tensor_names.Architecture(name, 0, "", width, "", **sizes)
    else:
        width = 512 if name in ("resnet18", "resnet34") else 2048
        found = tensor_names.Architecture(name, 64, "imagenet", width, "")
    model = conversion.encoder(found, named_weights.IMAGE_SIZE)
    state = {
        key: named_weights.filled(SEED, key, tensor_names.to_torch(variable.numpy()).shape)
        for key, variable in tensor_names.names(model)
    }
    assert tensor_names.recognise(state) == found
    conversion.load_encoder(model, state)
    images = named_weights.images(SEED).transpose(0, 2, 3, 1)
    answer = ANSWERS[name]
    values = {
        "evaluation": (model(images)["features"], answer["evaluation"]),
        "training": (model(images, training=True)["features"], answer["training"]),
    }
    after = tensor_names.state_dict(model)
    assert len(answer["statistics"]) >= 10 or found.is_vit
    values |= {key: (after[key], expected) for key, expected in answer["statistics"].items()}
    for key, (value, expected) in values.items():
        excerpt = named_weights.excerpt(value)
        deviation = np.abs(np.array(excerpt["every"]) - expected["every"]).max()
        assert deviation <= 1e-8 * expected["largest"], key
        assert abs(excerpt["largest"] - expected["largest"]) <= 1e-8 * expected["largest"], key


# In and out again.


@pytest.mark.parametrize("contents", [V1, V2, lambda: checkpoint_files.read(V1), v3, v3_vit])
def test_a_whole_checkpoint_comes_out_again_bit_for_bit(contents, written, tmp_path):
    file = written(contents()) if callable(contents) else contents
    tensors = checkpoint_files.read(file)
    settings = SMALL[1:] if contents is v3_vit else SMALL
    assert run(f"--checkpoint={file}", f"--output={tmp_path / 'run'}", *settings) == 0
    assert run(f"--encoder={tmp_path / 'run'}", f"--output={tmp_path / 'out.safetensors'}", "--part=whole") == 0
    assert_same_tensors(checkpoint_files.read(tmp_path / "out.safetensors"), tensors)


def vit_classifier():
    return vit_backbone() | linear("head", 192, 10, bias=True)


@pytest.mark.parametrize(
    "make, expected",
    [
        (plain, plain),
        (classifier, classifier),
        (lambda: plain("module."), plain),
        (with_head, plain),
        (v3, plain),
        (vit_backbone, vit_backbone),
        (vit_classifier, vit_classifier),
    ],
)
def test_an_encoder_comes_out_again_bit_for_bit_under_its_own_names(make, expected, written, tmp_path):
    output = [f"--output={tmp_path / 'encoder'}", "--part=encoder"]
    assert run(f"--checkpoint={written(make())}", *output) == 0
    assert run(f"--encoder={tmp_path / 'encoder'}", f"--output={tmp_path / 'out.safetensors'}") == 0
    found = checkpoint_files.read(tmp_path / "out.safetensors")
    assert_same_tensors(found, expected())


def test_a_query_encoder_with_its_head_comes_out_again(tmp_path):
    assert run(f"--checkpoint={V2}", f"--output={tmp_path / 'encoder'}", "--part=encoder") == 0
    model = keras.models.load_model(tmp_path / "encoder/encoder.keras")
    assert {name: value.shape for name, value in model.output.items()} == {
        "features": (None, 8),
        "projection": (None, 8),
    }
    assert run(f"--encoder={tmp_path / 'encoder'}", f"--output={tmp_path / 'w.safetensors'}", "--part=whole") == 0
    query = {name: value for name, value in checkpoint_files.read(V2).items() if "encoder_q" in name}
    assert_same_tensors(checkpoint_files.read(tmp_path / "w.safetensors"), query)
    assert run(f"--encoder={tmp_path / 'encoder'}", f"--output={tmp_path / 'e.safetensors'}") == 0
    assert_same_tensors(checkpoint_files.read(tmp_path / "e.safetensors"), plain())


def test_half_precision_comes_in_exactly_and_float64_says_that_it_is_rounded(written, tmp_path, capsys):
    half = {name: value.astype("float16") if value.dtype == np.float32 else value for name, value in plain().items()}
    assert run(f"--checkpoint={written(half)}", f"--output={tmp_path / 'h'}") == 0
    assert run(f"--encoder={tmp_path / 'h'}", f"--output={tmp_path / 'h.safetensors'}") == 0
    for name, value in checkpoint_files.read(tmp_path / "h.safetensors").items():
        np.testing.assert_array_equal(value, half[name])
    double = {"fc.weight": np.ones((3, 8)), "fc.bias": np.zeros(3)} | plain()
    assert run(f"--checkpoint={written(double, 'd.safetensors')}", f"--output={tmp_path / 'd'}", "--verbose") == 0
    assert "fc.weight (3, 8) float64 -> fc/kernel (8, 3), rounded to float32" in capsys.readouterr().out


# Training goes on.


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """A folder of 60 training images and 4 test images of two classes."""
    folder, rng = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    for split, count in (("train", 30), ("test", 2)):
        for name, shade in (("dark", 40), ("light", 200)):
            (folder / split / name).mkdir(parents=True)
            for i in range(count):
                image = np.clip(rng.normal(shade, 20, (36, 40, 3)), 0, 255).astype("uint8")
                keras.utils.save_img(folder / split / name / f"{i}.png", image, scale=False)
    return folder


@pytest.mark.parametrize("file, augment", [(V1, "v1"), pytest.param(V2, "v2", marks=pytest.mark.slow)])
def test_a_converted_checkpoint_trains_on_for_10_steps_and_exports(file, augment, photos, tmp_path, capsys):
    folder, before = tmp_path / "run", checkpoint_files.read(file)
    settings = [f"--dataset={photos}", "--batch_size=6", "--bn_groups=2", "--image_size=32", "--knn_every=1"]
    assert run(f"--checkpoint={file}", f"--output={folder}", *settings) == 0
    *_, last = capsys.readouterr().out.splitlines()
    command = last.partition("python -m moco_tf.train ")[2].split()
    assert config_lib.parse(command).augment == augment
    assert train([*command, "--max_steps=10"]) == 0
    assert "kNN top-1 before training: as converted" in capsys.readouterr().out
    assert run(f"--encoder={folder}", f"--output={tmp_path / 'out.safetensors'}", "--part=whole") == 0
    after = checkpoint_files.read(tmp_path / "out.safetensors")
    assert after.keys() == before.keys()
    for name, value in after.items():
        if name.endswith("num_batches_tracked"):
            assert value == before[name] + 10
        else:
            assert np.isfinite(value).all() and not np.array_equal(value, before[name]), name
    assert after["module.queue_ptr"] == (5 + 10 * 6) % 32


@pytest.mark.slow
@pytest.mark.parametrize("make", [v3, v3_vit])
def test_a_converted_v3_checkpoint_trains_on_for_10_steps_and_exports(make, written, photos, tmp_path):
    folder, before = tmp_path / "run", make()
    before = {name: np.abs(value) if name.endswith("running_var") else value for name, value in before.items()}
    settings = [f"--dataset={photos}", "--batch_size=6", "--warmup_epochs=1", "--knn_every=0"]
    settings += ["--image_size=32"] if make is v3 else []
    assert run(f"--checkpoint={written(before)}", f"--output={folder}", *settings) == 0
    assert train([f"--flagfile={folder}/config.flags", f"--run_dir={folder}", "--max_steps=10"]) == 0
    assert run(f"--encoder={folder}", f"--output={tmp_path / 'out.safetensors'}", "--part=whole") == 0
    after = checkpoint_files.read(tmp_path / "out.safetensors")
    assert after.keys() == before.keys()
    frozen = ("pos_embed", "patch_embed.proj.weight", "patch_embed.proj.bias")
    for name, value in after.items():
        if name.endswith("num_batches_tracked"):
            assert value == before[name] + 20, name  # each encoder sees both views
        elif not name.endswith(frozen):
            assert np.isfinite(value).all() and not np.array_equal(value, before[name]), name
        elif "base_encoder" in name:
            assert np.array_equal(value, before[name]), name


def test_the_settings_of_a_run_are_the_papers_unless_flags_say_otherwise():
    for name, head in (("v1", "linear"), ("v2", "mlp")):
        paper = config_lib.read(HERE.parent / f"configs/{name}.flags")
        found = tensor_names.Architecture("resnet50", 64, "imagenet", 2048, head, 128, 2048 if head == "mlp" else 0)
        config = conversion.run_config(found, 65536, vars(make()), named=set())
        assert [d for d in config.differences(paper) if d not in ("lr_drops", "knn_every")] == []
        assert head == "mlp" or config.lr_drops == paper.lr_drops
        config = conversion.run_config(found, 65536, vars(make(temperature=0.5, bn_groups=2)), {"temperature"})
        assert (config.temperature, config.bn_groups) == (0.5, 8)
    for name, arch, sizes in (
        ("v3_resnet50", ("resnet50", 64, "imagenet", 2048), {}),
        ("v3_vit_small", ("vit_small", 0, "", 384), {"patch_size": 16, "image_size": 224}),
    ):
        paper = config_lib.read(HERE.parent / f"configs/{name}.flags")
        found = tensor_names.Architecture(*arch, "projector", 256, 4096, **sizes)
        small = tensor_names.Architecture("resnet10", 4, "cifar", 32, "projector", 5, 7)
        assert conversion.run_config(small, None, vars(make()), named=set()).image_size == 32
        config = conversion.run_config(found, None, vars(make()), named=set())
        assert config.differences(paper) == []


# What does not fit.


def test_an_architecture_is_recognised_by_its_names_and_shapes():
    for arch, width, stem, features, head, sizes in (
        ("resnet10", 8, "cifar", 64, "", {}),
        ("resnet10", 4, "imagenet", 32, "classifier", {"dim": 5}),
        ("resnet14", 8, "imagenet", 256, "mlp", {"dim": 5, "hidden_dim": 7}),
        ("resnet26", 2, "cifar", 64, "", {}),
        ("resnet10", 4, "cifar", 32, "projector", {"dim": 5, "hidden_dim": 7}),
        ("vit_tiny", 0, "", 192, "projector", {"dim": 5, "hidden_dim": 7, "patch_size": 4, "image_size": 12}),
        ("vit_tiny", 0, "", 192, "classifier", {"dim": 5, "patch_size": 8, "image_size": 8}),
    ):
        found = tensor_names.Architecture(arch, width, stem, features, head, **sizes)
        assert tensor_names.recognise(tensor_names.state_dict(conversion.encoder(found, 32))) == found


def test_no_two_resnets_look_the_same():
    assert set(tensor_names.RESNETS.values()) == {name for name in config_lib.ARCHITECTURES if "res" in name}


def changed(tensors, **changes):
    """A copy in which tensors are replaced, or taken out (None); double underscores stand for dots."""
    changes = {name.replace("__", "."): value for name, value in changes.items()}
    return {name: value for name, value in (tensors | changes).items() if value is not None}


OFFICIAL = checkpoint_files.read(V1)
ONES = np.ones(3, "float32")


@pytest.mark.parametrize(
    "tensors, message",
    [
        (changed(OFFICIAL, module__encoder_q__bn1__weight=None), "missing: encoder_q.bn1.weight"),
        (changed(OFFICIAL, module__encoder_k__fc__bias=None), "missing: encoder_k.fc.bias"),
        (changed(OFFICIAL, module__queue=None), "missing: queue"),
        (changed(OFFICIAL, module__queue_ptr=None), "missing: queue_ptr"),
        (changed(OFFICIAL, module__encoder_q__bn9__weight=ONES), "left over: encoder_q.bn9.weight"),
        (changed(OFFICIAL, module__encoder_k__more=ONES), "left over: encoder_k.more"),
        (changed(OFFICIAL, module__stray=ONES), "left over: stray (3,)"),
        (changed(OFFICIAL, module__encoder_q__bn1__weight=ONES), "encoder_q.bn1.weight has shape (3,); (1,) was"),
        (changed(OFFICIAL, module__encoder_k__bn1__bias=ONES), "encoder_k.bn1.bias has shape (3,); (1,) was"),
        (changed(OFFICIAL, module__encoder_q__bn1__bias=np.ones(1, int)), "encoder_q.bn1.bias is int64"),
        (changed(OFFICIAL, module__queue=np.ones((9, 32), "float32")), "queue has shape (9, 32); (8, 32) was"),
        (changed(OFFICIAL, module__queue=ONES), "queue has shape (3,)"),
        (changed(OFFICIAL, module__queue_ptr=np.array([32])), "queue_ptr is [32]"),
        (changed(OFFICIAL, module__encoder_q__bn1__num_batches_tracked=ONES), "num_batches_tracked has shape (3,)"),
        (changed(plain(), layer5__0__conv1__weight=ONES), "left over: layer5.0.conv1.weight"),
        (changed(plain(), conv1__weight=np.ones((1, 3, 5, 5), "float32")), "a 5x5 kernel"),
        (changed(plain(), layer1__1__conv1__weight=ONES), "a ResNet of 2-1-1-1 basic blocks"),
        (changed(plain(), fc__weight=ONES), "fc.weight has shape (3,)"),
        (changed(plain(), fc__weight=np.ones((5, 8), "float32")), "missing: fc.bias"),
        ({"a.weight": ONES}, "no encoder that is known here"),
        ({"patch_embed.proj.weight": np.ones((384, 3, 16, 16))}, "a Vision Transformer of width 384 and 0 blocks"),
        (changed(vit_backbone(), pos_embed=np.ones((1, 4, 192))), "pos_embed has 4 tokens; a class token and"),
        (changed(vit_backbone(), blocks__11__norm1__bias=None), "missing: blocks.11.norm1.bias"),
        (changed(vit_backbone(), dist_token=ONES), "left over: dist_token"),
        (changed(v3(), module__predictor__3__weight=None), "missing: predictor.3.weight"),
        (changed(v3(), module__predictor__4__weight=ONES), "left over: predictor.4.weight"),
        (changed(v3(), module__momentum_encoder__fc__0__weight=ONES), "momentum_encoder.fc.0.weight has shape (3,)"),
        (changed(v3(), module__queue=ONES), "left over: queue (3,) is in no part of a moco_v3 checkpoint"),
        ({f"module.base_encoder.{n}": v for n, v in vit_backbone().items()} | {"module.predictor.a": ONES}, "head"),
    ],
)
def test_a_tensor_that_does_not_fit_is_named_and_nothing_is_written(tensors, message, written, tmp_path, capsys):
    path = written(tensors)
    settings = SMALL[1:] if "pos_embed" in tensors else SMALL  # a ViT's positions are those of one image size
    assert run(f"--checkpoint={path}", f"--output={tmp_path / 'out'}", *settings) == 1
    error = capsys.readouterr().err
    assert message in error and str(path) in error and error.count("\n") == 1
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize(
    "arguments, message, status",
    [
        ([], "give --checkpoint=FILE or --encoder=DIR, one of them, and --output", 2),
        (["--checkpoint={v1}"], "and --output", 2),
        (["--checkpoint={v1}", "--encoder=x", "--output=y"], "one of them", 2),
        (["--checkpoint={v1}", "--output={tmp}/new", "--run_dir=x"], "--run_dir belongs to moco_tf.train", 2),
        (["--checkpoint={v1}", "--output={tmp}/new", "--lerning_rate=1"], "Unknown command line flag", 2),
        (["--checkpoint={v1}", "--output={tmp}/new", "--part=half"], "--part=half", 2),
        (["--checkpoint={v1}", "--output={tmp}/new", "--batch_size=12"], "--batch_size=12 does not", 2),
        (["--checkpoint={v1}", "--output={tmp}/new", "--arch=resnet50"], "--arch=resnet50, but the checkpoint has", 2),
        (["--checkpoint={v1}", "--output={tmp}/new", "--heads=6"], "--heads=6 is for a ViT that becomes an", 2),
        (
            ["--checkpoint={v1}", "--output={tmp}/new", "--queue_size=9"],
            "--queue_size=9, but the checkpoint has 32",
            2,
        ),
        (["--checkpoint={v1}", "--output={tmp}/full"], "/full exists: choose another folder", 2),
        (["--checkpoint={v1}", "--output={tmp}/full/file"], "/full/file exists", 2),
        (["--checkpoint={v1}", "--output={tmp}/full/file/deeper"], "Not a directory", 2),
        (["--checkpoint={tmp}/none.pth", "--output={tmp}/new"], "none.pth: No such file", 1),
        (["--checkpoint={tmp}", "--output={tmp}/new"], "Is a directory", 1),
        (["--checkpoint={tmp}/full/file", "--output={tmp}/new"], "neither a PyTorch file", 1),
        (["--encoder={tmp}/none", "--output={tmp}/a.safetensors"], "there is no such file or folder", 2),
        (["--encoder={tmp}/full", "--output={tmp}/a.safetensors"], "is not a run folder", 2),
        (["--encoder={tmp}/full/bad.keras", "--output={tmp}/a.safetensors"], "Keras cannot read it", 2),
        (["--encoder={tmp}/full", "--output={tmp}/a.npz"], "ends in .safetensors, .pth or .pt", 1),
        (["--encoder={tmp}/full", "--output={tmp}/full/file.safetensors"], "exists: choose another name", 1),
        (["--encoder={tmp}/empty_run", "--output={tmp}/a.safetensors"], "a run folder without a checkpoint", 2),
    ],
)
def test_a_wrong_command_ends_in_one_line(arguments, message, status, tmp_path, capsys):
    (tmp_path / "full").mkdir()
    for name in ("file", "file.safetensors", "bad.keras"):
        (tmp_path / "full" / name).write_text("something that is mine")
    (tmp_path / "empty_run").mkdir()
    (tmp_path / "empty_run/config.flags").write_text("--arch=resnet10\n--width=2\n--queue_size=8\n")
    before = sorted(tmp_path.rglob("*"))
    assert run(*(a.format(v1=V1, tmp=tmp_path) for a in arguments)) == status
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert error.startswith("moco_tf.torch_weights: ")
    assert sorted(tmp_path.rglob("*")) == before


def test_a_plain_network_is_no_whole_run_and_the_way_out_is_said(written, tmp_path, capsys):
    assert run(f"--checkpoint={written(plain())}", f"--output={tmp_path / 'out'}", "--part=whole") == 1
    assert "--part=encoder" in capsys.readouterr().err


def test_the_number_of_heads_is_said_by_a_flag_and_changes_what_is_computed(written, tmp_path):
    path, image = written(vit_backbone()), np.ones((1, 8, 8, 3), "float32")
    for heads in (0, 3, 6):
        assert run(f"--checkpoint={path}", f"--output={tmp_path / str(heads)}", f"--heads={heads}") == 0
    usual, three, six = (
        keras.models.load_model(tmp_path / str(heads) / "encoder.keras")(image)["features"] for heads in (0, 3, 6)
    )
    np.testing.assert_array_equal(usual, three)
    assert np.abs(usual - six).max() > 1e-3


def test_a_network_of_other_names_is_refused_on_the_way_out(tmp_path, capsys):
    inputs = keras.Input((8, 8, 3))
    layer = keras.layers.Conv2D(4, 3, name="stem")(inputs)
    keras.Model(inputs, keras.layers.GlobalAveragePooling2D()(layer)).save(tmp_path / "m.keras")
    assert run(f"--encoder={tmp_path / 'm.keras'}", f"--output={tmp_path / 'm.safetensors'}") == 1
    assert "no encoder that is known here" in capsys.readouterr().err


def test_verbose_prints_a_line_for_each_tensor(tmp_path, capsys):
    assert run(f"--checkpoint={V1}", f"--output={tmp_path / 'run'}", *SMALL, "--verbose") == 0
    output = capsys.readouterr().out
    for name in OFFICIAL:
        if not name.endswith("num_batches_tracked"):
            assert f"{name.removeprefix('module.')} " in output
    assert "encoder_q.conv1.weight (1, 3, 7, 7) float32 -> conv1/kernel (7, 7, 3, 1)" in output


def test_help_explains_each_flag(capsys):
    assert run("--help") == 0
    output = capsys.readouterr().out
    for name in ("--checkpoint", "--encoder", "--output", "--part", "--to", "--[no]verbose", "--batch_size"):
        assert name in output
