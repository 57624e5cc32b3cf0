"""Shuffling BN: BatchNorm statistics per group of g images, and keys that change their group.

Legend: B images in a global batch, N on one rank, g in a BN group, W ranks. A group on one device stands for
one of the paper's GPUs. Two forms that agree to rounding: `encode_by_group`, one forward per group, is the
truth; `set_bn_group` is one forward in which only BatchNorm works group by group, on slices of the batch
(statistics over a (G, g, H, W, C) view took 6 to 8 times as long as the native kernel on slices, on a CPU).
Source: MoCo, part 3.3, "Shuffling BN".
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from timm.layers.norm_act import BatchNormAct2d
from torch import Tensor, nn
from torch.nn.functional import batch_norm

from linerate.shards.errors import UserError
from linerate.train.collectives import exchange_rows, gather_rows
from linerate.train.sync_bn import sync_batch_norm


class GroupedBatchNorm(nn.modules.batchnorm._BatchNorm):
    """BatchNorm with statistics per group of `bn_group` images while training.

    Running statistics move once per batch, towards the mean over its groups; `num_batches_tracked` stays:
    with a fixed momentum nothing reads it, and it costs one operation a layer.
    """

    bn_group: int | None = None
    """g: images per group; None: the whole batch."""
    part: int = 0
    """Which micro-batch of `num_parts` comes next, where one batch arrives in parts of equal size."""
    num_parts: int = 1
    sync_ranks: int = 1
    """Ranks that share their statistics, where bn_group is None."""

    def _check_input_dim(self, input: Tensor) -> None:
        if input.ndim not in (2, 3, 4):
            raise ValueError(f"expected (N, C), (N, C, L) or (N, C, H, W), got {tuple(input.shape)}")

    def forward(self, input: Tensor) -> Tensor:
        self._check_input_dim(input)
        if not self.training:
            return self._normalise(input, 0.0)
        groups = self._groups(input)
        shares = running_shares(
            self.momentum or 0.0, part=self.part, parts=self.num_parts, groups=len(groups)
        )
        if len(groups) == 1:
            return self._normalise(input, shares[0]) if self.sync_ranks == 1 else self._sync(input, shares[0])
        return torch.cat([self._normalise(x, share) for x, share in zip(groups, shares, strict=True)])

    def _groups(self, input: Tensor) -> tuple[Tensor, ...]:
        size = self.bn_group or len(input)
        if len(input) % size:
            raise UserError(
                f"{len(input)} images on a rank do not divide into BN groups of {size}; give a bn_group that "
                f"divides {len(input)}, or another global_batch"
            )
        return (input,) if size == len(input) else torch.split(input, size)

    def _sync(self, input: Tensor, share: float) -> Tensor:
        return sync_batch_norm(
            input,
            self.running_mean,
            self.running_var,
            self.weight,
            self.bias,
            share=share,
            eps=self.eps,
            world_size=self.sync_ranks,
        )

    def _normalise(self, input: Tensor, share: float) -> Tensor:
        training = self.training or self.running_mean is None
        mean, var, weight, bias = self.running_mean, self.running_var, self.weight, self.bias
        return batch_norm(input, mean, var, weight, bias, training, share, self.eps)


class GroupedBatchNormAct(GroupedBatchNorm):
    """The same with timm's activation behind it."""

    drop: nn.Module
    act: nn.Module

    def forward(self, input: Tensor) -> Tensor:
        return self.act(self.drop(super().forward(input)))  # type: ignore[no-any-return]


_GROUPED: dict[type, type[GroupedBatchNorm]] = {
    nn.BatchNorm1d: GroupedBatchNorm,
    nn.BatchNorm2d: GroupedBatchNorm,
    BatchNormAct2d: GroupedBatchNormAct,
}


def running_shares(momentum: float, *, part: int, parts: int, groups: int) -> list[float]:
    """What each group moves the running statistics by, so that all of a batch's groups weigh the same.

    Updates follow one another, so the first must weigh more than the last: after all of them the old value
    has weight 1 - momentum and every group momentum / (parts x groups).
    """
    num, first = parts * groups, part * groups
    each = momentum / num
    return [each / (1.0 - each * (num - 1 - index)) for index in range(first, first + groups)]


def set_bn_group(encoder: nn.Module, bn_group: int | None, *, sync_ranks: int = 1) -> None:
    """Let every BatchNorm of the encoder use statistics per group of bn_group images while training.

    sync_ranks: with a bn_group of None, the ranks over whose images they are taken. Parameters, buffers and
    their names stay. Raises UserError for a kind of BatchNorm that is not known, and where both are given.
    """
    if bn_group is not None and sync_ranks > 1:
        raise UserError(
            f"bn_group={bn_group} and BN statistics over {sync_ranks} ranks are two answers to one question; "
            "leave one out"
        )
    for name, module in encoder.named_modules():
        if type(module) in _GROUPED:
            # A new class, not a new module: hooks, names and optimizer state keep pointing at it.
            module.__class__ = _GROUPED[type(module)]
        elif isinstance(module, nn.modules.batchnorm._BatchNorm) and not isinstance(module, GroupedBatchNorm):
            raise UserError(
                f"{name} is a {type(module).__name__}, for which there are no BN groups; "
                f"choose an encoder with {', '.join(sorted(kind.__name__ for kind in _GROUPED))}"
            )
        if isinstance(module, GroupedBatchNorm):
            module.bn_group, module.sync_ranks = bn_group, sync_ranks


def bn_modules(encoder: nn.Module) -> Iterator[GroupedBatchNorm]:
    """The grouped BatchNorms of an encoder."""
    return (module for module in encoder.modules() if isinstance(module, GroupedBatchNorm))


def set_part(modules: Iterable[GroupedBatchNorm], part: int, num_parts: int) -> None:
    """Say which of num_parts equal micro-batches comes next, so that the parts count as one batch."""
    for module in modules:
        module.part, module.num_parts = part, num_parts


def encode_by_group(encoder: nn.Module, images: Tensor, *, bn_group: int) -> Tensor:
    """(N, C) from one forward per group: the plain form, bound by launches where groups are small."""
    modules, groups = list(bn_modules(encoder)), torch.split(images, bn_group)
    outputs = []
    for part, group in enumerate(groups):
        set_part(modules, part, len(groups))
        outputs.append(encoder(group))
    set_part(modules, 0, 1)
    return torch.cat(outputs)


@dataclass(frozen=True, kw_only=True)
class Exchange:
    """Images that change their rank."""

    send: list[int]
    """Images for each rank."""
    receive: list[int]
    """Images from each rank."""
    place: Tensor
    """(N,) int64 on the device: what arrives, sorted by its rank, in the order of the shuffled batch."""


@dataclass(frozen=True, kw_only=True)
class Route:
    """Where the images of one key forward go: what the host has drawn for it, on the device."""

    rows: Tensor
    """(N,) int64: this rank's images in the order in which they are encoded, or sent."""
    place_of: Tensor
    """(B,) int64: the row of the shuffled keys in which each image's key lies."""
    exchange: Exchange | None = None
    """None: every image stays on its rank."""


@dataclass(frozen=True, kw_only=True)
class KeyShuffle:
    """Which key goes to which place, as a pure function of (seed, step) for the global batch."""

    seed: int = 0
    block: int | None = None
    """Images among which keys change places; None: the global batch. Does not depend on the world size."""
    enabled: bool = True
    """Without it every image keeps its place: the ablation."""
    rank: int = 0
    world_size: int = 1

    def permutation(self, step: int, *, global_batch: int) -> Tensor:
        """(B,) int64 on the CPU: place i of the shuffled batch holds image permutation[i]."""
        block = self.block or global_batch
        if global_batch % block:
            raise UserError(
                f"shuffle_block={block} does not divide the global batch {global_batch}; "
                "give a divisor of it, or None for the whole batch"
            )
        generator = torch.Generator().manual_seed(seed_of(self.seed, step))
        starts = range(0, global_batch, block)
        return torch.cat([start + torch.randperm(block, generator=generator) for start in starts])

    def encode(self, encode: Callable[[Tensor], Tensor], images: Tensor, *, step: int) -> Tensor:
        """(B, C) features of the global batch in the order of the images, the same bytes on every rank.

        images: this rank's (N, 3, S, S) uint8. Within a rank places change by an index; across ranks every
        image travels once, as uint8, and the features come back by the gather that enqueueing needs anyway.
        """
        return self.encode_along(self.route(step, num=len(images), device=images.device), encode, images)

    def route(self, step: int, *, num: int, device: torch.device) -> Route | None:
        """Where the images go at that step, num of them on each rank; None: every image keeps its place."""
        if not self.enabled:
            return None
        permutation = self.permutation(step, global_batch=num * self.world_size)
        place_of = to_device(permutation.argsort(), device)
        if self._stays_on_rank(permutation, num):
            mine = permutation[self.rank * num : (self.rank + 1) * num] - self.rank * num
            return Route(rows=to_device(mine, device), place_of=place_of)
        rows, exchange = self._route_across(permutation, num, device)
        return Route(rows=rows, place_of=place_of, exchange=exchange)

    def encode_along(self, route: Route | None, encode: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
        """As `encode`, by a route that was drawn before: nothing here depends on the step."""
        if route is None:
            return gather_rows(encode(images), world_size=self.world_size)
        shuffled = take_images(images, route.rows)
        if route.exchange is not None:
            about = route.exchange
            memory = shuffled.permute(0, 2, 3, 1)
            received = exchange_rows(memory, send=about.send, receive=about.receive)
            shuffled = received.index_select(0, about.place).permute(0, 3, 1, 2)
        return gather_rows(encode(shuffled), world_size=self.world_size)[route.place_of]

    def _stays_on_rank(self, permutation: Tensor, num: int) -> bool:
        # Decided by sizes alone, so that all ranks agree even where a draw happens to move nothing.
        return num % (self.block or len(permutation)) == 0

    def _route_across(self, permutation: Tensor, num: int, device: torch.device) -> tuple[Tensor, Exchange]:
        rank = self.rank
        source = permutation.div(num, rounding_mode="floor").view(self.world_size, num)
        # What each rank's places want from here, in the order of those places.
        wanted = [
            permutation.view(self.world_size, num)[to][source[to] == rank] for to in range(self.world_size)
        ]
        rows = to_device(torch.cat(wanted) - rank * num, device)
        send = [len(part) for part in wanted]
        receive = torch.bincount(source[rank], minlength=self.world_size).tolist()
        # Rows come sorted by source rank, each rank's in the order of the places that want them.
        place = source[rank].argsort(stable=True).argsort()
        return rows, Exchange(send=send, receive=receive, place=to_device(place, device))


def take_images(images: Tensor, rows: Tensor) -> Tensor:
    """images[rows] with channels_last strides kept, as one gather of whole images."""
    return images.permute(0, 2, 3, 1).index_select(0, rows).permute(0, 3, 1, 2)


def seed_of(*key: Any) -> int:
    """A generator's seed from what names its draws, as (seed, step): 63 bits, the same on every machine."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def to_device(index: Tensor, device: torch.device) -> Tensor:
    """Host -> device without making the host wait for the device."""
    return index.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else index
