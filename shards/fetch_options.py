"""How images are fetched from other machines; nothing here changes the bytes of what was fetched."""

from __future__ import annotations

from dataclasses import dataclass

from linerate.shards.errors import UserError


@dataclass(frozen=True, kw_only=True)
class FetchOptions:
    """How hard each process tries to get the images that a manifest names by URL."""

    in_flight: int = 32
    """Requests that are under way at once, in each process."""
    timeout_s: float = 10.0
    """A server that does not connect, or sends nothing, for so long has failed; one try takes at most six
    times as long. Seconds."""
    retries: int = 4
    """Further tries after one that may be mended by waiting: no connection, time-out, cut short, HTTP 5xx."""
    backoff_s: float = 0.5
    """Before the first further try, give or take a half; twice as long before each one after it. Seconds."""
    allow_private: bool = False
    """Let http URLs lead to loopback, link-local, private and reserved addresses, which a manifest from
    elsewhere must not reach (a cloud's credentials lie on one)."""

    def __post_init__(self) -> None:
        if not 1 <= self.in_flight <= 1024:
            raise UserError(f"--in-flight is {self.in_flight}; give 1 to 1024, 32 is usual")
        if self.timeout_s <= 0:
            raise UserError(f"--timeout-s is {self.timeout_s}; give seconds above 0, 10 is usual")
        if self.retries < 0:
            raise UserError(f"--retries is {self.retries}; give 0 or more, 4 is usual")
        if self.backoff_s < 0:
            raise UserError(f"--backoff-s is {self.backoff_s}; give seconds, 0.5 is usual")
