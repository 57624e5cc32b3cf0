"""The error for images that a backend cannot decode."""

from __future__ import annotations

from linerate.pipeline.bad_samples import BadSamples


class UndecodableImages(BadSamples):
    """Samples whose bytes do not decode, though their header was sound when they were packed."""

    def describe(self) -> str:
        """The line for the user."""
        return (
            f"cannot decode sample {self.names()}: {self.reason}; find all such by `linerate shard verify "
            "--decode full`, and pack again with `--check dali`, which leaves them out"
        )
