"""Makes tests/torch_files/ with PyTorch, torchvision and timm: python tests/make_torch_fixtures.py

The everyday tests read these files without PyTorch. Weights are functions of their names (named_weights.py), so that
no answer needs its weights stored.
"""

import json
import sys
from collections import OrderedDict
from pathlib import Path
from unittest import mock

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE / "goldens")]
# torchvision's C++ operators, which no ResNet uses, are missing beside a torch wheel that it was not built for.
sys.modules.setdefault("torchvision._meta_registrations", mock.MagicMock())

import tensors  # noqa: E402
import timm  # noqa: E402
import torch  # noqa: E402
import torchvision  # noqa: E402
from named_weights import IMAGE_SIZE, excerpt, filled, images  # noqa: E402

FOLDER = HERE / "torch_files"
SEED = 4
ARCHITECTURES = {  # this project's name: torchvision's
    "resnet18": "resnet18",
    "resnet34": "resnet34",
    "resnet50": "resnet50",
    "resnet101": "resnet101",
    "resnet152": "resnet152",
    "resnext50": "resnext50_32x4d",
    "wide_resnet50": "wide_resnet50_2",
    "wide_resnet101": "wide_resnet101_2",
    "vit_small": "vit_small_patch16_224",  # timm's, with MoCo v3's 12 heads
    "vit_base": "vit_base_patch16_224",
}


def official(head, seed=SEED, width=1, dim=8, queue_size=32):
    """The state dict of the authors' builder around a ResNet with one basic block a stage, names and order theirs."""
    state = OrderedDict()
    state["module.queue"] = torch.from_numpy(tensors.queue(seed, dim, queue_size)).float()
    state["module.queue_ptr"] = torch.tensor([5])
    for number, encoder in enumerate(("encoder_q", "encoder_k")):
        for name, value in small_resnet(width, head, dim).items():
            if name.endswith("tracked"):
                value = torch.tensor(100 + number)
            else:
                value = torch.from_numpy(filled(seed + number, f"{encoder}.{name}", tuple(value.shape)))
            state[f"module.{encoder}.{name}"] = value
    return state


def small_resnet(width, head, dim):
    """Names and shapes of torchvision's ResNet([1, 1, 1, 1]) at another width, with a head: a state dict."""
    full = torchvision.models.ResNet(torchvision.models.resnet.BasicBlock, [1, 1, 1, 1]).state_dict()
    state = OrderedDict()
    for name, value in full.items():
        if not name.startswith("fc."):
            state[name] = torch.zeros(
                [n if n in (3, 7, 1) else n * width // 64 for n in value.shape], dtype=value.dtype
            )
    features = 8 * width
    for layer, inputs, outputs in {
        "linear": [("fc", features, dim)],
        "mlp": [("fc.0", features, features), ("fc.2", features, dim)],
        "": [],
    }[head]:
        state[f"{layer}.weight"], state[f"{layer}.bias"] = torch.zeros(outputs, inputs), torch.zeros(outputs)
    return state


def network(name):
    """torchvision's network of that name, or timm's ViT, in float64 and without its classifier.

    Its weights are functions of their names.
    """
    if name.startswith("vit"):
        model = timm.create_model(name, img_size=IMAGE_SIZE, num_heads=12, num_classes=0)
    else:
        model = getattr(torchvision.models, name)()
        model.fc = torch.nn.Identity()
    state = {
        key: value if key.endswith("tracked") else torch.from_numpy(filled(SEED, key, tuple(value.shape)))
        for key, value in model.state_dict().items()
    }
    model.load_state_dict(state)
    return model.double()


def answers(name):
    """Features of a network in evaluation and in training mode, and its statistics after the step, in excerpts."""
    model = network(name)
    batch = torch.from_numpy(images(SEED))
    with torch.no_grad():
        evaluated = model.eval()(batch)
        trained = model.train()(batch)
    statistics = {
        key: excerpt(value)
        for key, value in model.state_dict().items()
        if key.endswith(("running_mean", "running_var")) and (key.startswith("bn1") or ".0.bn2" in key)
    }
    return {"evaluation": excerpt(evaluated), "training": excerpt(trained), "statistics": statistics}


def main():
    FOLDER.mkdir(exist_ok=True)
    v1, v2 = official("linear"), official("mlp")
    extras = {
        "epoch": 3,
        "arch": "resnet10",
        "optimizer": {"state": {}, "param_groups": [{"lr": 0.03, "params": [0]}]},
    }
    torch.save({"state_dict": v1, **extras}, FOLDER / "v1_legacy.pth.tar", _use_new_zipfile_serialization=False)
    torch.save({"state_dict": v2, **extras}, FOLDER / "v2_zip.pth.tar")
    types = {
        "float32": torch.arange(6.0).reshape(2, 3).t(),  # strides that are not those of its shape
        "float64": torch.arange(6.0).double()[2:],  # an offset
        "float16": torch.tensor([1.5, -2.25]).half(),
        "bfloat16": torch.tensor([1.5, -3.0e38]).bfloat16(),
        "int64": torch.tensor(7),
        "bool": torch.tensor([True, False]),
        "empty": torch.zeros(0, 3),
        "parameter": torch.nn.Parameter(torch.ones(2)),
    }
    torch.save(types, FOLDER / "types_zip.pth")
    torch.save(types, FOLDER / "types_legacy.pth", _use_new_zipfile_serialization=False)
    found = {ours: answers(theirs) for ours, theirs in ARCHITECTURES.items()}
    made = {library.__name__: library.__version__ for library in (torch, torchvision, timm)} | {"networks": found}
    (FOLDER / "features.json").write_text(json.dumps(made, indent=1) + "\n")


if __name__ == "__main__":
    main()
