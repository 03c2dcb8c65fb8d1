"""Against PyTorch itself, where it is installed (the `torch` extra): networks, and files that it wrote and reads."""

import importlib.util
import itertools
import re
import sys
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
for library in ("torchvision", "timm"):
    if not importlib.util.find_spec(library):
        pytest.skip(f"{library} is not installed", allow_module_level=True)
sys.path.insert(0, str(Path(__file__).parent))

import make_torch_fixtures as reference  # noqa: E402
import timm  # noqa: E402
import torch_agreement  # noqa: E402
import torchvision  # noqa: E402

from moco_tf.encoders import resnet  # noqa: E402
from moco_tf.pytorch import checkpoint_files, tensor_names  # noqa: E402
from moco_tf.torch_weights import main  # noqa: E402
from moco_tf.train import main as train  # noqa: E402


@pytest.mark.parametrize(
    "name",
    [name if name == "resnet18" else pytest.param(name, marks=pytest.mark.slow) for name in reference.ARCHITECTURES],
)
def test_features_statistics_and_gradients_are_torchvisions(name):
    found = torch_agreement.deviations(reference.ARCHITECTURES[name])
    for column in ("evaluation", "training", "statistics", "gradients"):
        assert found[column] <= 1e-8, column
    assert found["float32"] <= 10 * found["PyTorch's float32"]


@pytest.mark.parametrize("new_format, head", [(True, "mlp"), (False, "linear")])
def test_a_file_of_the_official_naming_trains_on_and_exports_to_pytorch(new_format, head, tmp_path):
    state = reference.official(head, seed=9, width=2, queue_size=64)
    checkpoint = {"epoch": 1, "arch": "resnet10", "state_dict": state, "optimizer": {"state": {}}}
    torch.save(checkpoint, tmp_path / "in.pth.tar", _use_new_zipfile_serialization=new_format)
    run, back = tmp_path / "run", tmp_path / "back.pth"
    settings = ["--image_size=32", "--augment=cifar", "--batch_size=20", "--bn_groups=2", "--knn_every=0"]
    assert main([f"--checkpoint={tmp_path / 'in.pth.tar'}", f"--output={run}", *settings]) == 0
    assert main([f"--encoder={run}", f"--output={back}", "--part=whole"]) == 0
    again = torch.load(back, weights_only=True)
    assert again.keys() == state.keys()
    for name, value in state.items():
        assert again[name].dtype == value.dtype and torch.equal(again[name], value), name

    assert train([f"--flagfile={run}/config.flags", f"--run_dir={run}", "--max_steps=10"]) == 0
    assert main([f"--encoder={run}", f"--output={tmp_path / 'encoder.pth'}"]) == 0
    trained = torch.load(tmp_path / "encoder.pth", weights_only=True)
    expected = reference.small_resnet(2, "", 0)
    assert {name: value.shape for name, value in trained.items()} == {n: v.shape for n, v in expected.items()}
    assert all(int(value) == 110 for name, value in trained.items() if name.endswith("tracked"))


@pytest.mark.parametrize("new_format", [True, False])
def test_a_v3_file_that_pytorch_wrote_comes_out_for_pytorch_again(new_format, tmp_path):
    """Modules as the paper's section 4 and the checkpoints' names have them, around timm's ViT."""

    def mlp(*widths):
        layers = []
        for place, (inputs, outputs) in enumerate(itertools.pairwise(widths)):
            last = place == len(widths) - 2
            layers += [torch.nn.Linear(inputs, outputs, bias=False), torch.nn.BatchNorm1d(outputs, affine=not last)]
            layers += [] if last else [torch.nn.ReLU()]
        return torch.nn.Sequential(*layers)

    class Checkpoint(torch.nn.Module):
        def __init__(self):
            super().__init__()
            for part in ("base_encoder", "momentum_encoder"):
                encoder = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, num_classes=0)
                encoder.head = mlp(192, 6, 6, 4)
                setattr(self, part, encoder)
            self.predictor = mlp(4, 6, 4)

    state = torch.nn.ModuleDict({"module": Checkpoint()}).state_dict()
    torch.save({"state_dict": state}, tmp_path / "in.pth.tar", _use_new_zipfile_serialization=new_format)
    settings = ["--batch_size=20", "--augment=cifar", "--knn_every=0", "--warmup_epochs=1"]
    assert main([f"--checkpoint={tmp_path / 'in.pth.tar'}", f"--output={tmp_path / 'run'}", *settings]) == 0
    assert main([f"--encoder={tmp_path / 'run'}", f"--output={tmp_path / 'out.pth'}", "--part=whole"]) == 0
    again = torch.load(tmp_path / "out.pth", weights_only=True)
    Checkpoint().load_state_dict({name.removeprefix("module."): value for name, value in again.items()}, strict=True)
    assert again.keys() == state.keys()
    for name, value in state.items():
        assert again[name].dtype == value.dtype and torch.equal(again[name], value), name


@pytest.mark.parametrize("name", ["in.pth", "in.safetensors"])
def test_torchvisions_own_state_dict_goes_in_and_comes_out_loadable(name, tmp_path):
    network = torchvision.models.resnet18()
    state = {key: value.detach().numpy() for key, value in network.state_dict().items()}
    checkpoint_files.write(tmp_path / name, state)
    assert main([f"--checkpoint={tmp_path / name}", f"--output={tmp_path / 'encoder'}"]) == 0
    assert main([f"--encoder={tmp_path / 'encoder'}", f"--output={tmp_path / 'out.pth'}"]) == 0
    again = torch.load(tmp_path / "out.pth", weights_only=True)
    torchvision.models.resnet18().load_state_dict(again, strict=True)
    assert again.keys() == state.keys()
    for key, value in state.items():
        np.testing.assert_array_equal(again[key].numpy(), value, strict=True)


def test_the_documented_lines_give_torchvisions_detector_the_backbone(tmp_path, monkeypatch):
    text = (Path(__file__).parent.parent / "docs/torch_weights.md").read_text()
    (example,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    tensors = tensor_names.state_dict(resnet.resnet50())
    checkpoint_files.write(tmp_path / "resnet50.safetensors", tensors)
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(compile(example, "torch_weights.md", "exec"), names)
    body = names["detector"].backbone.body
    assert body.state_dict().keys() == tensors.keys() and all(value.requires_grad for value in body.parameters())
    for key, value in body.state_dict().items():
        np.testing.assert_array_equal(value.numpy(), tensors[key])
