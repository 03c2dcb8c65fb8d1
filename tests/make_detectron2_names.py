"""Makes tests/detectron2_names.json by the authors' own converter, which this project holds no line of:

  git clone https://github.com/facebookresearch/moco && git -C moco checkout 34020351
  python tests/make_detectron2_names.py moco/detection/convert-pretrain-to-detectron2.py

Needs PyTorch. The main branch of that repository is empty since 2026.
"""

import json
import pickle
import subprocess
import sys
import tempfile
import zlib
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))
from named_weights import filled  # noqa: E402

NAMES = HERE / "detectron2_names.json"
SEED = 7
ABOUT = (
    "What detection/convert-pretrain-to-detectron2.py of github.com/facebookresearch/moco (34020351) makes of "
    "make_detectron2_names.checkpoint(), a MoCo v2 run around a ResNet-50 of width 8. A row is [type, shape, sum, sum "
    "of value times place], in float64."
)


def checkpoint():
    """A whole MoCo v2 checkpoint as this project writes it, {name: array}; its numbers are functions of the names."""
    from moco_tf import build, run_folder
    from moco_tf.config import make
    from moco_tf.pytorch import conversion

    config = make(arch="resnet50", width=8, image_size=32, dim=8, queue_size=32, batch_size=8)
    tensors = conversion.whole_state_dict(build.model(config, run_folder.Data(config.batch_size)))
    for name, value in tensors.items():
        floats = value.dtype == np.float32
        number = zlib.crc32(name.encode()) % 32
        tensors[name] = filled(SEED, name, value.shape) if floats else np.full_like(value, number)
    return tensors


def summary(model):
    """{name: [type, shape, sum, weighted sum]} of {name: array}."""
    return {
        name: [str(value.dtype), list(value.shape), *sums(value.astype(np.float64).ravel())]
        for name, value in model.items()
    }


def sums(flat):
    return float(flat.sum()), float((flat * np.arange(1, 1 + flat.size)).sum())


def main(converter):
    import torch

    with tempfile.TemporaryDirectory() as folder:
        state = {name: torch.from_numpy(value) for name, value in checkpoint().items()}
        torch.save({"state_dict": state}, f"{folder}/in.pth.tar")
        command = [sys.executable, converter, f"{folder}/in.pth.tar", f"{folder}/out.pkl"]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        contents = pickle.loads(Path(f"{folder}/out.pkl").read_bytes())
    model = summary(contents.pop("model"))
    lines = ",\n".join(f"  {json.dumps(name)}: {json.dumps(row)}" for name, row in model.items())
    beside = json.dumps(contents)
    NAMES.write_text(f'{{"about": {json.dumps(ABOUT)},\n "beside": {beside},\n "model": {{\n{lines}\n }}}}\n')


if __name__ == "__main__":
    main(*sys.argv[1:])
