"""A rank that gets no batch for too long says where it stands, with every thread's stack, and ends.

All ranks of a run are in step, so when one starves the others wait for it and find the same a moment later:
each tells its own story before any of them goes. A rank whose collective fails, since another rank died,
tells its own as well.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType

EXIT_CODE = os.EX_TEMPFAIL
"""75: try again. The same command with --resume continues."""
MAX_TICK_S = 5.0
GRACE_S = 10.0


class Watchdog:
    """Use it as a context around the loop, and `pat` it at every batch."""

    def __init__(
        self,
        limit_s: float,
        *,
        where: Callable[[], str],
        stacks: Path,
        grace_s: float | None = None,
        clock: Callable[[], float] = time.monotonic,
        leave: Callable[[int], object] = os._exit,
    ) -> None:
        """limit_s: seconds without a batch; 0: for ever. where: the rank and its place in the run.

        stacks: the file that gets the stacks. grace_s: how long the other ranks have to say their part;
        None: 10 s, or the limit where that is less.
        """
        self._limit_s, self._where, self._stacks = limit_s, where, stacks
        self._grace_s = min(GRACE_S, limit_s) if grace_s is None else grace_s
        self._clock, self._leave = clock, leave
        self._num_paused = 0
        self._fed_s = clock()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> Watchdog:
        self.pat()
        if self._limit_s:
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None
    ) -> None:
        self._done.set()
        if self._thread.is_alive():
            self._thread.join()
        if error is not None and is_lost_peer(error):
            # What torch would do next, it would do with the ranks that are gone.
            self._end(f"{self._where()} has lost another rank ({_first_line(error)})", error)

    def pat(self) -> None:
        """A batch has come."""
        self._fed_s = self._clock()

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """While no batch is asked for: kNN, a checkpoint."""
        self._num_paused += 1
        try:
            yield
        finally:
            self._num_paused -= 1
            self.pat()

    def check(self) -> None:
        """End this process if there was no batch for too long."""
        starved_s = self._clock() - self._fed_s
        if self._num_paused or starved_s < self._limit_s:
            return
        self._end(f"{self._where()} has had no batch for {starved_s:.0f} s")

    def _end(self, what: str, error: BaseException | None = None) -> None:
        way = "--resume continues" if error else "--stall-seconds allows more, --resume continues"
        line = f"linerate: error: {what}; the stacks of its threads are in {self._stacks}; {way}"
        print(line, file=sys.stderr, flush=True)
        with contextlib.suppress(OSError):
            self._stacks.parent.mkdir(parents=True, exist_ok=True)
            with self._stacks.open("w", encoding="utf-8") as file:
                print(line, file=file, flush=True)
                if error is not None:
                    traceback.print_exception(error, file=file)
                    file.flush()
                faulthandler.dump_traceback(file, all_threads=True)
        if error is None:
            time.sleep(self._grace_s)
        self._leave(EXIT_CODE)

    def _watch(self) -> None:
        tick_s = min(self._limit_s / 4, MAX_TICK_S)
        try:
            while not self._done.wait(tick_s):
                # Should a library hold the interpreter's lock for ever, this thread stops and C's own fires.
                last_resort_s = 2 * self._limit_s + self._grace_s + tick_s
                faulthandler.dump_traceback_later(last_resort_s, exit=True, file=sys.__stderr__ or 2)
                self.check()
        finally:
            faulthandler.cancel_dump_traceback_later()


def is_lost_peer(error: BaseException) -> bool:
    """Does a collective fail because another rank is gone? gloo and NCCL raise bare RuntimeErrors, too."""
    names = {kind.__name__ for kind in type(error).__mro__}
    told = isinstance(error, RuntimeError) and any(word in str(error) for word in ("gloo", "NCCL"))
    return "DistError" in names or told


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0][:200]
