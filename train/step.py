"""One MoCo step, the only one: the loop and the benchmarks import it from here.

Legend: N images on one rank, B in the global batch, C dimensions of a key, K keys in the dictionary.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize
from torch.nn.parallel import DistributedDataParallel

from linerate.shards.errors import UserError
from linerate.train.collectives import gather_rows
from linerate.train.ema import ema_update, parameter_list
from linerate.train.infonce import InfoNce
from linerate.train.negatives import KeyDictionary, Lookup
from linerate.train.shuffle_bn import KeyShuffle, bn_modules, set_bn_group, set_part, to_device


@dataclass(frozen=True)
class StepMetrics:
    """What a step tells; 0-d tensors on the device, detached. Reading one makes the host wait for it."""

    loss: Tensor
    """In nats, mean over this rank's queries; ln(K + 1) at chance, where the loss is InfoNCE."""
    top1: Tensor
    """Share of this rank's queries that rank their key above all negatives."""
    top5: Tensor
    """Share that rank it among the first five."""


class MoCo:
    """Both encoders, the dictionary, and what a step needs to know. All parameters stay float32.

    The key encoder starts as a copy of the query encoder and never gets a gradient; for a dictionary that has
    no encoder of its own, it is the query encoder.
    """

    def __init__(
        self,
        query_encoder: nn.Module,
        dictionary: KeyDictionary,
        *,
        temperature: float = 0.07,
        symmetric: bool = False,
        ema_momentum: float = 0.999,
        bn_group: int | None = None,
        shuffle: KeyShuffle | None = None,
    ) -> None:
        """bn_group: images that share BN statistics; None: a rank's batch. shuffle: None is on, seed 0.

        symmetric: both views are queries and keys of each other, and the loss is the mean of the two. Raises
        UserError where the dictionary encodes no keys.
        """
        if symmetric and not dictionary.encodes_keys:
            raise UserError(
                f"symmetric=True needs keys of both views, and a {type(dictionary).__name__} encodes none; "
                "give --no-symmetric, or another --dictionary"
            )
        self.query_encoder = query_encoder
        set_bn_group(query_encoder, bn_group)
        self.key_encoder = query_encoder
        if dictionary.has_key_encoder:
            self.key_encoder = copy.deepcopy(query_encoder).requires_grad_(False)
        self.query_encoder.train()
        self.key_encoder.train()
        self.dictionary, self.bn_group = dictionary, bn_group
        self.temperature, self.ema_momentum, self.symmetric = temperature, ema_momentum, symmetric
        self.shuffle = shuffle if shuffle is not None else KeyShuffle()
        # What the step calls: the loop puts the DDP-wrapped or compiled encoder here.
        self.query_forward: Callable[[Tensor], Tensor] = self.query_encoder
        self.key_forward: Callable[[Tensor], Tensor] = self.key_encoder
        # Collected once: walking 161 parameters and 53 BatchNorms each step costs as much as the update.
        self._query_bn, self._key_bn = (
            list(bn_modules(self.query_encoder)),
            list(bn_modules(self.key_encoder)),
        )
        self._query_params = parameter_list(self.query_encoder.parameters())
        self._key_params = parameter_list(self.key_encoder.parameters())

    def to(self, device: torch.device | str, *, channels_last: bool = True) -> MoCo:
        """Move everything, in place. Parameters stay the same objects, so an optimizer may exist already."""
        memory_format = torch.channels_last if channels_last else torch.contiguous_format
        for encoder in (self.query_encoder, self.key_encoder):
            encoder.to(device=device, memory_format=memory_format)  # type: ignore[call-overload]
        self.dictionary.to(device)
        return self

    def num_parts(self, num_images: int, micro_batch: int | None) -> int:
        """How many micro-batches make up the batch. Raises UserError where they would change the result."""
        size = micro_batch or num_images
        if size != num_images and self.dictionary.trains_keys:
            raise UserError(
                f"micro_batch={size}: end-to-end needs the gradient through all keys of the {num_images} "
                "images at once; leave micro_batch out, or give --dictionary queue"
            )
        group = self.bn_group or num_images
        if num_images % size or size % group:
            raise UserError(
                f"micro_batch={size} must divide the {num_images} images of a rank and be a multiple of "
                f"bn_group={group}; choose one that is"
            )
        return num_images // size

    def encode_part(
        self, forward: Callable[[Tensor], Tensor], images: Tensor, part: int, num_parts: int
    ) -> Tensor:
        """(n, C) of one of num_parts micro-batches; BN's running statistics count them as one batch."""
        if num_parts == 1:
            return forward(images)
        modules = self._query_bn if forward is self.query_forward else self._key_bn
        set_part(modules, part, num_parts)
        try:
            return forward(images)
        finally:
            set_part(modules, 0, 1)

    def directions(self, query_images: Tensor, key_images: Tensor) -> list[tuple[Tensor, Tensor]]:
        """(images of queries, images of their keys) of one step; symmetric, in the order of their keys."""
        one = (query_images, key_images)
        return [(key_images, query_images), one] if self.symmetric else [one]

    def update_key_encoder(self) -> None:
        """theta_k <- m theta_k + (1 - m) theta_q, where f_k is an encoder of its own."""
        if not self.dictionary.has_key_encoder:
            return
        ema_update(self._key_params, self._query_params, ema_momentum=self.ema_momentum)

    def state_dict(self) -> dict[str, Tensor]:
        """The encoders and the dictionary as one flat dict; tensors are references wherever they can be.

        Every rank calls it: what lies on several of them is complete on rank 0.
        """
        return self._encoder_state() | _prefixed("dictionary", self.dictionary.full_state())

    def own_state(self) -> dict[str, Tensor]:
        """What lies on this rank, as references."""
        return self._encoder_state() | _prefixed("dictionary", self.dictionary.state_dict())

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore what `state_dict` gave, on any number of ranks.

        Raises UserError where it is of another model, changing nothing.
        """
        prefix = "dictionary."
        theirs = {name.removeprefix(prefix): t for name, t in state.items() if name.startswith(prefix)}
        encoders = {name: t for name, t in state.items() if not name.startswith(prefix)}
        state = encoders | _prefixed("dictionary", self.dictionary.own_state(theirs))
        mine = self.own_state()
        for name in [*mine, *state]:
            here, there = mine.get(name), state.get(name)
            if here is None or there is None or here.shape != there.shape:
                raise UserError(
                    f"the checkpoint is of another model: {name} is {_shape(there)} there and {_shape(here)} "
                    "here; start with the encoder, head, dim and dictionary that wrote it"
                )
        with torch.no_grad():
            for name, tensor in mine.items():
                tensor.copy_(state[name])

    def _encoder_state(self) -> dict[str, Tensor]:
        state = _prefixed("query_encoder", self.query_encoder.state_dict())
        if self.dictionary.has_key_encoder:
            state |= _prefixed("key_encoder", self.key_encoder.state_dict())
        return state


def _prefixed(part: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"{part}.{name}": tensor for name, tensor in state.items()}


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
) -> StepMetrics:
    """One iteration of Algorithm 1 on this rank's images; both encoders, SGD and the dictionary move on.

    query_images, key_images: (N, 3, S, S) uint8, two views of the same images in the same order.
    step: the number of the iteration over the whole run; with the seed it fixes the shuffle and the draws.
    position: (N,) int64 on the CPU, the images' places in the data set; only a memory bank asks for them.
    micro_batch: images that pass an encoder at once, where N are too many for the memory; the result is that
    of one batch, since all parts see the same dictionary and BN groups stay whole.
    autocast, backward: accelerate's, where there is one; the key encoder gets the same autocast.
    Never reads the device. Source: MoCo, Algorithm 1; shuffling BN, part 3.3.
    """
    num_parts = moco.num_parts(len(query_images), micro_batch)
    directions = moco.directions(query_images, key_images)
    place = _gather_position(moco, position, query_images)
    optimizer.zero_grad(set_to_none=True)
    lookups, queries, metrics = [], [], []
    for direction, (images, other_view) in enumerate(directions):
        # A permutation of its own for every key forward.
        turn = step * len(directions) + direction
        keys = _look_up_keys(moco, other_view, turn=turn, num_parts=num_parts, autocast=autocast)
        lookup = Lookup(
            step=step,
            first=moco.shuffle.rank * len(images),
            num=len(images),
            temperature=moco.temperature,
            keys=keys,
            position=place,
        )
        contrast = moco.dictionary.open(lookup)
        for part, some in enumerate(images.chunk(num_parts)):
            is_last = direction == len(directions) - 1 and part == num_parts - 1
            with _unsynced(moco, is_last=is_last):
                with autocast():
                    projected = moco.encode_part(moco.query_forward, some, part, num_parts)
                query = _unit_rows(projected)
                found = contrast(query, part * len(some))
                backward(_share(found.loss, of=num_parts * len(directions)))
            queries.append(query.detach())
            metrics.append(found)
        lookups.append(lookup)
    optimizer.step()
    moco.update_key_encoder()
    # After the loss: a key enqueued before it would be its own negative.
    moco.dictionary.close(lookups, queries[0] if len(queries) == 1 else torch.cat(queries))
    return _mean_metrics(metrics)


def _gather_position(moco: MoCo, position: Tensor | None, images: Tensor) -> Tensor | None:
    if not moco.dictionary.needs_position:
        return None
    if position is None:
        raise ValueError(f"a {type(moco.dictionary).__name__} needs the position of every image")
    return gather_rows(to_device(position, images.device), world_size=moco.shuffle.world_size)


def _look_up_keys(
    moco: MoCo,
    images: Tensor,
    *,
    turn: int,
    num_parts: int,
    autocast: Callable[[], AbstractContextManager[object]],
) -> Tensor | None:
    """(B, C) keys of the global batch, with a gradient only where the dictionary trains them."""
    if not moco.dictionary.encodes_keys:
        return None
    with torch.set_grad_enabled(moco.dictionary.trains_keys), autocast():
        return moco.shuffle.encode(partial(_encode_keys, moco, num_parts=num_parts), images, step=turn)


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
    return _unit_rows(encoded[0] if num_parts == 1 else torch.cat(encoded))


def _unit_rows(projected: Tensor) -> Tensor:
    """L2-normalised, in float32 whatever autocast made of the projection (float64 stays)."""
    return normalize(projected.to(torch.promote_types(projected.dtype, torch.float32)))


def _mean_metrics(found: list[InfoNce]) -> StepMetrics:
    if len(found) == 1:
        return StepMetrics(found[0].loss.detach(), found[0].top1, found[0].top5)
    loss, top1, top5 = (torch.stack(values).mean() for values in zip(*found, strict=True))
    return StepMetrics(loss.detach(), top1, top5)


def _shape(tensor: Tensor | None) -> str:
    return "absent" if tensor is None else str(tuple(tensor.shape))
