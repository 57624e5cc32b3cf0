"""What a machine can do at most: memory's copy and a matrix product, as sides that a clock can time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from linerate.bench.contest import Ceiling
from linerate.bench.floors import StepWork
from linerate.bench.timing import MIN_ROUNDS, Side, measure

Form = Literal["eager", "compiled"]
# Far larger than any last-level cache.
COPY_BYTES = {"cpu": 256 * 2**20, "cuda": 2**30}
MATMUL_SIDE = {"cpu": 1024, "cuda": 8192}


@dataclass(frozen=True, kw_only=True)
class Probed:
    """A side, and how much of it one call does."""

    side: Side
    amount: float
    """GB read and written, or TFLOP"""

    def seconds(self) -> float:
        """One call in the fastest round: what the machine can do, not what else it was doing."""
        return float(np.min(measure(self.side, rounds=MIN_ROUNDS, min_round_s=0.02)))


def copy_of(device: str, num_bytes: int | None = None) -> Probed:
    """One tensor into another, in GB read and written, by all threads that torch has."""
    num_bytes = num_bytes or COPY_BYTES[device]
    source = torch.ones(num_bytes, dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)
    return Probed(side=Side(run=lambda: target.copy_(source)), amount=2 * num_bytes / 1e9)


def matmul_of(device: str, dtype: torch.dtype, size: int | None = None) -> Probed:
    """A square matrix product, in TFLOP."""
    size = size or MATMUL_SIDE[device]
    # Not zeros: they draw less power, and a GPU's clock would be higher than in any real work.
    factor = torch.randn(size, size, device=device, dtype=dtype)
    return Probed(side=Side(run=lambda: factor @ factor), amount=2 * size**3 / 1e12)


def measure_machine(device: str, dtype: torch.dtype) -> tuple[float, float]:
    """(GB/s of a copy, TFLOP/s of a matrix product) of this machine, about a second each."""
    copy, matmul = copy_of(device), matmul_of(device, dtype)
    return copy.amount / copy.seconds(), matmul.amount / matmul.seconds()


def step_ceiling(
    work: StepWork, *, device: str, dtype: torch.dtype, form: Form = "eager", small: bool = False
) -> Ceiling:
    """The slower of a step's two floors on this machine: its products as one, or its bytes as one copy.

    form: compiled steps may leave out what BN, ReLU and add need not move. small: for tests.
    """
    moved = work.eager_bytes if form == "eager" else work.bn_relu_add_bytes
    copy, matmul = copy_of(device, 2**20 if small else None), matmul_of(device, dtype, 128 if small else None)
    pairs_per_copy = work.pairs * copy.amount * 1e9 / moved
    pairs_per_matmul = work.pairs * matmul.amount * 1e12 / work.flops
    if pairs_per_matmul / matmul.seconds() < pairs_per_copy / copy.seconds():
        return Ceiling(name="its products as one matmul", side=matmul.side, amount=pairs_per_matmul)
    return Ceiling(name=f"its bytes as one copy, {form}", side=copy.side, amount=pairs_per_copy)
