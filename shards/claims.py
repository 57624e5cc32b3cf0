"""Who writes to a prefix of an object store: claims that are renewed, because a store has no lock.

`.pack/claims/ROLE--ID.json` says who writes, and is written again every HEARTBEAT_S. A writer puts its claim,
then lists the others. One of this machine is alive if its process is; one of another machine if it is renewed
within STALE_S, by the store's own clock, which is waited for. Whoever finds a live one that it cannot work
beside is refused; two that start in the same moment may both be. What this cannot see is a writer that could
not renew its claim for STALE_S and then goes on: both write the same bytes, if from the same source.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from linerate.shards.bucket import Bucket
from linerate.shards.errors import UserError
from linerate.shards.out_folder import WORK_NAME

CLAIMS_NAME = f"{WORK_NAME}/claims"
HEARTBEAT_S = 30.0
STALE_S = 100.0
POLL_S = 2.0
_log = logging.getLogger("linerate.claims")


class ClaimedError(UserError):
    """Somebody else, `whom`, writes there."""

    def __init__(self, url: str, whom: str) -> None:
        super().__init__(
            f"another `linerate shard pack` ({whom}) writes to {url}; wait until it ends, or give another OUT"
        )
        self.whom = whom


@dataclass(frozen=True)
class Role:
    """What a writer does: all of it, one part beside others of as many, or the plan."""

    name: str
    num_parts: int = 0

    def bears(self, other: str) -> bool:
        """Can one of this role work beside one of the other?"""
        if "plan" in (self.name, other):
            return self.name != other
        return self.num_parts > 0 and other != self.name and other.endswith(f"-of-{self.num_parts}")


@contextlib.contextmanager
def claim(bucket: Bucket, role: Role, *, wait: bool = True) -> Iterator[None]:
    """Write as `role` until the block ends. Raises ClaimedError where somebody else does.

    wait: see whether a claim of another machine is renewed; without it a fresh one counts as alive.
    """
    name = f"{CLAIMS_NAME}/{role.name}--{uuid.uuid4().hex}.json"
    beat = 0

    def renew() -> None:
        nonlocal beat
        beat += 1
        who = {"host": socket.gethostname(), "pid": os.getpid(), "beat": beat}
        bucket.put_bytes(json.dumps(who).encode(), name)

    over = threading.Event()

    def keep_renewing() -> None:
        while not over.wait(HEARTBEAT_S):
            with contextlib.suppress(OSError, UserError):  # the next one may get through
                renew()

    renew()
    thread = threading.Thread(target=keep_renewing, daemon=True, name="claim")
    try:
        _refuse_others(bucket, role, name, wait=wait)
        thread.start()
        yield
    finally:
        over.set()
        if thread.ident is not None:
            thread.join()
        bucket.remove([name])


def _refuse_others(bucket: Bucket, role: Role, mine: str, *, wait: bool) -> None:
    seen: dict[str, str] = {}
    told, told_of = False, ""
    while True:
        found = bucket.details(CLAIMS_NAME)
        now = _changed(found[mine]) if mine in found else datetime.datetime.now(datetime.UTC)
        undecided = False
        for name, info in found.items():
            if name == mine or role.bears(name.rpartition("/")[2].partition("--")[0]):
                continue
            alive, whom = _is_alive(bucket, name)
            version = str(info.get("ETag") or _changed(info))
            if alive is None and seen.setdefault(name, version) != version:
                alive = True
            if alive is None and (now - _changed(info)).total_seconds() >= STALE_S:
                alive = False
            if alive or (alive is None and not wait):
                raise ClaimedError(bucket.url, whom)
            if alive is None:
                undecided, told_of = True, whom
            else:
                bucket.remove([name])
        if not undecided:
            return
        if not told:
            _log.warning(
                "waiting up to %.0f s to see whether %s still writes to %s", STALE_S, told_of, bucket.url
            )
            told = True
        time.sleep(POLL_S)
        bucket.put_bytes(bucket.read(mine, lambda file: file.read()), mine)  # its time is the store's now


def _is_alive(bucket: Bucket, name: str) -> tuple[bool | None, str]:
    """(does it live, whose it is); None where that cannot be told here."""
    try:
        who = json.loads(bucket.read(name, lambda file: file.read()))
        host, pid = str(who["host"]), int(who["pid"])
    except FileNotFoundError:
        return False, ""
    except (ValueError, TypeError, KeyError):
        return None, "unknown"
    whom = f"process {pid} on {host}"
    if host != socket.gethostname():
        return None, whom
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False, whom
    except PermissionError:
        pass
    return True, whom


def _changed(info: dict[str, Any]) -> datetime.datetime:
    found = info.get("LastModified") or info.get("mtime") or info.get("updated")
    when = datetime.datetime.fromisoformat(found) if isinstance(found, str) else found
    assert isinstance(when, datetime.datetime)
    return when if when.tzinfo else when.replace(tzinfo=datetime.UTC)
