"""Ctrl-C and SIGTERM as a request: the loop ends its step, saves, and returns."""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Iterator
from types import FrameType

# torchrun passes a Ctrl-C on to ranks that had it from the terminal already: one wish, told twice.
REPEAT_S = 3.0


class StopRequest:
    """Whether someone asked the run to stop, and by what."""

    signal: signal.Signals | None = None
    asked_s: float = 0.0

    def __bool__(self) -> bool:
        return self.signal is not None

    def take(self, number: int, frame: FrameType | None = None) -> None:
        """Note the signal. Another Ctrl-C, some seconds later, interrupts at once."""
        now = time.monotonic()
        if self.signal is None:
            self.signal, self.asked_s = signal.Signals(number), now
        elif number == signal.SIGINT and now - self.asked_s >= REPEAT_S:
            raise KeyboardInterrupt


@contextlib.contextmanager
def stop_on_signals() -> Iterator[StopRequest]:
    """Yields a request that SIGINT and SIGTERM set; the handlers from before are put back at the end.

    Outside the main thread, where Python allows no handlers, the request just stays unset.
    """
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    for number in before:
        signal.signal(number, request.take)
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
