"""Flags -> one frozen `Config`; what does not fit together is refused here, before any work starts.

The dataclass below is the one list of `moco_tf.train`'s flags: names, defaults, help and what each may change
on resume. Imports nothing heavy, so that a wrong flag is answered at once.
"""

import dataclasses
from pathlib import Path

from moco_tf import command
from moco_tf.command import ConfigError

ARCHITECTURES = (
    "resnet10",
    "resnet14",
    "resnet18",
    "resnet26",
    "resnet34",
    "resnet50",
    "resnet101",
    "resnet152",
    "resnext50",
    "wide_resnet50",
    "wide_resnet101",
    "vit_tiny",
    "vit_small",
    "vit_base",
)

# The losses of each method.
LOSSES = {
    "moco": ("infonce",),
    "moco_v3": ("infonce",),
    "memory_bank": ("infonce", "nce"),
    "end_to_end": ("infonce", "nt_xent"),
}

# Flags that mean nothing with a method or an encoder; given there, they are named in one notice.
NOT_IN = {
    "moco": ("bank_momentum", "shared"),
    "moco_v3": ("queue_size", "head", "shuffle_bn", "bn_groups", "bank_momentum", "shared"),
    "memory_bank": ("momentum", "momentum_schedule", "shuffle_bn", "shared"),
    "end_to_end": ("queue_size", "momentum", "momentum_schedule", "bank_momentum"),
}
OF_VITS = ("patch_size", "freeze_patch")
OF_RESNETS = ("width", "stem")

# What a flag is about decides whether a run may go on with another value of it (see `differences`).
MATHEMATICS = "mathematics"  # changes the numbers: must be equal
FREE = "free"  # lengths, intervals, hardware, places: may differ


def _flag(default, help, choices=None, about=MATHEMATICS, path=False):
    return command.flag(default, help, choices, path, about=about)


@dataclasses.dataclass(frozen=True)
class Config:
    dataset: str = _flag(
        "embedded",
        "'embedded' (12,000 real 32-pixel images inside this package), a folder of images, or a prepared data set of "
        "TFDS by name, such as imagenet2012. `python -m moco_tf.data` shows what is in it.",
        path=True,
    )
    data_dir: str = _flag(
        "",
        "Folder that a relative --dataset folder starts from, or that holds TFDS' prepared sets.",
        about=FREE,
        path=True,
    )
    train_split: str = _flag(
        "train",
        "Split to train on: for a folder, its sub-folder of this name, or of this kind (Train, training, train2017), "
        "if it has one; '.' reads all its folders as classes. For TFDS, its split language, such as train[:90%].",
    )
    eval_split: str = _flag(
        "test",
        "Labelled split for the kNN monitor: test or validation, whichever there is (docs/data.md has the names); for "
        "TFDS, its split language.",
    )
    max_bad_fraction: float = _flag(
        0.05, "Share of undecodable images, 0 to 1, that a run accepts; good ones stand in for them.", about=FREE
    )
    method: str = _flag(
        "moco",
        "Algorithm: moco is MoCo v1 and v2, moco_v3 MoCo v3; memory_bank and end_to_end are what v1's paper compares "
        "them with.",
        choices=("moco", "moco_v3", "memory_bank", "end_to_end"),
    )
    arch: str = _flag(
        "resnet50",
        "Encoder. 10, 18 and 34 are basic blocks, 14 and 26 shallow bottlenecks. v1, v2: resnet50; v3: also "
        "vit_small and vit_base.",
        choices=ARCHITECTURES,
    )
    width: int = _flag(64, "Channels of the encoder's first stage. Papers: 64.")
    stem: str = _flag(
        "imagenet",
        "First layers: imagenet (7x7 stride 2 and max-pool) or cifar (3x3 stride 1), for small images.",
        choices=("imagenet", "cifar"),
    )
    patch_size: int = _flag(16, "Side of a ViT's patches, in pixels; --image_size is a multiple of it. v3: 16.")
    freeze_patch: bool = _flag(True, "Leave a ViT's patch projection as it was drawn, for stability. v3: on.")
    image_size: int = _flag(224, "Side of the square views, in pixels. Papers: 224.")
    augment: str = _flag(
        "v2",
        "Recipe of the random views: v1, v2, v3 as in the papers, or cifar (the official CIFAR-10 demo).",
        choices=("v1", "v2", "v3", "cifar"),
    )
    crop_min: float = _flag(
        0.0,
        "Least area of a random crop, as a share of the image; 0: the recipe's own (v1, v2: 0.2). v3: 0.2, ViTs 0.08.",
    )
    batch_size: int = _flag(256, "Images a step, over all devices. v1, v2: 256, v3: 4096.")
    epochs: int = _flag(
        200, "Passes over the data; shapes the schedules. v1: 200, v2: 200 or 800, v3: 100 to 1000.", about=FREE
    )
    max_steps: int = _flag(
        0, "Stop after this many training steps in all, with a checkpoint; 0: run all --epochs.", about=FREE
    )
    optimizer: str = _flag(
        "sgd",
        "sgd: momentum 0.9, decay inside it, as PyTorch has it (v1, v2); lars: momentum 0.9, trust 0.001, decay only "
        "of tensors with two axes or more (v3 R50); adamw: PyTorch's, decay of all (v3 ViT).",
        choices=("sgd", "lars", "adamw"),
    )
    lr: float = _flag(0.03, "Learning rate. v1, v2: 0.03 for a batch of 256; v3 R50: 0.6 or 0.3, ViT: 1.5e-4.")
    lr_scaling: str = _flag(
        "none", "linear: multiply --lr by batch / 256. v1, v2: none, v3: linear.", choices=("none", "linear")
    )
    lr_schedule: str = _flag(
        "cosine", "step: x 0.1 at each of --lr_drops (v1); cosine: down to 0 (v2).", choices=("step", "cosine")
    )
    lr_per: str = _flag("epoch", "How often the rate changes. v1, v2: epoch, v3: step.", choices=("epoch", "step"))
    lr_drops: tuple[int, ...] = _flag((120, 160), "Epochs at which --lr_schedule=step drops. v1: 120,160.")
    warmup_epochs: float = _flag(
        0.0, "Epochs of linear warm-up from 0, changed at each step. v1, v2: 0, v3: R50 10, ViT 40."
    )
    weight_decay: float = _flag(1e-4, "L2 coefficient, on what --optimizer says. v1, v2: 1e-4, v3: R50 1e-6, ViT 0.1.")
    queue_size: int = _flag(65536, "K: keys in the queue, or drawn from the memory bank, as negatives. v1, v2: 65536.")
    momentum: float = _flag(0.999, "m of the key encoder. v1, v2: 0.999, v3: 0.99.")
    momentum_schedule: str = _flag(
        "constant",
        "cosine: --momentum rises to 1 over the run. v1, v2: constant, v3: cosine.",
        choices=("constant", "cosine"),
    )
    bank_momentum: float = _flag(
        0.5, "With memory_bank: share of a record's key that stays when the record is seen. Its paper: 0.5."
    )
    shared: str = _flag(
        "encoder",
        "With end_to_end, what queries and keys share: encoder, they have one; trunk, each has a head of its own; "
        "none, two encoders. v1's paper allows all; SimCLR: encoder.",
        choices=("encoder", "trunk", "none"),
    )
    loss: str = _flag(
        "infonce",
        "infonce: a softmax over key and negatives. nce, with memory_bank: noise-contrastive estimation, as its paper "
        "has it. nt_xent, with end_to_end: each view among all others, SimCLR's.",
        choices=("infonce", "nce", "nt_xent"),
    )
    temperature: float = _flag(0.2, "T of the loss. v1: 0.07, v2: 0.2, v3: R50 1.0, ViT 0.2, SimCLR 0.1.")
    dim: int = _flag(128, "Length of the embedding. v1, v2: 128, v3: 256.")
    head: str = _flag("mlp", "Projection head: linear (v1) or mlp (v2).", choices=("linear", "mlp"))
    hidden_dim: int = _flag(
        0,
        "Width of the head's hidden layers; 0: as many as features (R50: 2048, as v2), with moco_v3 the paper's 4096.",
    )
    shuffle_bn: bool = _flag(True, "Encode keys in another order than queries; needs --bn_groups of 2 or more.")
    bn_groups: int = _flag(
        0,
        "Equal parts of the global batch that BatchNorm normalises apart, a multiple of the replicas; 0: as many "
        "as the run began with, at first one a replica. v1, v2: 8, their 8 GPUs.",
    )
    strategy: str = _flag(
        "auto",
        "Where to train: single, on one device; mirrored, on all GPUs of this machine; multiworker, on the machines "
        "that the environment's TF_CONFIG names; auto: what fits.",
        choices=("auto", "single", "mirrored", "multiworker"),
        about=FREE,
    )
    virtual_replicas: int = _flag(
        0, "Parts into which mirrored divides the CPU, to try replicas out without GPUs; 0: none.", about=FREE
    )
    xla: str = _flag(
        "auto",
        "Whether XLA compiles the training step: on, off; auto: on one GPU. It cannot for several replicas.",
        choices=("auto", "on", "off"),
        about=FREE,
    )
    precision: str = _flag(
        "float32",
        "Arithmetic of the encoders; weights, statistics, queue and loss stay float32.",
        choices=("float32", "bfloat16", "float16"),
    )
    seed: int = _flag(0, "Seed of weights, order, views and shuffles: the same seed repeats the run.")
    run_dir: str = _flag("", "Folder of the run; '': runs/<name of the flag file>.", about=FREE, path=True)
    resume: bool = _flag(True, "Go on from the run folder's last checkpoint.", about=FREE)
    checkpoint_every: int = _flag(1000, "Steps between checkpoints; each epoch's end has one as well.", about=FREE)
    knn_every: int = _flag(1, "Epochs between kNN evaluations (k 200, t 0.1); 0: never.", about=FREE)

    def __post_init__(self):
        command.check_values(self)
        for name in ("dataset", "data_dir", "train_split", "eval_split"):
            value = getattr(self, name)
            if "\n" in value or "\r" in value or value != value.strip():
                raise ConfigError(
                    f"--{name} has no line break and neither begins nor ends with a blank, since it is kept in a line "
                    f"of a flag file; got {value!r}: give the folder another name"
                )
        for name in (
            "width",
            "patch_size",
            "image_size",
            "batch_size",
            "epochs",
            "lr",
            "queue_size",
            "temperature",
            "dim",
        ):
            command.require(self, getattr(self, name) > 0, name, "is more than 0")
        for name in (
            "max_steps",
            "warmup_epochs",
            "weight_decay",
            "hidden_dim",
            "bn_groups",
            "virtual_replicas",
            "knn_every",
            "seed",
        ):
            command.require(self, getattr(self, name) >= 0, name, "is 0 or more")
        command.require(self, self.seed < 2**31, "seed", "is less than 2^31")
        command.require(self, self.checkpoint_every > 0, "checkpoint_every", "is at least 1 step")
        command.require(self, 0 <= self.momentum <= 1, "momentum", "lies between 0 and 1")
        command.require(self, 0 <= self.bank_momentum <= 1, "bank_momentum", "lies between 0 and 1")
        if self.loss not in LOSSES[self.method]:
            raise ConfigError(
                f"--loss is one of {', '.join(LOSSES[self.method])} with --method={self.method}; got {self.loss}"
            )
        command.require(self, 0 <= self.max_bad_fraction <= 1, "max_bad_fraction", "lies between 0 and 1")
        command.require(self, 0 <= self.crop_min <= 1, "crop_min", "lies between 0 and 1")
        command.require(self, self.batch_size >= 2, "batch_size", "is at least 2")
        ascending = list(self.lr_drops) == sorted(self.lr_drops) and min(self.lr_drops, default=0) >= 0
        command.require(self, ascending, "lr_drops", "lists epochs from 0 up in ascending order")
        if self.arch == "resnext50":
            rule = "is a multiple of 16 for resnext50, whose groups are 32"
            command.require(self, self.width % 16 == 0, "width", rule)
        if self.is_vit and self.image_size % self.patch_size:
            raise ConfigError(
                f"--image_size is a multiple of --patch_size={self.patch_size} for {self.arch}; got {self.image_size}"
            )
        groups = (self.uses("bn_groups") and self.bn_groups) or 1
        if self.batch_size % groups or (groups > 1 and self.batch_size // groups < 2):
            raise ConfigError(
                f"each of the {groups} BN groups takes the same number of images, at least 2; "
                f"--batch_size={self.batch_size} does not: choose a multiple of {groups} from {2 * groups} up, "
                "or other --bn_groups"
            )
        if self.virtual_replicas and self.strategy not in ("auto", "mirrored"):
            raise ConfigError(
                f"--virtual_replicas={self.virtual_replicas} divides one machine's CPU, with --strategy=mirrored; "
                f"got --strategy={self.strategy}"
            )
        if self.xla == "on" and self.strategy in ("mirrored", "multiworker"):
            raise ConfigError(f"XLA compiles no step under --strategy={self.strategy}: --xla is auto or off; got on")
        if self.xla == "on" and self.method == "memory_bank" and self.loss == "infonce":
            raise ConfigError("XLA has no way to draw a memory bank's negatives: --xla is auto or off; got on")
        if self.warmup_epochs and self.warmup_epochs >= self.epochs:
            raise ConfigError(
                f"--warmup_epochs={self.warmup_epochs:g} leaves nothing of --epochs={self.epochs}: choose fewer"
            )

    @property
    def is_vit(self):
        return self.arch.startswith("vit_")

    def uses(self, name):
        """Whether a flag has a meaning with this run's method and encoder."""
        return name not in (*NOT_IN[self.method], *(OF_RESNETS if self.is_vit else OF_VITS))

    @property
    def base_rate(self):
        """The learning rate that the schedule shapes."""
        return self.lr * self.batch_size / 256 if self.lr_scaling == "linear" else self.lr

    def bank_bytes(self, size):
        """What the memory bank of `size` images takes, in each replica."""
        return size * self.dim * 4

    def on_replicas(self, replicas, recorded=None):
        """This config with `bn_groups` resolved for a number of replicas, going on from the `recorded` config if any.

        Raises:
          ConfigError: the replicas cannot share batch or groups evenly, or cannot train in float16 or with XLA.
        """
        if self.batch_size % replicas:
            raise ConfigError(
                f"--batch_size counts the images of all {replicas} replicas, a multiple of {replicas}; "
                f"got {self.batch_size}"
            )
        if replicas > 1 and self.precision == "float16":
            raise ConfigError("--precision=float16 scales its loss on one replica only; use bfloat16 on several")
        if replicas > 1 and self.xla == "on":
            raise ConfigError(f"XLA compiles the step of one replica, not of {replicas}: --xla is auto or off; got on")
        if not self.uses("bn_groups"):
            return self
        groups = self.bn_groups or (recorded.bn_groups if recorded else replicas)
        if groups % replicas:
            raise ConfigError(
                f"--bn_groups counts the groups of all replicas, a multiple of {replicas}; got {groups}: train on a "
                f"number of replicas that divides it"
            )
        return dataclasses.replace(self, bn_groups=groups)

    def flag_lines(self):
        """The text of a flag file that repeats this run elsewhere: everything but run_dir and resume.

        Write it with errors="surrogateescape": paths keep their bytes.
        """
        lines = []
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name in ("run_dir", "resume"):
                continue
            if isinstance(value, bool):
                lines.append(f"--{'' if value else 'no'}{field.name}")
            else:
                lines.append(f"--{field.name}={','.join(map(str, value)) if isinstance(value, tuple) else value}")
        return "\n".join(lines) + "\n"

    def differences(self, other):
        """Names of the flags in which two configs' mathematics differ."""
        return [
            field.name
            for field in dataclasses.fields(self)
            if field.metadata["about"] == MATHEMATICS and getattr(self, field.name) != getattr(other, field.name)
        ]


def parse(arguments):
    """Command-line arguments (without the program's name) of `moco_tf.train` -> Config; raises as `command.parse`."""
    config = command.parse(Config, "moco_tf.train", arguments)
    return dataclasses.replace(config, run_dir=config.run_dir or f"runs/{_flag_file_name(arguments)}")


def read(path):
    """The Config in a flag file, as `flag_lines` writes it."""
    return parse([f"--flagfile={Path(path).absolute()}"])  # so that a folder ~ is no home folder


def _flag_file_name(arguments):
    name, _, file = arguments[0].lstrip("-").partition("=") if arguments else ("", "", "")
    return Path(file).stem if name == "flagfile" else "default"
