"""Both encoders, the dictionary and the loss of MoCo: what a step moves on and a checkpoint keeps.

Legend: N images on one rank, C dimensions of a key.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from linerate.shards.errors import UserError
from linerate.train.ema import FlatEma, parameter_list
from linerate.train.infonce import InfoNce
from linerate.train.key_stream import KeyStream
from linerate.train.negatives import Contrast, KeyDictionary
from linerate.train.shuffle_bn import KeyShuffle, bn_modules, set_bn_group, set_part


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
        sync_bn: bool = False,
        shuffle: KeyShuffle | None = None,
    ) -> None:
        """bn_group: images that share BN statistics; None: a rank's batch, sync_bn: that of all ranks.

        shuffle: None is on, seed 0.

        symmetric: both views are queries and keys of each other, and the loss is the mean of the two. Raises
        UserError where the dictionary encodes no keys.
        """
        if symmetric and not dictionary.encodes_keys:
            raise UserError(
                f"symmetric=True needs keys of both views, and a {type(dictionary).__name__} encodes none; "
                "give --no-symmetric, or another --dictionary"
            )
        self.query_encoder = query_encoder
        self.shuffle = shuffle if shuffle is not None else KeyShuffle()
        set_bn_group(query_encoder, bn_group, sync_ranks=self.shuffle.world_size if sync_bn else 1)
        self.key_encoder = query_encoder
        if dictionary.has_key_encoder:
            self.key_encoder = copy.deepcopy(query_encoder).requires_grad_(False)
        self.query_encoder.train()
        self.key_encoder.train()
        self.dictionary, self.bn_group = dictionary, bn_group
        self.temperature, self.ema_momentum, self.symmetric = temperature, ema_momentum, symmetric
        # Set by the fused optimizer, which moves the key encoder in its own pass.
        self.ema_in_optimizer = False
        # What the step calls: the loop puts the DDP-wrapped or compiled encoder here.
        self.query_forward: Callable[[Tensor], Tensor] = self.query_encoder
        self.key_forward: Callable[[Tensor], Tensor] = self.key_encoder
        # And here its compiled form.
        self.compare = compare
        # Where the key forward runs; the loop may put it beside the query forward.
        self.key_stream = KeyStream(None)
        # Collected once: walking 161 parameters and 53 BatchNorms each step costs as much as the update.
        self._query_bn, self._key_bn = (
            list(bn_modules(self.query_encoder)),
            list(bn_modules(self.key_encoder)),
        )
        self.query_params = parameter_list(self.query_encoder.parameters())
        self.key_params = parameter_list(self.key_encoder.parameters())
        self._ema = self._flat_ema()

    def to(self, device: torch.device | str, *, channels_last: bool = True) -> MoCo:
        """Move everything, in place. Parameters stay the same objects, so an optimizer may exist already."""
        memory_format = torch.channels_last if channels_last else torch.contiguous_format
        for encoder in (self.query_encoder, self.key_encoder):
            encoder.to(device=device, memory_format=memory_format)  # type: ignore[call-overload]
        self.dictionary.to(device)
        self._ema = self._flat_ema()
        return self

    def _flat_ema(self) -> FlatEma | None:
        return FlatEma(self.key_params, self.query_params) if self.dictionary.has_key_encoder else None

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
        """theta_k <- m theta_k + (1 - m) theta_q, where f_k is an encoder of its own.

        Unless the optimizer's step has done it.
        """
        if self._ema is not None and not self.ema_in_optimizer:
            self._ema.update(ema_momentum=self.ema_momentum)

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


def compare(projected: Tensor, contrast: Contrast, start: int) -> tuple[Tensor, InfoNce]:
    """(n, C) queries as unit rows, and their loss. start: the first one's place in the rank's batch."""
    query = unit_rows(projected)
    return query, contrast(query, start)


def unit_rows(projected: Tensor) -> Tensor:
    """L2-normalised, in float32 whatever autocast made of the projection (float64 stays)."""
    return normalize(projected.to(torch.promote_types(projected.dtype, torch.float32)))


def _shape(tensor: Tensor | None) -> str:
    return "absent" if tensor is None else str(tuple(tensor.shape))
