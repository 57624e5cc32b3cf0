"""What the step's parts are held against: the reference's forms, transcribed plainly. Peers only.

Legend: N queries, K keys, C dimensions. Source: facebookresearch/moco (v1), one device.
"""

import copy
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@torch.no_grad()
def ema_loop(key_params: Iterable[Tensor], query_params: Iterable[Tensor], m: float) -> None:
    """The reference's: one parameter after the other, three new tensors each."""
    for key, query in zip(key_params, query_params, strict=True):
        key.data = key.data * m + query.data * (1.0 - m)


@torch.no_grad()
def ema_foreach(key_params: list[Tensor], query_params: list[Tensor], m: float) -> None:
    """lightly's: multiply all, then add all."""
    torch._foreach_mul_(key_params, m)
    torch._foreach_add_(key_params, query_params, alpha=1.0 - m)


class ReferenceQueue:
    """(C, K) keys as columns, with a pointer that the host reads."""

    def __init__(self, keys: Tensor) -> None:
        """keys: (K, C), copied."""
        self.queue = keys.T.contiguous()
        self.pointer = torch.zeros(1, dtype=torch.long, device=keys.device)

    def for_logits(self) -> Tensor:
        """(C, K): a copy, since the queue changes before the backward pass reads it."""
        return self.queue.clone().detach()

    @torch.no_grad()
    def enqueue(self, keys: Tensor) -> None:
        """Replace the oldest N columns; N divides K."""
        place = int(self.pointer)
        self.queue[:, place : place + len(keys)] = keys.T
        self.pointer[0] = (place + len(keys)) % self.queue.shape[1]


def infonce_cat(
    query: Tensor, key: Tensor, queue: Tensor, temperature: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, top-1 and top-5 through the N x (K + 1) logits. queue: (C, K)."""
    positive = torch.einsum("nc,nc->n", query, key).unsqueeze(-1)
    negative = torch.einsum("nc,ck->nk", query, queue)
    logits = torch.cat([positive, negative], dim=1)
    logits /= temperature
    labels = torch.zeros(len(logits), dtype=torch.long, device=logits.device)
    return F.cross_entropy(logits, labels), *shares_in_top(logits.detach(), labels)


def shares_in_top(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Shares of rows whose label is the first, and among the first five."""
    first = logits.topk(min(5, logits.shape[1]), dim=1).indices
    hits = first == labels[:, None]
    return hits[:, :1].any(1).float().mean(), hits.any(1).float().mean()


class PlainMoCo:
    """The whole step as one would write it in plain eager torch: channels_last, foreach SGD and EMA."""

    def __init__(
        self,
        encoder: nn.Module,
        keys: Tensor,
        *,
        temperature: float,
        ema_momentum: float,
        lr: float,
        compiled: bool = False,
    ) -> None:
        """encoder: (N, 3, S, S) normalised floats -> (N, C); copied twice. keys: (K, C), copied.

        Both on one device. compiled: both encoders run through torch.compile.
        """
        self.query_encoder = copy.deepcopy(encoder).to(memory_format=torch.channels_last)
        self.key_encoder = copy.deepcopy(self.query_encoder)
        for parameter in self.key_encoder.parameters():
            parameter.requires_grad = False
        self.query_forward: Callable[[Tensor], Tensor] = self.query_encoder
        self.key_forward: Callable[[Tensor], Tensor] = self.key_encoder
        if compiled:
            self.query_forward, self.key_forward = map(torch.compile, (self.query_encoder, self.key_encoder))
        self.queue = ReferenceQueue(keys)
        self.temperature, self.ema_momentum = temperature, ema_momentum
        # foreach is what SGD takes by itself on a GPU; on a CPU it would loop.
        self.optimizer = torch.optim.SGD(
            self.query_encoder.parameters(), lr=lr, momentum=0.9, weight_decay=1e-4, foreach=True
        )
        self.dtype = keys.dtype
        like: dict[str, Any] = {"dtype": self.dtype, "device": keys.device}
        self.mean = torch.tensor(IMAGENET_MEAN, **like).view(1, 3, 1, 1)
        self.std = torch.tensor(IMAGENET_STD, **like).view(1, 3, 1, 1)

    def step(self, query_images: Tensor, key_images: Tensor, *, autocast: bool = False) -> Tensor:
        """The loss of one iteration on (N, 3, S, S) uint8 views."""
        with torch.autocast(query_images.device.type, torch.bfloat16, enabled=autocast):
            query = F.normalize(self.query_forward(self.normalise(query_images)), dim=1)
            with torch.no_grad():
                key = F.normalize(self.key_forward(self.normalise(key_images)), dim=1)
            # The logits keep float32, as ours do.
        loss, _, _ = infonce_cat(query.to(self.dtype), key.to(self.dtype), self.queue.queue, self.temperature)
        self.optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        ema_foreach(
            list(self.key_encoder.parameters()), list(self.query_encoder.parameters()), self.ema_momentum
        )
        self.queue.enqueue(key.to(self.dtype))
        return loss.detach()

    def normalise(self, images: Tensor) -> Tensor:
        """ToTensor and Normalize on a batch."""
        return (images.to(self.dtype) / 255 - self.mean) / self.std


class LightlyMoCo:
    """The step of lightly's parts, as its MoCo example puts them together."""

    def __init__(
        self,
        encoder: nn.Module,
        keys: Tensor,
        *,
        temperature: float,
        ema_momentum: float,
        lr: float,
        autocast: bool,
    ) -> None:
        """encoder: (N, 3, S, S) normalised floats -> (N, C); copied twice. keys: (K, C), copied.

        Both on one device, of one dtype.
        """
        from lightly.loss import NTXentLoss
        from lightly.models.utils import deactivate_requires_grad

        self.query_encoder, self.key_encoder = copy.deepcopy(encoder), copy.deepcopy(encoder)
        deactivate_requires_grad(self.key_encoder)
        self.criterion = NTXentLoss(temperature=temperature, memory_bank_size=tuple(keys.shape))
        self.criterion.to(keys.device)
        self.criterion.memory_bank.bank = keys.clone()
        self.ema_momentum, self.autocast = ema_momentum, autocast
        self.optimizer = torch.optim.SGD(
            self.query_encoder.parameters(), lr=lr, momentum=0.9, weight_decay=1e-4
        )
        self.dtype = keys.dtype
        like: dict[str, Any] = {"dtype": self.dtype, "device": keys.device}
        self.mean = torch.tensor(IMAGENET_MEAN, **like).view(1, 3, 1, 1)
        self.std = torch.tensor(IMAGENET_STD, **like).view(1, 3, 1, 1)

    def step(self, query_images: Tensor, key_images: Tensor) -> Tensor:
        """The loss of one iteration on (N, 3, S, S) uint8 views."""
        return self.step_on_floats(self.normalise(query_images), self.normalise(key_images))

    def step_on_floats(self, query_images: Tensor, key_images: Tensor) -> Tensor:
        """The same on (N, 3, S, S) normalised floats, as lightly's transforms end with."""
        from lightly.models.utils import batch_shuffle, batch_unshuffle, update_momentum

        update_momentum(self.query_encoder, self.key_encoder, m=self.ema_momentum)
        with torch.autocast(query_images.device.type, torch.bfloat16, enabled=self.autocast):
            query = self.query_encoder(query_images)
            with torch.no_grad():
                shuffled, order = batch_shuffle(key_images)
                key = batch_unshuffle(self.key_encoder(shuffled), order)
            loss = self.criterion(query, key.detach())
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        detached: Tensor = loss.detach()
        return detached

    def normalise(self, images: Tensor) -> Tensor:
        """ToTensor and Normalize on a batch."""
        return (images.to(self.dtype) / 255 - self.mean) / self.std
