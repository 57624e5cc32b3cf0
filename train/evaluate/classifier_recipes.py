"""How a classifier is trained on an encoder's features, or with the encoder: settings, and named recipes.

A recipe is a function: its docstring is the command, the source and what is expected of it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Literal

from linerate.shards.errors import UserError
from linerate.train.config import Schedule

Protocol = Literal["linear", "finetune"]


@dataclass(frozen=True, kw_only=True)
class ClassifierConfig:
    """All that decides what a classifier of given images and a given encoder becomes."""

    protocol: Protocol
    """linear: the backbone is frozen; finetune: it learns too."""
    recipe: str
    """The name of the recipe that it started from."""
    seed: int = 0
    """Seeds the classifier's weights, the order and the crops."""
    size: int = 224
    """Side of the images, pixels."""
    features: Literal["none", "centre-crop"] = "none"
    """centre-crop: the fast variant, on features of centre crops that are extracted once."""
    backend: Literal["dali", "torch"] = "dali"
    """What makes the training crops; both make the same ones."""
    global_batch: int
    """Images of one step over all ranks."""
    lr: float
    """Learning rate at the start."""
    sgd_momentum: float = 0.9
    weight_decay: float
    epochs: int
    """A short last batch is dropped."""
    decay: Literal["step", "cosine"]
    """step: x 0.1 at the milestones; cosine: half a cycle, epoch by epoch."""
    milestones: tuple[int, ...] = ()
    """step: the epochs from which the next decay holds."""
    bn_group: int | None = None
    """finetune: images that share BN statistics; None: a rank's batch."""
    label_share: float = 1.0
    """Share of the labelled training images that is used."""
    test_share: float | None = None
    """Share of the training images that is held out for testing; None: there are test shards."""

    def __post_init__(self) -> None:
        for name in ("global_batch", "epochs", "size", "bn_group"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"{name}={value} is too small; the least is 1")
        if not self.lr > 0:
            raise UserError(f"lr={self.lr:g} must be above 0")
        for name in ("label_share", "test_share"):
            value = getattr(self, name)
            if value is not None and not 0 < value <= 1:
                raise UserError(f"{name}={value:g} is no share; give a number above 0, and not above 1")
        if beyond := [epoch for epoch in self.schedule.milestones if epoch > self.epochs]:
            raise UserError(
                f"milestones {', '.join(map(str, beyond))} lie beyond the {self.epochs} epochs; give fewer "
                "--milestones, or more --epochs"
            )
        if self.test_share == 1:
            raise UserError("test_share=1 leaves nothing to learn from; give a share below 1, as 0.1")

    @property
    def schedule(self) -> Schedule:
        """The learning rate's course, as training has it."""
        return Schedule(decay=self.decay, epochs=self.epochs, milestones=self.milestones)

    def plain(self) -> dict[str, Any]:
        """As JSON holds it."""
        return {**asdict(self), "milestones": [*self.milestones]}


def linear_v1() -> ClassifierConfig:
    """The linear protocol of MoCo v1 and v2.

    Command: linerate eval linear RUN --train SHARDS --test SHARDS
    Cost: 100 epochs of 224 px crops through the frozen encoder; 8 to 12 h on 8 V100 in the reference.
    Source: MoCo 4.1; reference main_lincls.py.
    Expected: 60.6 % for in1m-v1 (60.8 +- 0.2 over 5 runs), 67.5 +- 0.1 for in1m-v2. Not run here.
    """
    return ClassifierConfig(
        protocol="linear",
        recipe="v1",
        global_batch=256,
        lr=30.0,
        weight_decay=0.0,
        epochs=100,
        decay="step",
        milestones=(60, 80),
    )


def linear_v3() -> ClassifierConfig:
    """The linear protocol of MoCo v3 for ResNets: lr 0.1 x batch / 256, cosine.

    Command: linerate eval linear RUN --train SHARDS --test SHARDS --recipe v3
    Source: moco-v3 main_lincls.py and README.
    Expected: R50 68.9, 72.8, 74.6 % after 100, 300, 1000 epochs of v3. Not run here.
    """
    return ClassifierConfig(
        protocol="linear",
        recipe="v3",
        global_batch=1024,
        lr=0.1 * 1024 / 256,
        weight_decay=0.0,
        epochs=90,
        decay="cosine",
    )


def finetune_in1m() -> ClassifierConfig:
    """End-to-end fine-tuning on ImageNet-1M.

    Command: linerate eval finetune RUN --train SHARDS --test SHARDS
    Source: MoCo A.7: lr 0.03, 100 epochs. Our own choice where our notes of the paper are silent: batch 256
    in BN groups of 32 (8 GPUs), weight decay 1e-4, x 0.1 at 70 and 90 epochs.
    Expected: 77.0 % (IN-1M), 77.3 (IG-1B), 76.5 from random weights. Not run here.
    """
    return ClassifierConfig(
        protocol="finetune",
        recipe="in1m",
        global_batch=256,
        lr=0.03,
        weight_decay=1e-4,
        epochs=100,
        decay="step",
        milestones=(70, 90),
        bn_group=32,
    )


def finetune_inat18() -> ClassifierConfig:
    """End-to-end fine-tuning on iNaturalist 2018.

    Command: linerate eval finetune RUN --train SHARDS --test SHARDS --recipe inat18
    Source: MoCo A.6: lr 0.025, 100 epochs; the rest as in in1m.
    Expected: 65.6 % (IN-1M), 65.8 (IG-1B), 66.1 supervised, 61.8 from random weights. Not run here.
    """
    return ClassifierConfig(
        protocol="finetune",
        recipe="inat18",
        global_batch=256,
        lr=0.025,
        weight_decay=1e-4,
        epochs=100,
        decay="step",
        milestones=(70, 90),
        bn_group=32,
    )


LINEAR_RECIPES: dict[str, Callable[[], ClassifierConfig]] = {"v1": linear_v1, "v3": linear_v3}
FINETUNE_RECIPES: dict[str, Callable[[], ClassifierConfig]] = {
    "in1m": finetune_in1m,
    "inat18": finetune_inat18,
}


def scaled_milestones(recipe: ClassifierConfig, epochs: int) -> tuple[int, ...]:
    """The recipe's milestones at the same shares of another number of epochs."""
    moved = {max(1, round(milestone * epochs / recipe.epochs)) for milestone in recipe.milestones}
    return tuple(sorted(moved))
