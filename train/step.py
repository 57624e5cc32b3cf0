"""One MoCo step, the only one: the loop and the benchmarks import it from here.

Legend: N images on one rank, B in the global batch, C dimensions of a key, K keys in the dictionary.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from linerate.train.collectives import gather_rows
from linerate.train.infonce import InfoNce
from linerate.train.moco import MoCo, unit_rows
from linerate.train.negatives import Lookup
from linerate.train.shuffle_bn import Route, to_device

__all__ = [
    "Gradients",
    "MoCo",
    "Recorded",
    "StepInputs",
    "StepMetrics",
    "compute_gradients",
    "train_step",
]


@dataclass(frozen=True)
class StepMetrics:
    """What a step tells; 0-d tensors on the device, detached. Reading one makes the host wait for it."""

    loss: Tensor
    """In nats, mean over this rank's queries; ln(K + 1) at chance, where the loss is InfoNCE."""
    top1: Tensor
    """Share of this rank's queries that rank their key above all negatives."""
    top5: Tensor
    """Share that rank it among the first five."""


@dataclass(frozen=True, kw_only=True)
class StepInputs:
    """All that differs from one step's gradients to the next one's: tensors on the device."""

    step: int
    """The number of the iteration: for a memory bank, which draws by it; nothing else may read it."""
    query_images: Tensor
    """(N, 3, S, S) uint8."""
    key_images: Tensor
    """(N, 3, S, S) uint8, the other view of the same images."""
    routes: list[Route | None]
    """The shuffle of each key forward."""
    position: Tensor | None
    """(B,) int64: the images' places in the data set; None: nobody asks for them."""


@dataclass(frozen=True, kw_only=True)
class Gradients:
    """What the forward and backward passes of a step leave behind."""

    metrics: StepMetrics
    lookups: list[Lookup]
    """One per direction, with its keys."""
    queries: Tensor
    """(N, C) unit rows, without gradient."""
    of_params: list[Tensor | None]
    """The gradient of each of `MoCo.query_params`."""


def _backward(loss: Tensor) -> None:
    loss.backward()  # type: ignore[no-untyped-call]


def train_step(
    moco: MoCo,
    query_images: Tensor,
    key_images: Tensor,
    optimizer: torch.optim.Optimizer,
    *,
    step: int,
    position: Tensor | None = None,
    micro_batch: int | None = None,
    autocast: Callable[[], AbstractContextManager[object]] = contextlib.nullcontext,
    backward: Callable[[Tensor], None] = _backward,
    recorded: Recorded | None = None,
) -> StepMetrics:
    """One iteration of Algorithm 1 on this rank's images; both encoders, SGD and the dictionary move on.

    query_images, key_images: (N, 3, S, S) uint8, two views of the same images in the same order.
    step: the number of the iteration over the whole run; with the seed it fixes the shuffle and the draws.
    position: (N,) int64 on the CPU, the images' places in the data set; only a memory bank asks for them.
    micro_batch: images that pass an encoder at once, where N are too many for the memory; the result is that
    of one batch, since all parts see the same dictionary and BN groups stay whole.
    autocast, backward: accelerate's, where there is one; the key encoder gets the same autocast.
    recorded: what runs both passes from a recording, as graphs.py does; None: they run as they are.
    Never reads the device. Source: MoCo, Algorithm 1; shuffling BN, part 3.3.
    """
    num_parts = moco.num_parts(len(query_images), micro_batch)
    inputs = _draw_inputs(moco, query_images, key_images, step=step, position=position)
    compute = partial(
        compute_gradients, moco, optimizer, num_parts=num_parts, autocast=autocast, backward=backward
    )
    found = compute(inputs) if recorded is None else recorded(compute, inputs)
    # What a schedule moves, lr and m, enters here and so is in no recording.
    optimizer.step()
    moco.update_key_encoder()
    # After the loss: a key enqueued before it would be its own negative.
    moco.dictionary.close(found.lookups, found.queries)
    return found.metrics


Recorded = Callable[[Callable[[StepInputs], Gradients], StepInputs], Gradients]
"""(what computes the gradients, of what) -> the gradients."""


def _draw_inputs(
    moco: MoCo, query_images: Tensor, key_images: Tensor, *, step: int, position: Tensor | None
) -> StepInputs:
    """What the host draws for a step, sent to the device."""
    # A permutation of its own for every key forward.
    num, turns = len(query_images), 2 if moco.symmetric else 1
    routes = [
        moco.shuffle.route(step * turns + turn, num=num, device=query_images.device)
        for turn in range(turns if moco.dictionary.encodes_keys else 0)
    ]
    return StepInputs(
        step=step,
        query_images=query_images,
        key_images=key_images,
        routes=routes,
        position=_gather_position(moco, position, query_images),
    )


def compute_gradients(
    moco: MoCo,
    optimizer: torch.optim.Optimizer,
    inputs: StepInputs,
    *,
    num_parts: int,
    autocast: Callable[[], AbstractContextManager[object]],
    backward: Callable[[Tensor], None],
) -> Gradients:
    """Both forwards, the loss and the backward pass; nothing moves but the running BN statistics.

    Free of draws and host reads, so that it can be recorded once and run again on other inputs.
    """
    directions = moco.directions(inputs.query_images, inputs.key_images)
    optimizer.zero_grad(set_to_none=True)
    lookups, queries, metrics = [], [], []
    for direction, (images, other_view) in enumerate(directions):
        route = inputs.routes[direction] if inputs.routes else None
        keys = moco.key_stream.start(
            partial(_look_up_keys, moco, other_view, route, num_parts=num_parts, autocast=autocast)
        )
        contrast = None
        for part, some in enumerate(images.chunk(num_parts)):
            is_last = direction == len(directions) - 1 and part == num_parts - 1
            with _unsynced(moco, is_last=is_last):
                with autocast():
                    projected = moco.encode_part(moco.query_forward, some, part, num_parts)
                if contrast is None:
                    lookup = _lookup(moco, inputs, len(images), keys=keys())
                    lookups.append(lookup)
                    contrast = moco.dictionary.open(lookup)
                query, found = moco.compare(projected, contrast, part * len(some))
                backward(_share(found.loss, of=num_parts * len(directions)))
            queries.append(query.detach())
            metrics.append(found)
    return Gradients(
        metrics=_mean_metrics(metrics),
        lookups=lookups,
        queries=queries[0] if len(queries) == 1 else torch.cat(queries),
        of_params=[param.grad for param in moco.query_params],
    )


def _lookup(moco: MoCo, inputs: StepInputs, num: int, *, keys: Tensor | None) -> Lookup:
    return Lookup(
        step=inputs.step,
        first=moco.shuffle.rank * num,
        num=num,
        temperature=moco.temperature,
        keys=keys,
        position=inputs.position,
    )


def _gather_position(moco: MoCo, position: Tensor | None, images: Tensor) -> Tensor | None:
    if not moco.dictionary.needs_position:
        return None
    if position is None:
        raise ValueError(f"a {type(moco.dictionary).__name__} needs the position of every image")
    return gather_rows(to_device(position, images.device), world_size=moco.shuffle.world_size)


def _look_up_keys(
    moco: MoCo,
    images: Tensor,
    route: Route | None,
    *,
    num_parts: int,
    autocast: Callable[[], AbstractContextManager[object]],
) -> Tensor | None:
    """(B, C) keys of the global batch, with a gradient only where the dictionary trains them."""
    if not moco.dictionary.encodes_keys:
        return None
    with torch.set_grad_enabled(moco.dictionary.trains_keys), autocast():
        encode = partial(_encode_keys, moco, num_parts=num_parts)
        return moco.shuffle.encode_along(route, encode, images)


def _unsynced(moco: MoCo, *, is_last: bool) -> AbstractContextManager[object]:
    """DDP would send the gradients of every part; the last one brings the sum."""
    forward = getattr(moco.query_forward, "_orig_mod", moco.query_forward)  # of torch.compile
    if is_last or not isinstance(forward, DistributedDataParallel):
        return contextlib.nullcontext()
    return forward.no_sync()


def _share(loss: Tensor, *, of: int) -> Tensor:
    return loss if of == 1 else loss / of


def _encode_keys(moco: MoCo, images: Tensor, *, num_parts: int) -> Tensor:
    parts = images.chunk(num_parts)
    encoded = [moco.encode_part(moco.key_forward, x, part, num_parts) for part, x in enumerate(parts)]
    return unit_rows(encoded[0] if num_parts == 1 else torch.cat(encoded))


def _mean_metrics(found: list[InfoNce]) -> StepMetrics:
    if len(found) == 1:
        return StepMetrics(found[0].loss.detach(), found[0].top1, found[0].top5)
    loss, top1, top5 = (torch.stack(values).mean() for values in zip(*found, strict=True))
    return StepMetrics(loss.detach(), top1, top5)
