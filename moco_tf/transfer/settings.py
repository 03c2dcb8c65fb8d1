"""Settings that the commands of transfer share: which encoder, which images, how it learns, where the results go.

The module imports nothing heavy, so a wrong flag is rejected at once.
"""

import dataclasses
from pathlib import Path
from typing import ClassVar

from moco_tf import command, run_folder
from moco_tf.command import ConfigError
from moco_tf.config import read
from moco_tf.recorded import FREE, Recorded, flag

ENCODER_FLAGS = "encoder.flags"  # in the output: the flags of the run whose encoder is transferred


@dataclasses.dataclass(frozen=True)
class Settings(Recorded):
    encoder: str = flag(
        "",
        "A run folder of moco_tf.train, whose encoder is transferred: --stem=imagenet, or a ViT.",
        path=True,
    )
    init: str = flag(
        "encoder",
        "Where the encoder's weights start: encoder, as pre-trained; random; or a .keras file that has its layers, "
        "such as the model.keras of moco_tf.evaluate.finetune.",
        path=True,
    )
    freeze: bool = flag(
        False, "Keep the encoder as it starts, statistics of BatchNorm included; the papers train all of it."
    )
    dataset: str = flag("", "", path=True)  # each command has its own help text
    data_dir: str = flag(
        "",
        "Folder that a relative --dataset folder starts from, or that holds TFDS' prepared sets.",
        about=FREE,
        path=True,
    )
    train_split: str = flag(
        "train", "Split to learn from. Parts of VOC are joined: VOC2007/trainval+VOC2012/trainval."
    )
    eval_split: str = flag("test", "Split to be judged on.", about=FREE)
    labels: float = flag(100.0, "Percent of the training images that are used, drawn by --seed, at least one.")
    max_bad_fraction: float = flag(0.05, "Share of undecodable images, 0 to 1, that is accepted.", about=FREE)
    image_size: int = flag(512, "Side in pixels of the square that images are laid on, a multiple of 32.")
    scale_min: float = flag(0.8, "Least random scale of a training image.")
    scale_max: float = flag(1.25, "Largest random scale of a training image.")
    steps: int = flag(1000, "Training steps.")
    batch_size: int = flag(8, "Images a step. Papers: 16.")
    lr: float = flag(0.01, "Learning rate, not scaled by the batch.")
    lr_schedule: str = flag(
        "cosine", "cosine: down to 0; step: x 0.1 at each of --lr_drops.", choices=("cosine", "step")
    )
    lr_drops: tuple[int, ...] = flag((), "Steps at which the learning rate drops, with --lr_schedule=step.")
    warmup_steps: int = flag(50, "Steps in which the learning rate rises from 0. Papers: 100.")
    weight_decay: float = flag(1e-4, "L2 coefficient, as PyTorch's SGD has it.")
    seed: int = flag(0, "Seed of weights, order and views: the same seed repeats the run.")
    record_every: int = flag(100, "Steps between rows of metrics.csv.")
    eval_every: int = flag(
        0, "Steps between evaluations, a multiple of --record_every; 0: at the end only.", about=FREE
    )
    checkpoint_every: int = flag(500, "Steps between checkpoints.", about=FREE)
    max_steps: int = flag(0, "Stop at this step, to go on later; 0: at --steps.", about=FREE)
    resume: bool = flag(True, "Go on from the last checkpoint in --output.", about=FREE)
    output: str = flag(
        "", "Folder of the results. '': a folder named after the command, in the run.", about=FREE, path=True
    )

    FOLDER: ClassVar[str] = "output"
    ENLARGE: ClassVar[bool] = True  # images smaller than the canvas to fill it; else they keep their own size
    NAME: ClassVar[str] = ""  # of the command, and of the output folder without --output

    def __post_init__(self):
        command.check_values(self)
        self.require_lines()
        for name in ("encoder", "dataset"):
            if not getattr(self, name):
                raise ConfigError(f"--{name} has no default: name one; --help says what it takes")
        command.require(self, 0 < self.labels <= 100, "labels", "is a percentage, more than 0 and at most 100")
        command.require(self, 0 <= self.max_bad_fraction <= 1, "max_bad_fraction", "lies between 0 and 1")
        divisible = self.image_size > 0 and self.image_size % 32 == 0
        command.require(self, divisible, "image_size", "is a multiple of 32, the stride of the encoder's last maps")
        command.require(self, self.scale_min > 0, "scale_min", "is more than 0")
        command.require(
            self, self.scale_max >= self.scale_min, "scale_max", f"is at least --scale_min={self.scale_min:g}"
        )
        for name in ("steps", "lr", "record_every", "checkpoint_every"):
            command.require(self, getattr(self, name) > 0, name, "is more than 0")
        for name in ("warmup_steps", "weight_decay", "eval_every", "max_steps"):
            command.require(self, getattr(self, name) >= 0, name, "is 0 or more")
        command.require(self, self.batch_size >= 2, "batch_size", "is at least 2, whose images BatchNorm compares")
        command.require(self, 0 <= self.seed < 2**31, "seed", "is 0 or more and less than 2^31")
        ascending = list(self.lr_drops) == sorted(self.lr_drops) and min(self.lr_drops, default=0) >= 0
        command.require(self, ascending, "lr_drops", "lists steps from 0 up in ascending order")
        if self.lr_drops and self.lr_schedule != "step":
            raise ConfigError(f"--lr_drops needs --lr_schedule=step; got --lr_schedule={self.lr_schedule}")
        if self.eval_every % self.record_every:
            raise ConfigError(
                f"--eval_every is a multiple of --record_every={self.record_every}; got {self.eval_every}"
            )
        if self.init not in ("encoder", "random") and not self.init.endswith(".keras"):
            raise ConfigError(f"--init is encoder, random or a .keras file; got {self.init!r}")

    def resolved(self):
        """Returns these settings with the output filled in.

        Raises:
          ConfigError: --encoder is not a run folder.
        """
        output = self.output or str(Path(self.encoder, f"{self.NAME}-{Path(self.init).stem}-{self.labels:g}"))
        settings = dataclasses.replace(self, output=output)
        settings.encoder_config()
        return settings

    def encoder_config(self):
        """Returns the config of the run whose encoder is transferred; an output that has begun has its own copy.

        Raises:
          ConfigError: --encoder is not a run folder.
        """
        begun = Path(self.output, ENCODER_FLAGS)
        if begun.exists():
            return read(begun)
        config = run_folder.recorded(self.encoder)
        if config is None:
            raise ConfigError(
                f"--encoder={self.encoder} is to be a run folder, as moco_tf.train writes it, with config.flags"
            )
        if config.channels != 3:
            raise ConfigError(
                f"--encoder={self.encoder} is of images in colour here, --channels=3; the run has {config.channels}: "
                "detection and segmentation read annotated images, which are"
            )
        return config

    @classmethod
    def read(cls, path):
        """Reads the settings from a flag file, as `flag_lines` writes it."""
        program = f"moco_tf.transfer.{cls.NAME}"
        try:
            return command.parse(cls, program, [f"--flagfile={Path(path).absolute()}"])
        except ConfigError as error:
            raise ConfigError(f"{path} does not hold flags of {program}: {error}") from None
