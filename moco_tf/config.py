"""Turns flags into one frozen `Config`, and refuses values that do not fit together before any work starts.

The dataclasses below hold the flags that every run has: names, defaults, help, and whether each may change on resume.
A method and a pretext task add their own flags in their `Options`. This module imports nothing heavy, so that a wrong
flag is refused at once.
"""

import dataclasses
import functools
import importlib.util
import logging
import pkgutil
import sys
from importlib import import_module
from pathlib import Path
from typing import ClassVar

from absl import flags

from moco_tf import command, files
from moco_tf.command import ConfigError
from moco_tf.methods.flags import METHODS, VITS
from moco_tf.recorded import FREE, Recorded, flag

ARCHITECTURES = (
    *("resnet10", "resnet14", "resnet18", "resnet26", "resnet34", "resnet50", "resnet101", "resnet152"),
    *("resnext50", "wide_resnet50", "wide_resnet101"),
    *VITS,
)

OF_VITS = ("patch_size", "freeze_patch", "token_dropout")
OF_RESNETS = ("width", "stem")

log = logging.getLogger("moco_tf")


@dataclasses.dataclass(frozen=True)
class Task:
    """What is learnt"""

    method: str = flag(
        "moco",
        "Algorithm: moco is MoCo v1 and v2, moco_v3 MoCo v3; memory_bank and end_to_end are what v1's paper compares "
        "them with; or a module of your own by its dotted path.",
    )
    pretext: str = flag(
        "crops",
        "Pretext task: crops, two random views of an image (the papers'); siblings, several pictures of one thing; "
        "patches, quarters of a view against whole ones (Fast-MoCo); labels, images of one class (SupCon); cmc, "
        "luminance and colour (CMC); cpc, a patch from those above it (CPC); simcse, sentences (SimCSE); mae, "
        "hidden patches from visible ones (MAE); mae_moco, that beside MoCo v3's contrast; the classic ones, "
        "rotation, position and jigsaw of tiles, colorize, denoise, inpaint, exemplar, cluster; or a module of your "
        "own by its dotted path (docs/pretext.md has an example).",
    )


@dataclasses.dataclass(frozen=True)
class Data:
    """The images"""

    dataset: str = flag(
        "embedded",
        "'embedded' (12,000 real 32-pixel images inside this package), a folder of images or a .zip or .tar of one, "
        "several of these (a,b,c), a file that lists images (.txt, .csv, .parquet), a prepared data set of TFDS by "
        "name, such as imagenet2012, or sentences in .txt files (docs/data.md). `python -m moco_tf.data` shows what "
        "is in it.",
        path=True,
    )
    data_dir: str = flag(
        "",
        "Folder that a relative --dataset folder starts from, or that holds TFDS' prepared sets.",
        about=FREE,
        path=True,
    )
    train_split: str = flag(
        "train",
        "Split to train on: for a folder, its sub-folder of this name, or of this kind (Train, training, train2017), "
        "if it has one; '.' reads all its folders as classes. For TFDS, its split language, such as train[:90%].",
    )
    eval_split: str = flag(
        "test",
        "Labelled split for the kNN monitor: test or validation, whichever there is (docs/data.md has the names); for "
        "TFDS, its split language.",
    )
    channels: int = flag(
        3,
        "Channels of the images. 3: in colour; 1: read as grey; any other number: arrays in .npy files, uint8 "
        "(height, width, channels), which moco_tf.data.convert makes of TIFFs. With any number other than 3, "
        "random steps that need colours are left out (docs/data.md).",
    )
    exif: bool = flag(
        False, "Turn and mirror JPEGs as their EXIF data says; a folder's or a list's. MoCo's papers: as stored."
    )
    max_bad_fraction: float = flag(
        0.05, "Share of undecodable images, 0 to 1, that a run accepts; good ones stand in for them.", about=FREE
    )


@dataclasses.dataclass(frozen=True)
class Network:
    """The encoder"""

    arch: str = flag(
        "resnet50",
        "Encoder. 10, 18 and 34 are basic blocks, 14 and 26 shallow bottlenecks. v1, v2: resnet50; v3: also "
        "vit_small and vit_base.",
        choices=ARCHITECTURES,
    )
    width: int = flag(64, "Channels of the encoder's first stage. Papers: 64.")
    stem: str = flag(
        "imagenet",
        "First layers: imagenet (7x7 stride 2 and max-pool) or cifar (3x3 stride 1), for small images.",
        choices=("imagenet", "cifar"),
    )
    patch_size: int = flag(16, "Side of a ViT's patches, in pixels; --image_size is a multiple of it. v3: 16.")
    freeze_patch: bool = flag(True, "Leave a ViT's patch projection as it was drawn, for stability. v3: on.")
    image_size: int = flag(224, "Side of the square views, in pixels. Papers: 224.")
    growing_sizes: tuple[int, ...] = flag(
        (),
        "Sides of the views in the first stages of a run, as in 96,128, before --image_size; all stages take equally "
        "many epochs (progressive learning: EfficientNetV2, arXiv 2104.00298). With ResNets. MoCo's papers: none.",
    )
    dim: int = flag(128, "Length of the embedding. v1, v2: 128, v3: 256.")
    hidden_dim: int = flag(
        0,
        "Width of the head's hidden layers; 0: as many as features (R50: 2048, as v2), with moco_v3 and "
        "mae_moco the paper's 4096, with cpc 256, with position and jigsaw twice as many as features.",
    )
    temperature: float = flag(0.2, "T of the loss. v1: 0.07, v2: 0.2, v3: R50 1.0, ViT 0.2, SimCLR 0.1.")
    precision: str = flag(
        "float32",
        "Arithmetic of the encoders; weights, statistics, queue and loss stay float32.",
        choices=("float32", "bfloat16", "float16"),
    )


@dataclasses.dataclass(frozen=True)
class Optimization:
    """The optimizer"""

    optimizer: str = flag(
        "sgd",
        "sgd: momentum 0.9, decay inside it, as PyTorch has it (v1, v2); lars: momentum 0.9, trust 0.001, decay only "
        "of tensors with two axes or more (v3 R50); adamw: PyTorch's, decay of all (v3 ViT).",
        choices=("sgd", "lars", "adamw"),
    )
    lr: float = flag(0.03, "Learning rate. v1, v2: 0.03 for a batch of 256; v3 R50: 0.6 or 0.3, ViT: 1.5e-4.")
    lr_scaling: str = flag(
        "none", "linear: multiply --lr by batch / 256. v1, v2: none, v3: linear.", choices=("none", "linear")
    )
    lr_schedule: str = flag(
        "cosine", "step: x 0.1 at each of --lr_drops (v1); cosine: down to 0 (v2).", choices=("step", "cosine")
    )
    lr_per: str = flag("epoch", "How often the rate changes. v1, v2: epoch, v3: step.", choices=("epoch", "step"))
    lr_drops: tuple[int, ...] = flag((120, 160), "Epochs at which --lr_schedule=step drops. v1: 120,160.")
    warmup_epochs: float = flag(
        0.0, "Epochs of linear warm-up from 0, changed at each step. v1, v2: 0, v3: R50 10, ViT 40."
    )
    weight_decay: float = flag(1e-4, "L2 coefficient, on what --optimizer says. v1, v2: 1e-4, v3: R50 1e-6, ViT 0.1.")
    batch_size: int = flag(256, "Images a step, over all devices. v1, v2: 256, v3: 4096.")
    epochs: int = flag(
        200, "Passes over the data; shapes the schedules. v1: 200, v2: 200 or 800, v3: 100 to 1000.", about=FREE
    )


@dataclasses.dataclass(frozen=True)
class Run:
    """The run"""

    max_steps: int = flag(
        0, "Stop after this many training steps in all, with a checkpoint; 0: run all --epochs.", about=FREE
    )
    seed: int = flag(0, "Seed of weights, order, views and shuffles: the same seed repeats the run.")
    run_dir: str = flag("", "Folder of the run; '': runs/<name of the flag file>.", about=FREE, path=True)
    resume: bool = flag(True, "Go on from the run folder's last checkpoint.", about=FREE)
    start_from: str = flag(
        "",
        "Weights that the encoder starts from, by its layers' names: a run folder, a .keras file, or a PyTorch "
        "checkpoint; all else (head, queue, optimizer, step) starts anew.",
        path=True,
    )
    checkpoint_every: int = flag(1000, "Steps between checkpoints; each epoch's end has one as well.", about=FREE)
    knn_every: int = flag(1, "Epochs between kNN evaluations (k 200, t 0.1); 0: never.", about=FREE)
    callbacks: str = flag(
        "",
        "Keras callbacks of your own, module:function; the function takes this run's settings and returns a list.",
        about=FREE,
    )
    strategy: str = flag(
        "auto",
        "Where to train: single, on one device; mirrored, on all GPUs of this machine; multiworker, on the machines "
        "that the environment's TF_CONFIG names; auto: what fits.",
        choices=("auto", "single", "mirrored", "multiworker"),
        about=FREE,
    )
    virtual_replicas: int = flag(
        0, "Parts into which mirrored divides the CPU, to try replicas out without GPUs; 0: none.", about=FREE
    )
    xla: str = flag(
        "auto",
        "Whether XLA compiles the training step: on, off; auto: on GPUs. On several replicas it compiles the "
        "backbone's passes only. It compiles what the step makes of views (--views_on) in any case.",
        choices=("auto", "on", "off"),
        about=FREE,
    )


@dataclasses.dataclass(frozen=True)
class Config(Run, Optimization, Network, Data, Task, Recorded):
    """The settings of every run; `kind` adds the flags of its method and of its task."""

    unused: tuple = ()  # given flags that belong to another method or task; not a flag itself
    learner: ClassVar[str] = "moco"  # its module builds the model: the method, or a task with its own model

    def __post_init__(self):
        command.check_values(self)
        self.require_lines()
        for name in (
            "width",
            "patch_size",
            "image_size",
            "channels",
            "batch_size",
            "epochs",
            "lr",
            "temperature",
            "dim",
        ):
            command.require(self, getattr(self, name) > 0, name, "is more than 0")
        for name in (
            "max_steps",
            "warmup_epochs",
            "weight_decay",
            "hidden_dim",
            "virtual_replicas",
            "knn_every",
            "seed",
        ):
            command.require(self, getattr(self, name) >= 0, name, "is 0 or more")
        command.require(self, self.seed < 2**31, "seed", "is less than 2^31")
        command.require(self, self.checkpoint_every > 0, "checkpoint_every", "is at least 1 step")
        command.require(self, 0 <= self.max_bad_fraction <= 1, "max_bad_fraction", "lies between 0 and 1")
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
        if self.growing_sizes and self.is_vit:
            raise ConfigError(
                f"--growing_sizes changes the size of views, and {self.arch} takes one size: leave it out"
            )
        command.require(self, all(size > 0 for size in self.growing_sizes), "growing_sizes", "lists sizes above 0")
        if len(self.growing_sizes) >= self.epochs:
            raise ConfigError(
                f"each size of --growing_sizes has an epoch, and --image_size another; got {len(self.growing_sizes)} "
                f"sizes and --epochs={self.epochs}"
            )
        if self.virtual_replicas and self.strategy not in ("auto", "mirrored"):
            raise ConfigError(
                f"--virtual_replicas={self.virtual_replicas} divides one machine's CPU, with --strategy=mirrored; "
                f"got --strategy={self.strategy}"
            )
        if self.warmup_epochs and self.warmup_epochs >= self.epochs:
            raise ConfigError(
                f"--warmup_epochs={self.warmup_epochs:g} leaves nothing of --epochs={self.epochs}: choose fewer"
            )
        for own in type(self).__mro__:  # the method and the task each have their own rules
            if "check" in vars(own):
                own.check(self)

    @property
    def is_vit(self):
        return self.arch.startswith("vit_")

    def size_at(self, epoch):
        """The side of the views in an epoch (from 0), in pixels."""
        sizes = (*self.growing_sizes, self.image_size)
        return sizes[min(len(sizes) * epoch // self.epochs, len(sizes) - 1)]

    @property
    def several_sizes(self):
        """Whether the encoder trains on views of several sizes."""
        return bool(self.growing_sizes or getattr(self, "small_views", 0))

    def uses(self, name):
        """Whether this run has a flag and its encoder uses it."""
        unused = (*(OF_RESNETS if self.is_vit else OF_VITS), *getattr(task_module(self.pretext), "UNUSED", ()))
        return hasattr(self, name) and name not in unused

    @property
    def base_rate(self):
        """The learning rate that the schedule shapes."""
        return self.lr * self.batch_size / 256 if self.lr_scaling == "linear" else self.lr

    def on_replicas(self, replicas, recorded=None):
        """Returns this config with `bn_groups` resolved for a number of replicas and the `recorded` config, if any.

        Raises:
          ConfigError: the replicas cannot share batch or groups evenly, or cannot train in float16.
        """
        if self.batch_size % replicas:
            raise ConfigError(
                f"--batch_size counts the images of all {replicas} replicas, a multiple of {replicas}; "
                f"got {self.batch_size}"
            )
        if replicas > 1 and self.precision == "float16":
            raise ConfigError("--precision=float16 scales its loss on one replica only; use bfloat16 on several")
        if not self.uses("bn_groups"):
            return self
        groups = self.bn_groups or getattr(recorded, "bn_groups", 0) or replicas
        if groups % replicas:
            raise ConfigError(
                f"--bn_groups counts the groups of all replicas, a multiple of {replicas}; got {groups}: train on a "
                f"number of replicas that divides it"
            )
        return dataclasses.replace(self, bn_groups=groups)

    def options(self, kind):
        """Returns the `Options` of a method or task, a dataclass `kind`, with the values of these settings."""
        return kind(**{field.name: getattr(self, field.name) for field in dataclasses.fields(kind)})


def make(**values):
    """Returns a `Config` of the class that fits its method and task; flags that are not given take their defaults."""
    return kind(values.get("method", "moco"), values.get("pretext", "crops"))(**values)


@functools.cache
def kind(method="moco", pretext="crops"):
    """Returns the settings class for runs with a method and a task: `Config` with the flags of method and task."""
    own = _own_options(method, pretext).values()
    learner = pretext if hasattr(task_module(pretext), "model") else method
    return dataclasses.make_dataclass("Config", [], bases=(*own, Config), frozen=True, namespace={"learner": learner})


def _own_options(method, pretext):
    """Returns {flag: `Options`} of the task, and of the method unless the task has a model of its own."""
    task = task_module(pretext)
    of_method = {} if hasattr(task, "model") else {f"--method={method}": method_options(method)}
    return of_method | {f"--pretext={pretext}": task.Options}


def method_options(name):
    """Returns the `Options` of a method, given by its name in this package or by the dotted path of a module."""
    return METHODS[name] if name in METHODS else method_module(name).Options


def method_module(name):
    """Returns the module of a method, given by its name in this package or by its dotted path."""
    module = _module("method", name, "moco_tf.methods", METHODS)
    if name not in METHODS:
        _check_module("method", name, module, "model", "model(config, options, inputs, source)")
    return module


def task_module(name):
    """Returns the module of a pretext task, given by its name in this package or by its dotted path."""
    module = _module("pretext", name, "moco_tf.pretext", _names(import_module("moco_tf.pretext")))
    _check_module("pretext", name, module, "views", "views(record, seed, inputs, options)")
    return module


def _check_module(kind, name, module, function, signature):
    if not callable(getattr(module, function, None)) or not dataclasses.is_dataclass(getattr(module, "Options", None)):
        raise ConfigError(
            f"--{kind}={name}: its module has a dataclass Options and {signature}, as docs/pretext.md says; "
            f"{module.__name__} lacks one"
        )


def _module(kind, name, folder, own):
    """Returns the module in `folder` if its name is one of `own`; otherwise the module with this dotted path."""
    if name in own:
        return import_module(f"{folder}.{name}")
    try:
        return import_own(kind, name)
    except Exception as error:  # a user's own module may raise anything
        if isinstance(error, ModuleNotFoundError) and error.name and f"{name}.".startswith(f"{error.name}."):
            known = ", ".join(own)
            raise ConfigError(
                f"--{kind} is one of {known}, or a module of your own by its dotted path; got {name!r}"
            ) from None
        raise ConfigError(f"--{kind}={name}: the module does not load: {type(error).__name__}: {error}") from error


def import_own(flag, name):
    """Imports a module outside this package; warns before it runs, because the flags may come from somebody else."""
    if name not in sys.modules and importlib.util.find_spec(name.partition(".")[0]):
        log.warning(f"--{flag} imports the module {files.printable(name)} from the Python path.")
    return import_module(name)


def _names(folder):
    return [module.name for module in pkgutil.iter_modules(folder.__path__)]


def _every_kind():
    """The flags of all methods and tasks of this package: {name: field}."""
    own = [
        *METHODS.values(),
        *(task_module(name).Options for name in _names(import_module("moco_tf.pretext"))),
    ]
    return {field.name: field for kind in own for field in command.fields(kind)}


def parse(arguments):
    """Command-line arguments (without the program's name) of `moco_tf.train` -> Config; raises as `command.parse`."""
    program = "moco_tf.train"
    chosen = command.look_ahead(Task, program, arguments)
    settings = kind(chosen["method"], chosen["pretext"])
    if settings.learner != chosen["method"] and chosen["method"] != "moco":
        raise ConfigError(
            f"--pretext={chosen['pretext']} has a model of its own, in which no --method has a part; got "
            f"--method={chosen['method']}: leave it out"
        )
    groups = {group.__doc__: group for group in (Task, Data, Network, Optimization, Run)}
    groups |= _own_options(chosen["method"], chosen["pretext"])
    flag_values = flags.FlagValues()
    command.define(flag_values, command.fields(settings))
    mine = {field.name for field in command.fields(settings)}
    others = [field for name, field in _every_kind().items() if name not in mine]  # accepted, and named as unused
    command.define(flag_values, others, any_choice=True)
    command.read_arguments(flag_values, program, arguments, groups)
    unused = tuple(
        f"--{field.name}={flag_values[field.name].value}" for field in others if flag_values[field.name].present
    )
    config = settings(**command.values(flag_values, settings), unused=unused)
    return dataclasses.replace(config, run_dir=config.run_dir or f"runs/{_flag_file_name(arguments)}")


def read(path):
    """The Config in a flag file, as `flag_lines` writes it."""
    return parse([f"--flagfile={Path(path).absolute()}"])  # so that a folder named ~ is not the home folder


def _flag_file_name(arguments):
    name, _, file = arguments[0].lstrip("-").partition("=") if arguments else ("", "", "")
    return Path(file).stem if name == "flagfile" else "default"
