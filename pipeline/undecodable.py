"""The error for images that a backend cannot decode."""

from __future__ import annotations

from collections.abc import Sequence

from linerate.shards.errors import UserError


class UndecodableImages(UserError):
    """Samples whose bytes do not decode, though their header was sound when they were packed."""

    def __init__(self, sample_id: Sequence[int], position: Sequence[int], reason: str) -> None:
        self.sample_id = list(sample_id)
        self.position = list(position)
        self.reason = " ".join(reason.split())
        names = ", ".join(f"{one:012d}" for one in self.sample_id[:8])
        more = f" and {len(self.sample_id) - 8} more" if len(self.sample_id) > 8 else ""
        super().__init__(
            f"cannot decode sample {names}{more}: {self.reason}; find all such by `linerate shard verify "
            "--decode full`, and pack again with `--check dali`, which leaves them out"
        )

    def __reduce__(self) -> tuple[object, ...]:
        """Workers send it to the parent by pickle."""
        return type(self), (self.sample_id, self.position, self.reason)
