"""MoCo v2 and MoCo v3 in PyTorch, after the papers: steps to time a step of moco_tf against.

Each function returns a step, to be called without arguments. Encoders are torchvision's and timm's.
"""

import contextlib
import copy
import itertools

import torch
from torch import nn
from torch.nn import functional

from benchmarks.bare_torchvision import torchvision


def moco_step(
    arch, image_size, batch_size, compiled, channels_last, bfloat16, device, queue_size=65536, momentum=0.999
):
    """MoCo v2 (arXiv:2003.04297): MLP head, queue, SGD."""
    resnet = _torchvision_resnet(arch, cifar=image_size < 64)
    width = resnet.fc.in_features
    resnet.fc = nn.Sequential(nn.Linear(width, width), nn.ReLU(inplace=True), nn.Linear(width, 128))
    query_encoder, key_encoder = resnet.to(device), copy.deepcopy(resnet).to(device).requires_grad_(False)
    queries_of, keys_of = _prepared([query_encoder, key_encoder], compiled, channels_last)
    queue = functional.normalize(torch.randn(queue_size, 128, device=device), dim=1)
    optimizer = torch.optim.SGD(query_encoder.parameters(), 0.03, momentum=0.9, weight_decay=1e-4, foreach=True)
    views, precision = _views(image_size, batch_size, channels_last, device), _precision(bfloat16, device)
    labels = torch.zeros(batch_size, dtype=torch.long, device=device)
    pointer = 0

    def step():
        nonlocal pointer
        with torch.no_grad():
            _move(key_encoder, query_encoder, momentum)
            with precision():
                keys = functional.normalize(keys_of(views[1]).float(), dim=1)
        with precision():
            queries = functional.normalize(queries_of(views[0]).float(), dim=1)
        positives = (queries * keys).sum(dim=1, keepdim=True)
        logits = torch.cat([positives, queries @ queue.T], dim=1) / 0.2
        loss = functional.cross_entropy(logits, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        queue[pointer : pointer + batch_size] = keys
        pointer = (pointer + batch_size) % queue_size
        return loss.item()

    return step


def moco_v3_step(
    arch, image_size, batch_size, compiled, channels_last, bfloat16, device, momentum=0.99, temperature=0.2
):
    """MoCo v3 (arXiv:2104.02057) of a ViT: projector, predictor, both views each way, AdamW."""
    import timm

    heads = {"num_heads": 12} if arch == "vit_small" else {}  # the paper's number; timm's ViT, after DeiT, has 6
    vit = timm.create_model(f"{arch}_patch16_224", num_classes=0, img_size=image_size, **heads)
    vit.pos_embed.requires_grad_(False)
    vit.patch_embed.requires_grad_(False)
    query_encoder = nn.Sequential(vit, *_mlp(vit.num_features, 4096, 4096, 256)).to(device)
    predictor = nn.Sequential(*_mlp(256, 4096, 256)).to(device)
    key_encoder = copy.deepcopy(query_encoder).requires_grad_(False)
    trained = nn.Sequential(query_encoder, predictor)
    queries_of, keys_of = _prepared([trained, key_encoder], compiled, channels_last)
    weights = [weight for weight in trained.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, 1.5e-4, weight_decay=0.1, foreach=True)
    views, precision = _views(image_size, batch_size, channels_last, device), _precision(bfloat16, device)
    labels = torch.arange(batch_size, device=device)

    def step():
        with torch.no_grad():
            _move(key_encoder, query_encoder, momentum)
            with precision():
                keys = [functional.normalize(keys_of(view).float(), dim=1) for view in views]
        with precision():
            queries = [functional.normalize(queries_of(view).float(), dim=1) for view in views]
        pairs = zip(queries, keys[::-1], strict=True)
        loss = 2 * temperature * sum(functional.cross_entropy(q @ k.T / temperature, labels) for q, k in pairs)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.item()

    return step


def _torchvision_resnet(arch, cifar):
    model = getattr(torchvision.models, arch)()
    if cifar:
        model.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
        model.maxpool = nn.Identity()
    return model


def _mlp(*widths):
    """Linear layers without bias, BatchNorm after each, ReLU between; the last BatchNorm has no parameters."""
    for number, (inputs, outputs) in enumerate(itertools.pairwise(widths)):
        last = number == len(widths) - 2
        yield nn.Linear(inputs, outputs, bias=False)
        yield nn.BatchNorm1d(outputs, affine=not last)
        if not last:
            yield nn.ReLU(inplace=True)


def _prepared(models, compiled, channels_last):
    if channels_last:
        models = [model.to(memory_format=torch.channels_last) for model in models]
    return [torch.compile(model) if compiled else model for model in models]


def _views(image_size, batch_size, channels_last, device):
    layout = torch.channels_last if channels_last else torch.contiguous_format
    shape = (batch_size, 3, image_size, image_size)
    return [torch.randn(shape, device=device).to(memory_format=layout) for _ in range(2)]


def _precision(bfloat16, device):
    if device == "cuda":  # TensorFlow's defaults: it uses TF32 and tries all algorithms
        torch.set_float32_matmul_precision("high")
        torch.backends.cudnn.benchmark = True
    return (lambda: torch.autocast(device, torch.bfloat16)) if bfloat16 else contextlib.nullcontext


def _move(target, source, momentum):
    weights = [[w.data for w in model.parameters()] for model in (target, source)]
    torch._foreach_lerp_(*weights, 1 - momentum)
