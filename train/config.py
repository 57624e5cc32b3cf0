"""What one pretraining run is made of: all that changes its results, and the two parts that may not.

Legend: B images in a global batch, W ranks, K keys in the dictionary, C dimensions of a key.
Field names are unique over the whole tree, so that each is one flag: `--lr`, `--num-keys`, `--epochs`.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Literal

from linerate.pipeline.order import default_num_lanes
from linerate.pipeline.recipe import OneView, ViewRecipe, find_recipe
from linerate.shards.errors import UserError
from linerate.train.config_checks import at_least, divides
from linerate.train.config_speed import Speed, Watch

__all__ = [
    "Dictionary",
    "Loss",
    "Model",
    "Optim",
    "Schedule",
    "ShuffleBN",
    "Speed",
    "TrainConfig",
    "Views",
    "Watch",
]


@dataclass(frozen=True, kw_only=True)
class Views:
    """How two views of an image are drawn."""

    augmentation: Literal["v1", "v2", "v3"] = "v2"
    """The paper's augmentation: v1 (no blur), v2 (blur, jitter with p 0.8), v3 (asymmetric)."""
    size: int = 224
    """Side of a view, pixels."""
    crop_min: float | None = None
    """Smallest share of the image's area that a crop may take; None: the augmentation's own."""
    blur: bool = True
    """Whether an augmentation that has blur uses it (at 32 pixels it does harm)."""
    backend: Literal["dali", "torch", "webdataset", "ffcv", "synthetic"] = "dali"
    """What makes the views: dali and torch make the same ones; webdataset and ffcv have an order and random
    numbers of their own, so a resumed run differs; synthetic is noise, for timing."""

    def __post_init__(self) -> None:
        at_least("size", self.size, 8)
        if self.crop_min is not None and not 0 < self.crop_min <= 1:
            raise UserError(f"crop_min={self.crop_min} is no share of an area; give one in (0, 1]")

    def recipe(self) -> ViewRecipe:
        """The augmentation with this size and these exceptions, as the pipeline takes it."""
        recipe = find_recipe(self.augmentation, size=self.size)
        return dataclasses.replace(recipe, query=self._view(recipe.query), key=self._view(recipe.key))

    def _view(self, view: OneView) -> OneView:
        if self.crop_min is not None:
            view = dataclasses.replace(view, crop_scale=(self.crop_min, view.crop_scale[1]))
        return view if self.blur else dataclasses.replace(view, blur_probability=0.0)


@dataclass(frozen=True, kw_only=True)
class Model:
    """The encoder f: a backbone and a projection head to C dimensions."""

    encoder: str = "resnet50"
    """Backbone: tiny-resnet, resnet18, resnet50, ... or any timm name."""
    dim: int = 128
    """C: dimensions of a query and a key."""
    head: Literal["linear", "mlp"] = "linear"
    """Projection: linear (v1) or mlp, with one hidden layer (v2)."""
    stem: Literal["imagenet", "cifar"] = "imagenet"
    """First layers: 7x7 stride 2 and max-pool, or 3x3 stride 1 for images of some 32 pixels."""
    ema_momentum: float = 0.999
    """m: theta_k <- m theta_k + (1 - m) theta_q."""

    def __post_init__(self) -> None:
        at_least("dim", self.dim, 1)
        if not 0 <= self.ema_momentum < 1:
            raise UserError(
                f"ema_momentum={self.ema_momentum} must be in [0, 1): at 1 the key encoder never learns; "
                "the paper's is 0.999"
            )


@dataclass(frozen=True, kw_only=True)
class Dictionary:
    """The keys that queries are contrasted with."""

    dictionary: Literal["queue", "end-to-end", "memory-bank"] = "queue"
    """queue: keys of past batches by a momentum encoder (MoCo); end-to-end: the batch itself, the gradient
    flows through the keys; memory-bank: one representation per sample, K drawn a step (InstDisc)."""
    num_keys: int = 65536
    """K: keys in the queue, or drawn from the bank; any number, it need not be a multiple of the batch."""
    queue_dtype: Literal["fp32", "bf16"] = "fp32"
    """What the queue stores; bf16 halves its memory and its reading."""
    bank_loss: Literal["infonce", "nce"] = "infonce"
    """The memory bank's loss; nce is InstDisc's, with Z estimated once from the first batch."""
    bank_momentum: float = 0.5
    """v <- normalize(momentum v + (1 - momentum) q): the memory bank's, on the sample's representation."""

    def __post_init__(self) -> None:
        at_least("num_keys", self.num_keys, 1)
        if not 0 <= self.bank_momentum < 1:
            raise UserError(
                f"bank_momentum={self.bank_momentum} must be in [0, 1): at 1 the bank never learns; "
                "InstDisc's is 0.5"
            )
        if self.bank_loss == "nce" and self.dictionary != "memory-bank":
            raise UserError(
                f"bank_loss=nce is a loss of the memory bank, not of dictionary={self.dictionary}; "
                "give --dictionary memory-bank, or --bank-loss infonce"
            )


@dataclass(frozen=True, kw_only=True)
class Loss:
    """InfoNCE."""

    temperature: float = 0.07
    """tau: the logits are divided by it."""
    symmetric: bool = False
    """Whether both views are queries and keys of each other, the loss being the mean of the two."""

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise UserError(f"temperature={self.temperature} must be above 0; v1 has 0.07, v2 0.2")


@dataclass(frozen=True, kw_only=True)
class ShuffleBN:
    """Which images share BatchNorm statistics, and among which the keys are permuted."""

    bn_group: int = 32
    """g: images that share BN statistics (the paper's is the batch of one of its GPUs)."""
    shuffle: bool = True
    """Whether keys are permuted among the groups; without it the encoder cheats (paper, A.9).
    --shuffle-bn on and off say the same."""
    shuffle_block: int | None = None
    """Images among which keys change places; None: the global batch, on however many ranks it lies."""
    sync_bn: bool = False
    """Whether all ranks' images share BN statistics (SyncBN); with --no-shuffle and the global batch as
    --bn-group. Two small collectives a layer."""

    def __post_init__(self) -> None:
        at_least("bn_group", self.bn_group, 1)


@dataclass(frozen=True, kw_only=True)
class Optim:
    """SGD, whose weight decay acts on all parameters, BN and biases too, as in the reference; or LARS."""

    optimizer: Literal["sgd", "lars"] = "sgd"
    """sgd; lars, for large batches: no weight decay and no trust ratio for BN and biases, as in v3."""
    global_batch: int = 256
    """B: images of one step over all ranks."""
    lr: float = 0.03
    """Learning rate at the start."""
    sgd_momentum: float = 0.9
    """Momentum of SGD and of LARS."""
    weight_decay: float = 1e-4
    """L2 penalty."""
    trust_coefficient: float = 0.001
    """lars: a matrix moves by lr x this x its norm, along its gradient."""

    def __post_init__(self) -> None:
        at_least("global_batch", self.global_batch, 2)
        if not self.lr > 0:
            raise UserError(f"lr={self.lr} must be above 0; the paper's is 0.03 at a batch of 256")
        if not 0 <= self.sgd_momentum < 1:
            raise UserError(f"sgd_momentum={self.sgd_momentum} must be in [0, 1); the paper's is 0.9")
        if self.weight_decay < 0:
            raise UserError(f"weight_decay={self.weight_decay} must not be negative; the paper's is 1e-4")
        if not self.trust_coefficient > 0:
            raise UserError(f"trust_coefficient={self.trust_coefficient} must be above 0; v3's is 0.001")


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """How long, and the learning rate over that time."""

    decay: Literal["step", "cosine", "exponential"] = "step"
    """step: x factor at milestones; cosine: half a cycle to 0; exponential: x factor each decay_steps."""
    epochs: int | None = 200
    """Length in epochs (a short last batch is dropped), or None where `iterations` counts."""
    iterations: int | None = None
    """Length in iterations, or None where `epochs` counts."""
    milestones: tuple[int, ...] = (120, 160)
    """step: the epochs from which the next decay holds."""
    factor: float = 0.1
    """step and exponential: what one decay multiplies by."""
    decay_steps: int = 62_500
    """exponential: iterations between two decays."""
    cosine_per: Literal["epoch", "step"] = "epoch"
    """cosine: stepped per epoch, as in the reference, or per iteration."""
    warmup_epochs: int = 0
    """Epochs over which the rate rises evenly from 0, iteration by iteration; a cosine begins after them."""
    ema_ramp: Literal["none", "cosine"] = "none"
    """cosine: m rises to 1 over the run, 1 - (1 - ema_momentum) (1 + cos) / 2 per iteration, as in v3."""

    def __post_init__(self) -> None:
        if (self.epochs is None) == (self.iterations is None):
            raise UserError(
                f"epochs={self.epochs} and iterations={self.iterations}: a run has exactly one length; "
                "set the other one to None"
            )
        at_least("epochs", self.epochs, 1)
        at_least("iterations", self.iterations, 1)
        at_least("decay_steps", self.decay_steps, 1)
        at_least("warmup_epochs", self.warmup_epochs, 0)
        if self.epochs is not None and self.warmup_epochs >= self.epochs:
            raise UserError(
                f"warmup_epochs={self.warmup_epochs} leaves nothing of epochs={self.epochs}; "
                "v3 warms up for 10 of 100"
            )
        if not 0 < self.factor <= 1:
            raise UserError(f"factor={self.factor} must be in (0, 1]; step has 0.1, exponential 0.9")
        if list(self.milestones) != sorted(set(self.milestones)):
            raise UserError(f"milestones={self.milestones} must rise from epoch to epoch, as 120 160")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One run. Everything but `speed` and `watch` changes its results."""

    recipe: str
    """The name of the recipe that it started from."""
    seed: int = 0
    """Seeds the encoder, the queue, the order, the draws and the permutations."""
    num_lanes: int | None = None
    """L: streams that a global batch is drawn from (divides B); None: what the pipeline derives from B."""
    views: Views = field(default_factory=Views)
    model: Model = field(default_factory=Model)
    dictionary: Dictionary = field(default_factory=Dictionary)
    loss: Loss = field(default_factory=Loss)
    bn: ShuffleBN = field(default_factory=ShuffleBN)
    optim: Optim = field(default_factory=Optim)
    schedule: Schedule = field(default_factory=Schedule)
    speed: Speed = field(default_factory=Speed)
    watch: Watch = field(default_factory=Watch)

    def __post_init__(self) -> None:
        batch, group, block = self.optim.global_batch, self.bn.bn_group, self.shuffle_block
        if self.bn.sync_bn and (group != batch or self.bn.shuffle):
            raise UserError(
                f"sync_bn=True has all {batch} images share BN statistics, bn_group={group} and "
                f"shuffle={self.bn.shuffle} have them in groups: give --bn-group {batch} --no-shuffle with "
                "it, or --no-sync-bn"
            )
        divides("bn_group", group, "global_batch", batch)
        if self.bn.shuffle:
            divides("shuffle_block", block, "global_batch", batch)
            divides("bn_group", group, "shuffle_block", block)
            if block < 2 * group:
                raise UserError(
                    f"shuffle_block={block} holds one BN group (bn_group={group}): keys cannot change it; "
                    f"give a bn_group of at most {block // 2}, or --no-shuffle for the ablation"
                )
        if self.num_lanes is not None:
            at_least("num_lanes", self.num_lanes, 1)
            divides("num_lanes", self.num_lanes, "global_batch", batch)
        if self.loss.symmetric and self.dictionary.dictionary == "memory-bank":
            raise UserError(
                "symmetric=True needs keys of both views, and a memory bank encodes none; "
                "give --no-symmetric, or another --dictionary"
            )
        self._check_micro_batch()

    def _check_micro_batch(self) -> None:
        size, group, about = self.speed.micro_batch, self.bn.bn_group, self.dictionary
        if size is None:
            return
        if size % group:
            below, above = size // group * group, -(-size // group) * group
            raise UserError(
                f"micro_batch={size} is no multiple of bn_group={group}: a group's statistics need all its "
                f"images at once; the nearest that are: {', '.join(str(n) for n in (below, above) if n)}"
            )
        if about.dictionary == "end-to-end" or about.bank_loss == "nce":
            why = (
                "the gradient goes through all keys of a batch"
                if about.bank_loss != "nce"
                else ("Z is estimated from all of the first batch")
            )
            raise UserError(
                f"micro_batch={size} cannot give the result of one batch here: {why}; leave it out, or take "
                "a smaller --global-batch, more ranks, or --dictionary queue"
            )

    @property
    def num_negatives(self) -> int:
        """Negatives of a query: K of the queue and the memory bank, B - 1 of end-to-end."""
        if self.dictionary.dictionary == "end-to-end":
            return self.optim.global_batch - 1
        return self.dictionary.num_keys

    @property
    def chance_loss(self) -> float:
        """The loss in nats where no key is told from another: ln(K + 1), of NCE about 1 more."""
        num = self.num_negatives
        if self.dictionary.bank_loss == "nce":
            return math.log1p(num) + num * math.log1p(1 / num)
        return math.log1p(num)

    def idle_fields(self) -> list[str]:
        """The fields that do nothing under a dictionary other than the queue, by reason, one line each.

        Under the queue those of the memory bank, where they were changed.
        """
        kind, told = self.dictionary.dictionary, []
        if kind == "end-to-end":
            told.append("num_keys: the keys are those of the global batch")
        if kind == "memory-bank":
            told.append("shuffle, shuffle_block: no key is encoded, all come from past batches")
        elif self.dictionary.bank_momentum != Dictionary.bank_momentum:
            told.append("bank_momentum: there is no memory bank")
        if kind != "queue":
            told.append("ema_momentum, queue_dtype: there is no queue with its momentum encoder")
        return told

    @property
    def shuffle_block(self) -> int:
        """Images among which keys change places: bn.shuffle_block, or the global batch."""
        return self.bn.shuffle_block or self.optim.global_batch

    @property
    def lanes(self) -> int:
        """L: num_lanes, or what the pipeline derives from the global batch."""
        return self.num_lanes or default_num_lanes(self.optim.global_batch)

    def rank_batch(self, world_size: int) -> int:
        """B / W. Raises UserError, with the nearest W that fit, where W ranks cannot share the batch."""
        fits = [w for w in range(1, self.optim.global_batch + 1) if self._fits(w)]
        if world_size in fits:
            rank_batch = self.optim.global_batch // world_size
            if self.speed.micro_batch is not None:
                divides("micro_batch", self.speed.micro_batch, "the batch of a rank", rank_batch)
            return rank_batch
        below = [w for w in fits if w < world_size][-1:]
        above = [w for w in fits if w > world_size][:1]
        raise UserError(
            f"global_batch={self.optim.global_batch} (whole groups of bn_group={self.bn.bn_group} on a rank, "
            f"num_lanes={self.lanes}) does not fit on {world_size} ranks; "
            f"the nearest that do: {', '.join(map(str, below + above))}"
        )

    def _fits(self, world_size: int) -> bool:
        batch = self.optim.global_batch
        return (
            batch % world_size == 0
            and (self.bn.sync_bn or (batch // world_size) % self.bn.bn_group == 0)
            and self.lanes % world_size == 0
        )
