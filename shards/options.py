"""What a user decides about shards; everything here changes their bytes."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from linerate.shards.errors import UserError

Check = Literal["header", "decode", "dali"]


@dataclass(frozen=True, kw_only=True)
class ImagePolicy:
    """Which images are taken."""

    check: Check = "header"
    max_pixels: int = 100_000_000


@dataclass(frozen=True, kw_only=True)
class Sizing:
    """How large a shard is."""

    shard_bytes: int = 1_000_000_000
    """About this many bytes in a shard, or less."""
    shard_samples: int = 10_000
    """At most this many samples in a shard."""
    min_shards: int = 16
    """At least this many shards where there are 8 samples for each, so that lanes have work."""

    def __post_init__(self) -> None:
        for name in ("shard_bytes", "shard_samples", "min_shards"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name.replace('_', '-')} is {getattr(self, name)}, at least 1 is needed")

    def num_shards(self, *, samples: int, total_bytes: int) -> int:
        """Shards of equal sample counts that hold what there is within these limits."""
        wanted = max(-(-total_bytes // self.shard_bytes), -(-samples // self.shard_samples))
        return min(samples, max(wanted, min(self.min_shards, samples // 8), 1))


@dataclass(frozen=True, kw_only=True)
class PackOptions:
    """Everything that decides the bytes of the shards, apart from the source."""

    name: str = "shard"
    """Shards are named NAME-000042.tar."""
    seed: int = 0
    """Of the global shuffle."""
    shard_bytes: int = 1_000_000_000
    """About this many bytes in a shard, or less."""
    shard_samples: int = 10_000
    """At most this many samples in a shard."""
    min_shards: int = 16
    """At least this many shards where there are 8 samples for each, so that parallel readers have work."""
    check: Check = "header"
    """How an image is judged: markers, dimensions and end of its header; also a strict decode at 1/8 scale;
    also DALI's CPU decoder, the last word on what training can read."""
    max_pixels: int = 100_000_000
    """Images of more pixels are rejected: they would eat the memory of every decoder."""

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[A-Za-z0-9_-]{1,64}", self.name):
            raise UserError(f"--name {self.name!r} is not 1 to 64 letters, digits, - and _; such as `train`")
        if self.max_pixels < 1:
            raise UserError(f"--max-pixels is {self.max_pixels}, at least 1 is needed")
        _ = self.sizing

    @property
    def policy(self) -> ImagePolicy:
        return ImagePolicy(check=self.check, max_pixels=self.max_pixels)

    @property
    def sizing(self) -> Sizing:
        return Sizing(
            shard_bytes=self.shard_bytes, shard_samples=self.shard_samples, min_shards=self.min_shards
        )
