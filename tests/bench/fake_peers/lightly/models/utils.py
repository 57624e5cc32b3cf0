import torch
from torch import Tensor, nn


def deactivate_requires_grad(model: nn.Module) -> None:
    model.requires_grad_(False)


@torch.no_grad()
def update_momentum(query: nn.Module, key: nn.Module, *, m: float) -> None:
    for mine, theirs in zip(key.parameters(), query.parameters(), strict=True):
        mine.lerp_(theirs, 1 - m)


def batch_shuffle(images: Tensor) -> tuple[Tensor, Tensor]:
    order = torch.randperm(len(images))
    return images[order], order


def batch_unshuffle(keys: Tensor, order: Tensor) -> Tensor:
    return keys[order.argsort()]
