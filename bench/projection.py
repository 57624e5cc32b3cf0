"""What more ranks would do, by formula from what was measured on few: a projection, and no measurement.

Nothing overlaps here, and no call costs anything but its bytes: on a network with little latency a run that
hides its gradients behind the backward pass is faster. Legend: n ranks, N images on each, B on all.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Traffic:
    """Bytes of one step on each rank, as its collectives' buffers hold them."""

    gradient_bytes: int
    image_bytes: int
    """what the all-to-all fills: N images, most of them from other ranks"""
    key_bytes: int
    """N keys, which every other rank gets"""

    def sent_bytes(self, ranks: int) -> float:
        """Bytes that a rank sends in a step, and gets: ring all-reduce, all-to-all, gather."""
        of_others = (ranks - 1) / ranks
        return (
            2 * of_others * self.gradient_bytes + of_others * self.image_bytes + (ranks - 1) * self.key_bytes
        )

    def scaled(self, share: float) -> Traffic:
        """With another N: the gradients stay."""
        return Traffic(
            gradient_bytes=self.gradient_bytes,
            image_bytes=round(share * self.image_bytes),
            key_bytes=round(share * self.key_bytes),
        )


@dataclass(frozen=True, kw_only=True)
class Projected:
    """One step on many ranks."""

    ranks: int
    compute_s: float
    """of one rank's images on one rank, as measured"""
    send_s: float
    sent_bytes: float
    pairs: int

    @property
    def pairs_per_s(self) -> float:
        return self.pairs / (self.compute_s + self.send_s)

    @property
    def efficiency(self) -> float:
        """Share of n times one rank."""
        return self.compute_s / (self.compute_s + self.send_s)


def project(
    traffic: Traffic, *, ranks: int, rank_batch: int, compute_s: float, link_gb_per_s: float
) -> Projected:
    """A step of `ranks`, each with a link of its own. compute_s: of rank_batch images on one rank."""
    sent = traffic.sent_bytes(ranks)
    return Projected(
        ranks=ranks,
        compute_s=compute_s,
        send_s=sent / (1e9 * link_gb_per_s),
        sent_bytes=sent,
        pairs=ranks * rank_batch,
    )
