"""The memory bank: one representation per sample of the data set, from when it was last seen as a query.

Legend: N samples in the data set, n of them on this rank, W ranks, B images in a global batch, K draws, C
dimensions. The positive of a query is its own sample's row, so no key is ever encoded and f_k is f_q of some
steps ago. Rows lie on the ranks in equal runs of positions. A step exchanges what does not depend on chance
in its size: B positions, the B + K rows that are looked up (summed over ranks that hold a row or zeros), and
B queries; nothing makes the host wait. Source: Wu et al. (InstDisc); MoCo, parts 3.2 and 4.1.
"""

from __future__ import annotations

import contextlib
import math
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import normalize

from linerate.shards.errors import UserError, show_bytes
from linerate.train.collectives import collect_rows, gather_rows, sum_over_ranks
from linerate.train.infonce import InfoNce, infonce
from linerate.train.nce import exponential_sum, nce
from linerate.train.negatives import Contrast, KeyDictionary, Lookup
from linerate.train.shuffle_bn import seed_of, to_device

BankLoss = Literal["infonce", "nce"]
_INIT_ROWS = 4096
CONTROL_GROUP = Path("/sys/fs/cgroup")


class MemoryBank(KeyDictionary):
    """N rows by position; each step draws K of them uniformly, with replacement, for all queries alike.

    A draw may hit a query's own row, as in InstDisc. The draws are a function of (seed, step).
    """

    has_key_encoder = False
    encodes_keys = False
    needs_position = True

    bank: Tensor
    """(n + 1, C): this rank's rows; the last one is zeros and stands for every row of the other ranks."""
    log_z: Tensor
    """0-d float64: NCE's log Z, estimated by the first batch and constant from then on."""

    def __init__(
        self,
        num_samples: int,
        num_keys: int,
        dim: int,
        *,
        momentum: float = 0.5,
        loss: BankLoss = "infonce",
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """Raises UserError where this rank's rows do not fit into the device's free memory."""
        super().__init__()
        self.num_samples, self.num_keys, self.dim = num_samples, num_keys, dim
        self.momentum, self.loss, self.seed = momentum, loss, seed
        self.rank, self.world_size = rank, world_size
        self.first, self.num_rows = own_rows(num_samples, rank=rank, world_size=world_size)
        self._require_room(torch.device(device), dtype)
        self.register_buffer("bank", torch.empty(self.num_rows + 1, dim, dtype=dtype, device=device))
        self.register_buffer("log_z", torch.zeros((), dtype=torch.float64, device=device))
        self._fill()

    def open(self, lookup: Lookup) -> Contrast:
        assert lookup.position is not None
        num_images = len(lookup.position)
        rows = torch.cat([lookup.position, to_device(self.draws(lookup.step), lookup.position.device)])
        found = self.fetch(rows)
        own, negatives = found[lookup.first :][: lookup.num], found[num_images:]
        temperature = lookup.temperature

        def contrast(queries: Tensor, start: int) -> InfoNce:
            keys = own[start : start + len(queries)]
            if self.loss == "infonce":
                return infonce(queries, keys, negatives, temperature=temperature)
            if lookup.step == 0:
                self._estimate_z(queries, keys, negatives, temperature=temperature)
            return nce(
                queries,
                keys,
                negatives,
                temperature=temperature,
                log_z=self.log_z,
                num_samples=self.num_samples,
            )

        return contrast

    @torch.no_grad()
    def close(self, lookups: list[Lookup], queries: Tensor) -> None:
        """v <- normalize(momentum v + (1 - momentum) q) for the samples of the global batch."""
        (lookup,) = lookups
        assert lookup.position is not None
        row, everyone = self._row_of(lookup.position), gather_rows(queries, world_size=self.world_size)
        new = torch.lerp(everyone.to(self.bank.dtype), self.bank[row], self.momentum)
        new = normalize(new).mul_((row < self.num_rows)[:, None])
        self.bank.index_copy_(0, row, new)

    def draws(self, step: int) -> Tensor:
        """(K,) int64 on the CPU: the positions whose rows are the keys of that step, on every rank."""
        generator = torch.Generator().manual_seed(seed_of(self.seed, "draws", step))
        return torch.randint(self.num_samples, (self.num_keys,), generator=generator)

    def fetch(self, position: Tensor) -> Tensor:
        """(M, C) rows from whichever rank has them. position: (M,) int64, the same on every rank."""
        return sum_over_ranks(self.bank[self._row_of(position)], world_size=self.world_size)

    def full_state(self) -> dict[str, Tensor]:
        """All N rows on rank 0, in its host's memory where there are several ranks."""
        runs = [
            own_rows(self.num_samples, rank=rank, world_size=self.world_size)[1]
            for rank in range(self.world_size)
        ]
        return {"bank": collect_rows(self.bank[: self.num_rows], runs, rank=self.rank), "log_z": self.log_z}

    def own_state(self, full: dict[str, Tensor]) -> dict[str, Tensor]:
        bank, shape = full.get("bank"), (self.num_samples, self.dim)
        if bank is None or tuple(bank.shape) != shape:
            there = "none" if bank is None else str(tuple(bank.shape))
            raise UserError(
                f"the checkpoint is of another memory bank: {there} there and {shape} here; start with the "
                "dictionary, dim and shards that wrote it"
            )
        own = bank[self.first : self.first + self.num_rows]
        return {**full, "bank": torch.cat([own, own.new_zeros(1, self.dim)])}

    def _row_of(self, position: Tensor) -> Tensor:
        row = position - self.first
        return torch.where((row >= 0) & (row < self.num_rows), row, self.num_rows)

    @torch.no_grad()
    def _estimate_z(self, queries: Tensor, keys: Tensor, noise: Tensor, *, temperature: float) -> None:
        total = exponential_sum(queries, keys, noise, temperature=temperature)
        total = sum_over_ranks(total, world_size=self.world_size)
        num_pairs = len(queries) * self.world_size * (1 + self.num_keys)
        self.log_z.copy_(total.log() + math.log(self.num_samples / num_pairs))

    @torch.no_grad()
    def _fill(self) -> None:
        """Rows from U(-1/sqrt(C/3), 1/sqrt(C/3)), normalised, the same however many ranks there are."""
        bound = 1 / math.sqrt(self.dim / 3)
        end = self.first + self.num_rows
        for block in range(self.first // _INIT_ROWS, math.ceil(end / _INIT_ROWS)):
            generator = torch.Generator().manual_seed(seed_of(self.seed, "bank", block))
            rows = torch.empty(_INIT_ROWS, self.dim).uniform_(-bound, bound, generator=generator)
            begin = block * _INIT_ROWS
            low, high = max(self.first, begin), min(end, begin + _INIT_ROWS)
            self.bank[low - self.first : high - self.first] = normalize(rows[low - begin : high - begin])
        self.bank[self.num_rows] = 0

    def _require_room(self, device: torch.device, dtype: torch.dtype) -> None:
        row = self.dim * torch.empty((), dtype=dtype).element_size()
        need, free = (self.num_rows + 1) * row, free_bytes(device)
        if need > free:
            raise UserError(
                f"the memory bank of {self.num_samples:,} samples x {self.dim} dimensions takes "
                f"{show_bytes(self.num_samples * row)}, {show_bytes(need)} on each of {self.world_size} "
                f"rank(s), and {device.type} has {show_bytes(free)} free; give --dictionary queue, more "
                "ranks, or a smaller --dim"
            )


def own_rows(num_samples: int, *, rank: int, world_size: int) -> tuple[int, int]:
    """The first position that a rank holds, and how many: equal runs, the last one may be shorter."""
    run = math.ceil(num_samples / world_size)
    first = min(rank * run, num_samples)
    return first, min(run, num_samples - first)


def free_bytes(device: torch.device) -> int:
    """Memory that the device has left; of a CPU, what the machine and its control group leave."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    limits = []
    with contextlib.suppress(OSError, ValueError, StopIteration):
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        limits.append(next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable:")))
    with contextlib.suppress(OSError, ValueError):
        limits.append(int((CONTROL_GROUP / "memory.max").read_text(encoding="ascii")))
    return min(limits, default=2**63)
