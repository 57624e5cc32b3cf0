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
from linerate.train.ema import FlatEma, parameter_list
from linerate.train.infonce import InfoNce, infonce
from linerate.train.key_queue import KeyQueue
from linerate.train.shuffle_bn import KeyShuffle, bn_modules, set_bn_group, set_part


@dataclass(frozen=True)
class StepMetrics:
    """What a step tells; 0-d tensors on the device, detached. Reading one makes the host wait for it."""

    loss: Tensor
    """InfoNCE in nats, mean over this rank's queries; ln(K + 1) at chance."""
    top1: Tensor
    """Share of this rank's queries that rank their key above all negatives."""
    top5: Tensor
    """Share that rank it among the first five."""


class MoCo:
    """Both encoders, the dictionary, and what a step needs to know. All parameters stay float32.

    The key encoder starts as a copy of the query encoder and never gets a gradient.
    """

    def __init__(
        self,
        query_encoder: nn.Module,
        dictionary: KeyQueue,
        *,
        temperature: float = 0.07,
        ema_momentum: float = 0.999,
        bn_group: int | None = None,
        shuffle: KeyShuffle | None = None,
    ) -> None:
        """bn_group: images that share BN statistics; None: a rank's batch. shuffle: None is on, seed 0."""
        self.query_encoder = query_encoder
        set_bn_group(query_encoder, bn_group)
        self.key_encoder = copy.deepcopy(query_encoder).requires_grad_(False)
        self.query_encoder.train()
        self.key_encoder.train()
        self.dictionary, self.bn_group = dictionary, bn_group
        self.temperature, self.ema_momentum = temperature, ema_momentum
        self.shuffle = shuffle if shuffle is not None else KeyShuffle()
        # Set by the fused optimizer, which moves the key encoder in its own pass.
        self.ema_in_optimizer = False
        # What the step calls: the loop puts the DDP-wrapped or compiled encoder here.
        self.query_forward: Callable[[Tensor], Tensor] = self.query_encoder
        self.key_forward: Callable[[Tensor], Tensor] = self.key_encoder
        # Collected once: walking 161 parameters and 53 BatchNorms each step costs as much as the update.
        self._query_bn, self._key_bn = (
            list(bn_modules(self.query_encoder)),
            list(bn_modules(self.key_encoder)),
        )
        self.query_params = parameter_list(self.query_encoder.parameters())
        self.key_params = parameter_list(self.key_encoder.parameters())
        self._ema = FlatEma(self.key_params, self.query_params)

    def to(self, device: torch.device | str, *, channels_last: bool = True) -> MoCo:
        """Move everything, in place. Parameters stay the same objects, so an optimizer may exist already."""
        memory_format = torch.channels_last if channels_last else torch.contiguous_format
        for encoder in (self.query_encoder, self.key_encoder):
            encoder.to(device=device, memory_format=memory_format)  # type: ignore[call-overload]
        self.dictionary.to(device)
        self._ema = FlatEma(self.key_params, self.query_params)
        return self

    def num_parts(self, num_images: int, micro_batch: int | None) -> int:
        """How many micro-batches make up the batch. Raises UserError where they would change the result."""
        size = micro_batch or num_images
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

    def update_key_encoder(self) -> None:
        """theta_k <- m theta_k + (1 - m) theta_q, unless the optimizer's step has done it."""
        if not self.ema_in_optimizer:
            self._ema.update(ema_momentum=self.ema_momentum)

    def state_dict(self) -> dict[str, Tensor]:
        """Both encoders and the dictionary as one flat dict; tensors are references, not copies."""
        return {
            f"{part}.{name}": tensor
            for part, module in self._parts().items()
            for name, tensor in module.state_dict().items()
        }

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore what `state_dict` gave. Raises UserError where it is of another model, changing nothing."""
        mine = self.state_dict()
        for name in [*mine, *state]:
            here, there = mine.get(name), state.get(name)
            if here is None or there is None or here.shape != there.shape:
                raise UserError(
                    f"the checkpoint is of another model: {name} is {_shape(there)} there and {_shape(here)} "
                    "here; start with the encoder, head, dim and num_keys that wrote it"
                )
        with torch.no_grad():
            for name, tensor in mine.items():
                tensor.copy_(state[name])

    def _parts(self) -> dict[str, nn.Module]:
        return {
            "query_encoder": self.query_encoder,
            "key_encoder": self.key_encoder,
            "dictionary": self.dictionary,
        }


def _backward(loss: Tensor) -> None:
    loss.backward()  # type: ignore[no-untyped-call]


def train_step(
    moco: MoCo,
    query_images: Tensor,
    key_images: Tensor,
    optimizer: torch.optim.Optimizer,
    *,
    step: int,
    micro_batch: int | None = None,
    autocast: Callable[[], AbstractContextManager[object]] = contextlib.nullcontext,
    backward: Callable[[Tensor], None] = _backward,
) -> StepMetrics:
    """One iteration of Algorithm 1 on this rank's images; both encoders, SGD and the dictionary move on.

    query_images, key_images: (N, 3, S, S) uint8, two views of the same images in the same order.
    step: the number of the iteration over the whole run; with the seed it fixes the shuffle.
    micro_batch: images that pass an encoder at once, where N are too many for the memory; the result is that
    of one batch, since all parts see the same dictionary and BN groups stay whole.
    autocast, backward: accelerate's, where there is one; the key encoder gets the same autocast.
    Never reads the device. Source: MoCo, Algorithm 1; shuffling BN, part 3.3.
    """
    num_parts = moco.num_parts(len(query_images), micro_batch)
    with torch.no_grad(), autocast():
        keys = moco.shuffle.encode(partial(_encode_keys, moco, num_parts=num_parts), key_images, step=step)
    first = moco.shuffle.rank * len(query_images)
    own_keys = keys[first : first + len(query_images)].chunk(num_parts)
    optimizer.zero_grad(set_to_none=True)
    metrics = []
    for part, images in enumerate(query_images.chunk(num_parts)):
        # DDP would send the gradients of every part; the last one brings the sum.
        waits = part < num_parts - 1 and isinstance(moco.query_forward, DistributedDataParallel)
        with moco.query_forward.no_sync() if waits else contextlib.nullcontext():  # type: ignore[attr-defined]
            with autocast():
                projected = moco.encode_part(moco.query_forward, images, part, num_parts)
            query = _unit_rows(projected)
            found = infonce(query, own_keys[part], moco.dictionary.keys, temperature=moco.temperature)
            backward(found.loss if num_parts == 1 else found.loss / num_parts)
        metrics.append(found)
    optimizer.step()
    moco.update_key_encoder()
    # After the loss: a key enqueued before it would be its own negative.
    moco.dictionary.enqueue(keys)
    return _mean_metrics(metrics)


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
