"""The dictionary as a queue: the newest K keys, on the device, replaced in place.

Legend: K keys in the queue, C dimensions of a key, N keys enqueued at once.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from linerate.shards.errors import UserError
from linerate.train.infonce import InfoNce, infonce
from linerate.train.negatives import Contrast, KeyDictionary, Lookup


class KeyQueue(KeyDictionary):
    """K keys as unit rows; the buffers are its state, so `state_dict` saves and restores all of it.

    Before the first keys arrive the rows are random unit vectors, as in the reference.
    """

    keys: Tensor
    """(K, C) unit rows; row order is ring order, the oldest key lies at the pointer."""
    num_enqueued: Tensor
    """0-d int64 on the device: keys enqueued since the start; the host never reads it."""

    def __init__(
        self,
        num_keys: int,
        dim: int,
        *,
        dtype: torch.dtype = torch.float32,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        if num_keys < 1 or dim < 1:
            raise UserError(f"num_keys={num_keys} and dim={dim} must both be at least 1; MoCo has 65536, 128")
        keys = nn.functional.normalize(torch.randn(num_keys, dim, generator=generator))
        self.register_buffer("keys", keys.to(dtype))
        self.register_buffer("num_enqueued", torch.zeros((), dtype=torch.int64))
        self._num_a_step = 1

    @property
    def num_keys(self) -> int:
        """K."""
        return self.keys.shape[0]

    @property
    def pointer(self) -> Tensor:
        """0-d int64 on the device: the row that the next key replaces."""
        return self.num_enqueued % self.num_keys

    def open(self, lookup: Lookup) -> Contrast:
        assert lookup.keys is not None
        own = lookup.keys[lookup.first :][: lookup.num]

        def contrast(queries: Tensor, start: int) -> InfoNce:
            keys = own[start : start + len(queries)]
            return infonce(queries, keys, self.keys, temperature=lookup.temperature)

        return contrast

    def close(self, lookups: list[Lookup], queries: Tensor) -> None:
        """Enqueue the keys; of a symmetric step those of both views."""
        keys = [lookup.keys for lookup in lookups if lookup.keys is not None]
        self.enqueue(keys[0] if len(keys) == 1 else torch.cat(keys))

    @torch.no_grad()
    def enqueue(self, keys: Tensor) -> None:
        """Replace the oldest N keys.

        keys: (N, C) unit rows, gathered in rank order so that every rank stores the same bytes. K need be no
        multiple of N, and N may exceed K: the last K stay. No copy of the queue, no host sync.
        Source: MoCo, "Dictionary as a queue".
        """
        num_new = self._num_a_step = keys.shape[0]
        newest = torch.arange(max(0, num_new - self.num_keys), num_new, device=keys.device)
        rows = newest.add_(self.num_enqueued).remainder_(self.num_keys)
        self.keys.index_copy_(0, rows, keys[-self.num_keys :].to(self.keys.dtype))
        self.num_enqueued.add_(num_new)

    def stats(self) -> dict[str, Tensor]:
        """queue_fill: share of the rows that hold a key; queue_age_steps: steps since the oldest came."""
        filled = self.num_filled()
        age = ((filled - 1).clamp(min=0) // self._num_a_step).float()
        return {"queue_fill": filled / self.num_keys, "queue_age_steps": age}

    def num_filled(self) -> Tensor:
        """0-d int64 on the device: rows that hold a key; the other ones are still random."""
        return self.num_enqueued.clamp(max=self.num_keys)

    def ages(self) -> Tensor:
        """(K,) int64: how many keys came after each row's own; -1 where the row is still random."""
        row = torch.arange(self.num_keys, device=self.keys.device)
        age = (self.num_enqueued - 1 - row).remainder_(self.num_keys)
        return torch.where(age < self.num_enqueued, age, -1)
