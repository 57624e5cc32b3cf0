"""Named runs. A recipe is a function: its docstring is the command, the cost, the source and the result."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

from linerate.pipeline.host_memory import PHOTO, SampleSize
from linerate.shards.errors import UserError
from linerate.shards.terminal import nearest
from linerate.train.config import (
    Dictionary,
    Loss,
    Model,
    Optim,
    Schedule,
    ShuffleBN,
    TrainConfig,
    Views,
    Watch,
)


def in1m_v1() -> TrainConfig:
    """MoCo v1 on ImageNet-1M, ResNet-50.

    Command: linerate train in1m-v1 --shards IN1M --run runs/in1m-v1
    Cost: 1,000,800 iterations; about 53 h on the paper's 8 V100.
    Source: MoCo, part 4; reference main_moco.py. BN groups of 32 are the paper's 8 GPUs.
    Expected: linear probe 60.6 % top-1 (60.8 +- 0.2 over 5 runs of the reference). Not run here.
    """
    return TrainConfig(
        recipe="in1m-v1",
        views=Views(augmentation="v1"),
        watch=Watch(knn_epochs=10, checkpoint_steps=5000),
    )


def in1m_v2() -> TrainConfig:
    """MoCo v2 on ImageNet-1M, ResNet-50: MLP head, blur, temperature 0.2, cosine per epoch.

    Command: linerate train in1m-v2 --shards IN1M --run runs/in1m-v2
    Cost: 1,000,800 iterations; about 53 h on 8 V100.
    Source: MoCo v2; reference main_moco.py with --mlp --moco-t 0.2 --aug-plus --cos.
    Expected: linear probe 67.5 +- 0.1 % top-1 (5 runs of the reference). Not run here.
    """
    return dataclasses.replace(
        in1m_v1(),
        recipe="in1m-v2",
        views=Views(augmentation="v2"),
        model=Model(head="mlp"),
        loss=Loss(temperature=0.2),
        schedule=Schedule(decay="cosine", epochs=200),
    )


def in1m_v2_800ep() -> TrainConfig:
    """MoCo v2 on ImageNet-1M for 800 epochs.

    Command: linerate train in1m-v2-800ep --shards IN1M --run runs/in1m-v2-800ep
    Cost: 4,003,200 iterations, four times in1m-v2.
    Source: MoCo v2.
    Expected: linear probe 71.1 % top-1. Not run here.
    """
    return dataclasses.replace(
        in1m_v2(), recipe="in1m-v2-800ep", schedule=Schedule(decay="cosine", epochs=800)
    )


def in1m_v1_end_to_end() -> TrainConfig:
    """End-to-end instead of the queue: the batch of 1,024 is the dictionary, the gradient flows through it.

    Command: linerate train in1m-v1-end-to-end --shards IN1M --run runs/in1m-v1-end-to-end
    Cost: 250,200 iterations of 1,024 images; backward goes through the keys, too.
    Source: MoCo, parts 3.2 and 4.1, figure 3: K is the batch, lr is scaled linearly with it. 1,024 is the
    largest K that the paper's 8 GPUs of 32 GB held; --global-batch 256 or 512 with --scale-lr are its others.
    BN groups of 128 are its 8 GPUs.
    Expected: linear probe about that of the queue at K = 1,024, below 59.0 % (the queue's at 4,096). Not run
    here.
    """
    return dataclasses.replace(
        in1m_v1(),
        recipe="in1m-v1-end-to-end",
        dictionary=Dictionary(dictionary="end-to-end"),
        bn=ShuffleBN(bn_group=128),
        optim=Optim(global_batch=1024, lr=0.12),
    )


def in1m_v1_memory_bank() -> TrainConfig:
    """A memory bank instead of the queue, with InfoNCE: 65,536 of 1.28 M representations a step.

    Command: linerate train in1m-v1-memory-bank --shards IN1M --run runs/in1m-v1-memory-bank
    Cost: 1,000,800 iterations; 656 MB for the bank over all ranks, no second encoder.
    Source: MoCo, parts 3.2 and 4.1, figure 3; what it does not spell out (momentum 0.5, the bank's start) is
    InstDisc's.
    Expected: linear probe 58.0 % top-1. Not run here.
    """
    return dataclasses.replace(
        in1m_v1(),
        recipe="in1m-v1-memory-bank",
        dictionary=Dictionary(dictionary="memory-bank"),
    )


def in1m_v1_memory_bank_nce() -> TrainConfig:
    """A memory bank with NCE and 4,096 draws, which is InstDisc with MoCo's augmentation.

    Command: linerate train in1m-v1-memory-bank-nce --shards IN1M --run runs/in1m-v1-memory-bank-nce
    Cost: 1,000,800 iterations; 656 MB for the bank over all ranks, no second encoder.
    Source: MoCo, part 4.1: its reimplementation of InstDisc (54.0 % there).
    Expected: linear probe 54.3 % top-1. Not run here.
    """
    return dataclasses.replace(
        in1m_v1(),
        recipe="in1m-v1-memory-bank-nce",
        dictionary=Dictionary(dictionary="memory-bank", bank_loss="nce", num_keys=4096),
    )


def ig1b_v1() -> TrainConfig:
    """MoCo v1 on a billion images, counted in iterations: lr 0.12, x0.9 each 62,500.

    Command: linerate train ig1b-v1 --shards IG1B --run runs/ig1b-v1
    Cost: 1.25 M iterations of 1,024 images, about 1.4 epochs of 940 M; about 6 days on the paper's 64 GPUs.
    Source: MoCo, part 4. BN groups of 16 are the paper's 64 GPUs. 19 decays take effect: the last lr is
    0.01621.
    Expected: detection VOC07+12, R50-C4, AP 57.2. Not run here.
    """
    return TrainConfig(
        recipe="ig1b-v1",
        views=Views(augmentation="v1"),
        bn=ShuffleBN(bn_group=16),
        optim=Optim(global_batch=1024, lr=0.12),
        schedule=Schedule(decay="exponential", epochs=None, iterations=1_250_000, factor=0.9),
        watch=Watch(checkpoint_steps=5000),
    )


def cifar10() -> TrainConfig:
    """MoCo on CIFAR-10 with one GPU, ResNet-18 with a 3x3 stem: the anchor that one device can reach.

    Command: linerate train cifar10 --shards CIFAR10_TRAIN --knn-test CIFAR10_TEST --run runs/cifar10
    Cost: 19,400 iterations of 512 images of 32 pixels.
    Source: the reference's one-GPU notebook: lr 0.06 cosine, wd 5e-4, K 4096, m 0.99, tau 0.1, 8 BN groups;
    crops from 8 % of the area, no blur.
    Expected: kNN (k 200, T 0.1) on the 128-D queries 82.6 % at 200 epochs, 86.3 at 400, 88.7 at 800.
    Not run here.
    """
    return TrainConfig(
        recipe="cifar10",
        views=Views(augmentation="v2", size=32, crop_min=0.08, blur=False),
        model=Model(encoder="resnet18", stem="cifar", ema_momentum=0.99),
        dictionary=Dictionary(num_keys=4096),
        loss=Loss(temperature=0.1),
        bn=ShuffleBN(bn_group=64),
        optim=Optim(global_batch=512, lr=0.06, weight_decay=5e-4),
        schedule=Schedule(decay="cosine", epochs=200),
        watch=Watch(log_steps=20, checkpoint_steps=970, knn_epochs=5, knn_features="projection"),
    )


def cifar10_symmetric() -> TrainConfig:
    """cifar10 with the symmetric loss: both views are queries and keys of each other.

    Command: linerate train cifar10-symmetric --shards CIFAR10_TRAIN --knn-test CIFAR10_TEST --run DIR
    Cost: 19,400 iterations of 512 images of 32 pixels, each with two query and two key forwards.
    Source: the reference's one-GPU notebook with its symmetric loss. It sums the two directions at lr 0.06
    and wd 5e-4; ours is their mean, for which lr 0.12 and wd 2.5e-4 make the very same steps.
    Expected: kNN (k 200, T 0.1) on the 128-D queries 85.3 % at 200 epochs, 88.5 at 400, 89.7 at 800; linear
    probe 90.7 % for the last one. Not run here.
    """
    return dataclasses.replace(
        cifar10(),
        recipe="cifar10-symmetric",
        loss=Loss(temperature=0.1, symmetric=True),
        optim=Optim(global_batch=512, lr=0.12, weight_decay=2.5e-4),
    )


def demo() -> TrainConfig:
    """A small ResNet on small images: a result within minutes on two CPU cores.

    Command: linerate demo (which packs, trains and reports), or
    linerate train demo --shards SHARDS --run runs/demo
    Cost: 1,500 iterations of 64 images, some minutes on 2 CPU cores, less on a GPU.
    Source: none; chosen to learn fast on few images, not to reproduce a number. The short queue and the
    faster momentum fit a run of 1,500 steps; larger crops keep most of a 64-pixel image's figure in view.
    Expected: kNN 15 points or more above raw pixels and the untrained encoder on the demo's own images.
    """
    return TrainConfig(
        recipe="demo",
        views=Views(augmentation="v1", size=32, crop_min=0.3),
        model=Model(encoder="tiny-resnet-w16", stem="cifar", head="mlp", ema_momentum=0.995),
        dictionary=Dictionary(num_keys=2048),
        loss=Loss(temperature=0.07),
        bn=ShuffleBN(bn_group=32),
        optim=Optim(global_batch=64, lr=0.02, weight_decay=5e-4),
        schedule=Schedule(decay="cosine", epochs=None, iterations=1500, cosine_per="step"),
        watch=Watch(log_steps=20, checkpoint_steps=300, knn_epochs=4),
    )


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A named run and the data it was written for."""

    build: Callable[[], TrainConfig]
    """Makes the config."""
    num_images: int | None
    """Images of the data set that its source used; None: no particular one."""
    sample: SampleSize = PHOTO
    """The mean of that data set's images."""

    @property
    def title(self) -> str:
        """The first line of the recipe's docstring."""
        return (self.build.__doc__ or "").strip().splitlines()[0]


CIFAR_IMAGE = SampleSize(num_bytes=900, pixels=32 * 32)

RECIPES: dict[str, Recipe] = {
    "in1m-v1": Recipe(build=in1m_v1, num_images=1_281_167),
    "in1m-v2": Recipe(build=in1m_v2, num_images=1_281_167),
    "in1m-v2-800ep": Recipe(build=in1m_v2_800ep, num_images=1_281_167),
    "in1m-v1-end-to-end": Recipe(build=in1m_v1_end_to_end, num_images=1_281_167),
    "in1m-v1-memory-bank": Recipe(build=in1m_v1_memory_bank, num_images=1_281_167),
    "in1m-v1-memory-bank-nce": Recipe(build=in1m_v1_memory_bank_nce, num_images=1_281_167),
    "ig1b-v1": Recipe(build=ig1b_v1, num_images=940_000_000),
    "cifar10": Recipe(build=cifar10, num_images=50_000, sample=CIFAR_IMAGE),
    "cifar10-symmetric": Recipe(build=cifar10_symmetric, num_images=50_000, sample=CIFAR_IMAGE),
    "demo": Recipe(build=demo, num_images=None),
}


def find_recipe(name: str) -> Recipe:
    """The recipe of that name. Raises UserError with the nearest one."""
    if name not in RECIPES:
        raise nearest(name, list(RECIPES), what="recipe")
    return RECIPES[name]


def decide_lr(config: TrainConfig, *, recipe: TrainConfig, lr_given: bool, scale_lr: bool) -> TrainConfig:
    """The config with a learning rate that was decided on for its batch.

    lr_given: the user named `lr`; scale_lr: the recipe's lr times B / B of the recipe (Goyal et al.'s rule,
    as MoCo's 0.03 at 256 and 0.12 at 1024). Raises UserError for another batch without either, or with both.
    """
    lr = decided_lr(
        config.optim.lr if lr_given else None,
        batch=config.optim.global_batch,
        recipe=recipe.recipe,
        recipe_lr=recipe.optim.lr,
        recipe_batch=recipe.optim.global_batch,
        scale_lr=scale_lr,
    )
    return config if lr_given else dataclasses.replace(config, optim=dataclasses.replace(config.optim, lr=lr))


def decided_lr(
    lr: float | None, *, batch: int, recipe: str, recipe_lr: float, recipe_batch: int, scale_lr: bool
) -> float:
    """The learning rate for a batch, of training and of classifiers: lr, or the recipe's, scaled or not.

    lr: what the user named; None: nothing. Raises UserError as decide_lr.
    """
    scaled = recipe_lr * batch / recipe_batch
    if lr is not None and scale_lr:
        raise UserError(f"--lr {lr:g} and --scale-lr (which gives {scaled:g}) contradict; keep one of them")
    if scale_lr:
        return scaled
    if batch != recipe_batch and lr is None:
        raise UserError(
            f"global_batch={batch} is not the {recipe_batch} that lr={recipe_lr:g} of {recipe} "
            f"is for; decide: --scale-lr for {scaled:g} (linear in the batch), or --lr VALUE"
        )
    return recipe_lr if lr is None else lr
