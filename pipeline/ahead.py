"""The shards that a reader is about to need, fetched in the background into the cache and held there."""

from __future__ import annotations

import os
import resource
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

from linerate.pipeline.cache import INDEX, TAR, LostShardError, ShardCache
from linerate.shards.errors import UserError

BACKGROUND_FETCHES, URGENT_FETCHES = 4, 8
RETRY_S = 1.0
"""How soon a shard is tried again that found no room, is fetched by another process, or met a full disk."""
CLOSE_LIMIT_S = 2.0


class Ahead:
    """Keeps what its reader needs next in the cache. Its methods are for one thread.

    What is held here is not evicted; the kernel ends that with this process.
    """

    def __init__(self, cache: ShardCache) -> None:
        self.cache = cache
        # A quarter of the descriptors; the reader takes half.
        self._max_held = max(resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 4, 1)
        self._start()

    def _start(self) -> None:
        self._pid = os.getpid()
        self._changed = threading.Condition()
        self._held: dict[int, int] = {}  # shard -> descriptor with a shared lock
        self._wanted: list[int] = []
        self._kept: frozenset[int] = frozenset()
        self._busy: set[int] = set()
        self._not_before: dict[int, float] = {}
        self._lost: set[int] = set()  # shards that cannot be had: only who needs one tries again
        self._urgent: set[int] = set()
        self._threads: list[threading.Thread] = []
        self._closed = False

    def want(self, shards: Sequence[int]) -> None:
        """Fetch these in the background, in that order, and let all others go. Returns at once."""
        self._survive_fork()
        with self._changed:
            self._wanted = list(dict.fromkeys(shards))
            self._kept = frozenset(self._wanted)
            for shard in [*self._held]:
                if shard not in self._kept:
                    os.close(self._held.pop(shard))
            self._not_before.clear()
            self._changed.notify_all()
            if self._wanted and not self._threads:
                self._threads = [
                    threading.Thread(target=self._work, name=f"cache-{nth}", daemon=True)
                    for nth in range(BACKGROUND_FETCHES)
                ]
                for thread in self._threads:
                    thread.start()

    def need(self, shards: Sequence[int]) -> None:
        """Have these here now; the background waits meanwhile. Raises LostShardError, UserError."""
        self._survive_fork()
        with self._changed:
            missing = [shard for shard in shards if shard not in self._held]
            self._urgent = set(missing)
            self._changed.notify_all()
        if not missing:
            return
        try:
            if len(missing) == 1:
                self._fetch(missing[0], urgent=True)
                return
            with ThreadPoolExecutor(min(URGENT_FETCHES, len(missing)), thread_name_prefix="urgent") as pool:
                jobs = [pool.submit(self._fetch, shard, urgent=True) for shard in missing]
            for job in jobs:
                job.result()
        finally:
            with self._changed:
                self._urgent = set()
                self._changed.notify_all()

    def has(self, shard: int) -> bool:
        """Is the shard held here?"""
        return shard in self._held

    def close(self) -> None:
        """Let all go; what is being fetched stays a part, which the next one continues."""
        self._survive_fork()
        with self._changed:
            self._closed = True
            self._wanted, self._kept = [], frozenset()
            while self._held:
                os.close(self._held.popitem()[1])
            self._changed.notify_all()
        # A thread that waits for a server ends with its answer, or with the process.
        deadline = time.monotonic() + CLOSE_LIMIT_S
        for thread in self._threads:
            thread.join(timeout=max(0.0, deadline - time.monotonic()))

    def _survive_fork(self) -> None:
        if self._pid == os.getpid():
            return
        for file in self._held.values():
            os.close(file)
        self._start()  # the lock and the threads are those of the parent

    def _work(self) -> None:
        while True:
            with self._changed:
                shard = self._next()
                while shard is None:
                    if self._closed:
                        return
                    self._changed.wait(RETRY_S)
                    shard = self._next()
                self._busy.add(shard)
            done = lost = False
            try:
                done = self._fetch(shard, urgent=False)
            except LostShardError:
                lost = True  # told by whoever comes to need it, as the others
            except (UserError, OSError, _YieldError):
                pass
            finally:
                with self._changed:
                    self._busy.discard(shard)
                    if lost:
                        self._lost.add(shard)
                    elif not done:
                        self._not_before[shard] = time.monotonic() + RETRY_S

    def _next(self) -> int | None:
        if self._closed or self._urgent or len(self._held) >= self._max_held:
            return None
        now = time.monotonic()
        for shard in self._wanted:
            if shard in self._held or shard in self._busy or shard in self._lost:
                continue
            if self._not_before.get(shard, 0.0) <= now:
                return shard
        return None

    def _fetch(self, shard: int, *, urgent: bool) -> bool:
        pace = _at_once if urgent else self._pace(shard)
        cache = self.cache
        for suffix in (TAR, INDEX):
            if not cache.fetch(shard, suffix, urgent=urgent, pace=pace):
                return False
        # In the background a tar that was evicted meanwhile is not fetched past the budget.
        file = cache.open_tar(shard) if urgent else cache.hold_tar(shard)
        if file is None:
            return False
        with self._changed:
            self._lost.discard(shard)
            if shard in self._held or not self._may_hold(shard):
                os.close(file)
            else:
                self._held[shard] = file
        return True

    def _may_hold(self, shard: int) -> bool:
        if self._closed or len(self._held) >= self._max_held:
            return False
        # A reader without a list of what comes holds the shards of a few batches by its open files.
        return shard in self._kept

    def _pace(self, shard: int) -> Callable[[], None]:
        def make_way() -> None:
            # It must not wait here: it holds the part's lock, on which another process may wait that holds
            # the one that is urgent.
            if self._closed or (self._urgent and shard not in self._urgent):
                raise _YieldError

        return make_way


class _YieldError(Exception):
    """The background stops between two blocks: the reader is closed, or needs another shard at once."""


def _at_once() -> None:
    return
