"""Ctrl-C, SIGTERM and SIGUSR1 as a request: the run ends between two steps, saves, and returns."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType

# SIGUSR1: what Slurm's --signal sends before a job's time is over.
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
# torchrun passes a Ctrl-C on to ranks that had it from the terminal already: one wish, told twice.
REPEAT_S = 3.0
# How long what is saved already may wait for a loader that does not end, as on storage that hangs.
LEAVE_S = 15.0


def exit_code(number: int | None) -> int:
    """What a process returns that was stopped by this signal and saved: 130 after Ctrl-C, else 0.

    A preempted job is not a failed one: its scheduler starts it again.
    """
    return 130 if number == signal.SIGINT else 0


class StopRequest:
    """Whether someone asked the run to stop, and by what."""

    def __init__(self, *, leave: Callable[[int], object] = os._exit) -> None:
        self.signal: signal.Signals | None = None
        self.asked_s = 0.0
        self._act: Callable[[], None] | None = None
        self._leave = leave
        self._wakeup: int | None = None
        self._timer: threading.Timer | None = None

    def __bool__(self) -> bool:
        return self.signal is not None

    def take(self, number: int, frame: FrameType | None = None) -> None:
        """Note the signal. Another Ctrl-C, some seconds later, interrupts at once."""
        now = time.monotonic()
        if self.signal is None:
            self.signal, self.asked_s = signal.Signals(number), now
            self._fire()
        elif number == signal.SIGINT and now - self.asked_s >= REPEAT_S:
            raise KeyboardInterrupt

    def heard(self) -> signal.Signals | None:
        """The signal, for another thread: also while the main one is in a call that lets no handler run.

        Such as a barrier: there Python's handler has to wait, while C's has written the number down already.
        """
        if self.signal is None and self._wakeup is not None:
            with contextlib.suppress(BlockingIOError):
                told = [number for number in os.read(self._wakeup, 4096) if number in SIGNALS]
                return signal.Signals(told[0]) if told else None
        return self.signal

    @contextlib.contextmanager
    def hearing(self) -> Iterator[None]:
        """While this is open, C's handler writes every signal's number down. In the main thread only."""
        self._wakeup, write = os.pipe()
        for end in (self._wakeup, write):
            os.set_blocking(end, False)
        before = signal.set_wakeup_fd(write, warn_on_full_buffer=False)
        try:
            yield
        finally:
            signal.set_wakeup_fd(before)
            read, self._wakeup = self._wakeup, None
            for end in (read, write):
                os.close(end)

    @contextlib.contextmanager
    def at_once(self, act: Callable[[], None]) -> Iterator[None]:
        """A request that comes in here, or came before, calls act in the main thread without any delay.

        For a wait that may be long: act runs inside the signal's handler, and the wait goes on after it.
        """
        self._act = act
        try:
            if self:
                self._fire()
            yield
        finally:
            self._act = None

    def leave_within(self, seconds: float, *, after: str) -> None:
        """End the process after that time, whatever it waits for then; `after` says what is saved."""

        def leave() -> None:
            name = self.signal.name if self.signal else "another rank"
            print(
                f"linerate: stopped by {name}; {after}; the loader did not end", file=sys.stderr, flush=True
            )
            self._leave(exit_code(self.signal))

        self._timer = threading.Timer(seconds, leave)
        self._timer.daemon = True
        self._timer.start()

    def stay(self) -> None:
        """Everything has ended by itself."""
        if self._timer is not None:
            self._timer.cancel()

    def _fire(self) -> None:
        act, self._act = self._act, None
        if act is not None:
            act()


@contextlib.contextmanager
def stop_on_signals() -> Iterator[StopRequest]:
    """Yields a request that SIGINT, SIGTERM and SIGUSR1 set; at the end the old handlers are put back.

    Outside the main thread, where Python allows no handlers, the request just stays unset.
    """
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    before = {number: signal.getsignal(number) for number in SIGNALS}
    for number in before:
        signal.signal(number, request.take)
    try:
        with request.hearing():
            yield request
    finally:
        request.stay()
        for number, handler in before.items():
            signal.signal(number, handler)
