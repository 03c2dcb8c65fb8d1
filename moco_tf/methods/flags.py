"""The flags of this package's methods, with their papers' values.

Imports nothing heavy, so that a wrong flag raises an error before TensorFlow loads. A user's own method has its
`Options` in its own file.
"""

import dataclasses
from types import MappingProxyType

from moco_tf import command, startup
from moco_tf.command import ConfigError
from moco_tf.recorded import flag


@dataclasses.dataclass(frozen=True)
class Head:
    """A projection head as MoCo v1 and v2 have it."""

    head: str = flag("mlp", "Projection head: linear (v1) or mlp (v2).", choices=("linear", "mlp"))


@dataclasses.dataclass(frozen=True)
class KeyEncoder:
    """A momentum encoder."""

    momentum: float = flag(
        0.999, "m of the key encoder, not the optimizer's: that is in --optimizer. v1, v2: 0.999, v3: 0.99."
    )
    momentum_schedule: str = flag(
        "constant",
        "cosine: --momentum rises to 1 over the run. v1, v2: constant, v3: cosine.",
        choices=("constant", "cosine"),
    )

    def check(self):
        command.require(self, 0 <= self.momentum <= 1, "momentum", "lies between 0 and 1")


@dataclasses.dataclass(frozen=True)
class Negatives:
    """A dictionary of K negatives."""

    queue_size: int = flag(65536, "K: keys in the queue, or drawn from the memory bank, as negatives. v1, v2: 65536.")

    def check(self):
        command.require(self, self.queue_size > 0, "queue_size", "is more than 0")


@dataclasses.dataclass(frozen=True)
class BNGroups:
    """BatchNorm in groups of the batch."""

    bn_groups: int = flag(
        0,
        "Equal parts of the global batch that BatchNorm normalises apart, a multiple of the replicas; 0: as many "
        "as the run began with, at first one a replica. v1, v2: 8, their 8 GPUs.",
    )

    def check(self):
        command.require(self, self.bn_groups >= 0, "bn_groups", "is 0 or more")
        groups = self.bn_groups or 1
        if self.batch_size % groups or (groups > 1 and self.batch_size // groups < 2):
            raise ConfigError(
                f"each of the {groups} BN groups takes the same number of images, at least 2; "
                f"--batch_size={self.batch_size} does not: choose a multiple of {groups} from {2 * groups} up, "
                "or other --bn_groups"
            )


@dataclasses.dataclass(frozen=True)
class ShuffleBN(BNGroups):
    """Keys that are encoded in another order than queries."""

    shuffle_bn: bool = flag(
        True, "Encode keys in another order than queries; has an effect with several BN groups or replicas."
    )


VITS = ("vit_tiny", "vit_small", "vit_base")
FRAMES = ("in_batch", "queue")  # of CPC and SimCSE
FRAMES_OF_CMC = (*FRAMES, "memory_bank")
TILES = 3  # along each side of an image, of position and jigsaw
LOSSES = ("infonce", "supcon", "supcon_in")  # of MoCo
LOSSES_OF_BANKS = ("infonce", "nce")
LOSSES_OF_PAIRS = ("infonce", "nt_xent")  # of end-to-end contrast
SHARED = ("encoder", "trunk", "none")
POSITIVES_FROM = ("keys", "batch", "batch_and_queue")


class OfFrames:
    """Flags that some of a task's frames use."""

    FRAMES_OF = MappingProxyType(dict.fromkeys(("queue_size", "momentum", "momentum_schedule"), ("queue",)))

    def uses(self, name):
        return super().uses(name) and self.frame in self.FRAMES_OF.get(name, (self.frame,))


def loss_flag(*names):
    """Returns the --loss flag of a method or task with these values; the first is the default."""
    return flag(
        names[0],
        "infonce: a softmax over key and negatives. nce, with memory_bank: noise-contrastive estimation, as its paper "
        "has it. nt_xent, with end_to_end: each view among all others, SimCLR's. supcon, with moco and "
        "--positives_from: all positives in each denominator (SupCon's L_out, arXiv 2004.11362); supcon_in: their sum "
        "inside the logarithm (its L_in).",
        choices=names,
    )


@dataclasses.dataclass(frozen=True)
class MoCo(ShuffleBN, Head, KeyEncoder, Negatives):
    """MoCo v1 and v2."""

    loss: str = loss_flag(*LOSSES)
    symmetric: bool = flag(
        False, "Each view is query once, and the losses are summed: the authors' CIFAR-10 demo. v1, v2: off."
    )
    mask_siblings: bool = flag(
        False, "Leave the queue's keys of a query's own record out of its negatives, by an id beside each key."
    )
    positives_from: str = flag(
        "keys",
        "What a query looks for. keys: its own views' keys, among the queue's; batch: all keys of its own thing in "
        "the batch, among all others of batch and queue; batch_and_queue: those of the queue as well. v1, v2: keys.",
        choices=POSITIVES_FROM,
    )

    def check(self):
        if self.loss != "infonce" and self.positives_from == "keys":
            raise ConfigError(
                f"--loss={self.loss} is of several positives of a query; got --positives_from=keys: take batch, or "
                "--loss=infonce"
            )
        if self.mask_siblings and self.positives_from != "keys":
            raise ConfigError(
                f"--positives_from={self.positives_from} makes no negatives of a query's own thing, with or without "
                "--mask_siblings: leave that out"
            )


@dataclasses.dataclass(frozen=True)
class MoCoV3(KeyEncoder):
    """MoCo v3."""

    loss: str = loss_flag("infonce")
    token_dropout: float = flag(
        0.0,
        "Share of the patches that a ViT's queries leave out, drawn anew for each view; keys see all. FLIP (arXiv "
        "2212.00794): 0.5. v3: 0.",
    )

    def check(self):
        command.require(self, 0 <= self.token_dropout < 1, "token_dropout", "is a share, from 0 to less than 1")
        if self.token_dropout and not self.is_vit:
            raise ConfigError(
                f"--token_dropout leaves out patches of a ViT, and --arch={self.arch} has none; got "
                f"{self.token_dropout:g}: leave it out, or take --arch=vit_tiny"
            )


@dataclasses.dataclass(frozen=True)
class Bank:
    """A memory bank's keys, and the loss that tells a query's own key from its negatives."""

    bank_momentum: float = flag(0.5, "Share of a record's key that stays when the record is seen. Its paper: 0.5.")
    loss: str = loss_flag(*LOSSES_OF_BANKS)

    def check(self):
        command.require(self, 0 <= self.bank_momentum <= 1, "bank_momentum", "lies between 0 and 1")

    def bank_bytes(self, size):
        """Returns the number of bytes that the memory bank of `size` images takes in each replica."""
        return size * self.dim * 4

    def check_bank(self, size):
        """Raises if `size` images leave too few outside a batch, or their bank takes over a third of the memory."""
        if self.loss == "infonce" and self.queue_size > size - self.batch_size:
            raise ConfigError(
                f"--queue_size counts negatives from other images than the batch's, at most {size - self.batch_size} "
                f"of {size} with --batch_size={self.batch_size}; got {self.queue_size}"
            )
        needed = self.bank_bytes(size) * max(1, self.virtual_replicas)
        there = startup.memory()
        if 3 * needed > there:  # a checkpoint's bank is read beside the model's own, and the rest needs memory too
            raise ConfigError(
                f"a memory bank has --dim={self.dim} numbers for each of {size} images, in all "
                f"{needed / 1e9:.3g} GB, more than a third of this machine's {there / 1e9:.3g} GB (a checkpoint is "
                "read beside it): choose a smaller --dim, or --method=moco, whose queue does not grow with the data"
            )


@dataclasses.dataclass(frozen=True)
class MemoryBank(BNGroups, Head, Negatives, Bank):
    """The memory bank."""

    def check(self):
        for name, usual in (("positives", 1), ("small_views", 0)):
            if (given := getattr(self, name, usual)) != usual:
                raise ConfigError(
                    f"--{name} sets further views, which a memory bank does not use: its keys come from the bank; got "
                    f"{given}: leave it out"
                )
        if self.xla == "on" and self.loss == "infonce":
            raise ConfigError("XLA has no way to draw a memory bank's negatives: --xla is auto or off; got on")


@dataclasses.dataclass(frozen=True)
class EndToEnd(ShuffleBN, Head):
    """End-to-end contrast, and SimCLR."""

    shared: str = flag(
        "encoder",
        "What queries and keys share: encoder, they have one; trunk, each has a head of its own; none, two encoders. "
        "v1's paper allows all; SimCLR: encoder.",
        choices=SHARED,
    )
    loss: str = loss_flag(*LOSSES_OF_PAIRS)


METHODS = {"moco": MoCo, "moco_v3": MoCoV3, "memory_bank": MemoryBank, "end_to_end": EndToEnd}
