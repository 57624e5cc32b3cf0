"""The images that a task's URLs name: many requests in flight, bodies in the order that packing needs."""

from __future__ import annotations

import random
import threading
from collections import Counter, deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType

from linerate.shards.errors import UserError
from linerate.shards.fetch_options import FetchOptions
from linerate.shards.inspect_image import RejectedError
from linerate.shards.remote_http import HttpClient, RetryError
from linerate.shards.remote_store import StoreClient
from linerate.shards.remote_url import Url, parse_url, show_url

# Of all bodies that wait to be packed or are on their way, in one process.
MAX_HELD_BYTES = 1 << 28
# So many rows ahead per request in flight: one slow host must not stop the others.
ROWS_AHEAD = 16
# An image that is smaller needs no grant of its own.
GRANT_BYTES = 1 << 18
# So many rows of one host in vain, and the next ones are tried once only.
DEAD_HOST = 2
# So many images in a row for one cause, and it is no longer the images' fault.
OUTAGE_ROWS = 64
_LAST_PAUSE_S = 60.0


class RemoteReader:
    """Body after body of `urls`. Use it as a context: it holds threads and connections.

    One image that cannot be had is a RejectedError. An outage is not: `next` raises UserError, which stops
    the run, when OUTAGE_ROWS images in a row fail for one cause that lies in the network (no connection, no
    name, time-outs, HTTP 5xx), or when the task's first OUTAGE_ROWS, whatever their cause, are all alike
    (credentials, a wrong prefix, a private network). A task of fewer but at least 16 URLs counts as a whole.
    """

    def __init__(self, urls: Sequence[str], options: FetchOptions, *, max_bytes: int) -> None:
        self._urls = urls
        self._options = options
        self._max_bytes = max_bytes
        self._memory = _Memory(MAX_HELD_BYTES)
        self._outage = _Outage(min(OUTAGE_ROWS, max(16, len(urls))))
        self._stores = StoreClient(options)
        self._clients: list[HttpClient] = []
        self._local = threading.local()
        self._closed = threading.Event()
        self._failed_hosts: Counter[str] = Counter()
        self._pool = ThreadPoolExecutor(options.in_flight, thread_name_prefix="fetch")
        self._ahead: deque[Future[bytearray]] = deque()
        self._next = 0

    def __enter__(self) -> RemoteReader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None
    ) -> None:
        self._closed.set()
        self._memory.close()
        for client in list(self._clients):  # what a thread waits for ends at once
            client.abort()
        self._pool.shutdown(cancel_futures=True)
        for client in self._clients:
            client.close()

    def next(self) -> bytearray:
        """The next URL's body. Raises RejectedError for this image, UserError for an outage."""
        last = min(self._next + ROWS_AHEAD * self._options.in_flight, len(self._urls))
        for row in range(self._next + len(self._ahead), last):
            self._ahead.append(self._pool.submit(self._fetch, row))
        row, self._next = self._next, self._next + 1
        self._memory.turn_to(row)
        try:
            body = self._ahead.popleft().result()
        except _FailedError as failure:
            self._outage.note(failure, self._urls[row])
            raise failure.reject from None
        self._outage.end()
        self._memory.give_back(len(body))
        return body

    def _fetch(self, row: int) -> bytearray:
        try:
            url = parse_url(self._urls[row])
            return self._fetch_patiently(row, url)
        except RejectedError as reject:
            raise _FailedError(reject, cause=reject.reason, passing=False) from None

    def _fetch_patiently(self, row: int, url: Url) -> bytearray:
        dead = not url.is_store and self._failed_hosts[url.origin] >= DEAD_HOST
        tries = 1 if dead else 1 + self._options.retries
        failure = RetryError("")
        for number in range(tries):
            if number:
                self._pause(url, number, failure.pause_s)
            try:
                body = self._fetch_once(row, url)
            except RetryError as error:
                failure = error
            else:
                self._failed_hosts[url.origin] = 0
                return body
        self._failed_hosts[url.origin] += 1
        after = f" after {tries} tries" if tries > 1 else ""
        reject = RejectedError("unreachable", f"{failure}{after}")
        raise _FailedError(reject, cause=failure.cause, passing=True)

    def _fetch_once(self, row: int, url: Url) -> bytearray:
        """One try, begun again where its memory is granted only when the row's turn has come."""
        while True:
            grant = _Grant(self._memory, row, self._max_bytes)
            try:
                body = bytearray()
                if url.is_store:
                    self._stores.get(url, body, grant.grow, max_bytes=self._max_bytes)
                else:
                    self._http().get(url, body, grant.grow)
                grant.keep(len(body))
                return body
            except _LaterError:
                grant.keep(0)
                self._memory.wait_for_turn(row)
            except BaseException:
                grant.keep(0)
                raise

    def _http(self) -> HttpClient:
        client: HttpClient | None = getattr(self._local, "client", None)
        if client is None:
            client = self._local.client = HttpClient(self._options)
            self._clients.append(client)
        return client

    def _pause(self, url: Url, number: int, asked_s: float) -> None:
        """Wait before try `number`; who waits how long is the same in every run."""
        jitter = random.Random(f"{url.origin}/{url.target}/{number}").uniform(0.5, 1.5)
        pause_s = min(self._options.backoff_s * 2 ** (number - 1) * jitter, _LAST_PAUSE_S)
        if self._closed.wait(max(pause_s, asked_s)):
            raise RetryError("stopped")


class _FailedError(Exception):
    def __init__(self, reject: RejectedError, *, cause: str, passing: bool) -> None:
        super().__init__(str(reject))
        self.reject = reject
        self.cause = cause
        self.passing = passing


class _LaterError(Exception):
    """There is no memory for this body before its turn."""


class _Memory:
    """Grants of bytes to rows; the row whose turn it is always gets what it asks for, so nothing can lock."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._used = 0
        self._turn = 0
        self._closed = False
        self._changed = threading.Condition()

    def take(self, row: int, num_bytes: int) -> bool:
        """Are so many bytes more granted to this row now?"""
        with self._changed:
            if self._used + num_bytes > self._limit and row != self._turn:
                return False
            self._used += num_bytes
            return True

    def take_patiently(self, row: int, num_bytes: int) -> None:
        with self._changed:
            while self._used + num_bytes > self._limit and row != self._turn and not self._closed:
                self._changed.wait()
            self._stop_if_closed()
            self._used += num_bytes

    def wait_for_turn(self, row: int) -> None:
        with self._changed:
            while row != self._turn and not self._closed:
                self._changed.wait()
            self._stop_if_closed()

    def give_back(self, num_bytes: int) -> None:
        with self._changed:
            self._used -= num_bytes
            self._changed.notify_all()

    def turn_to(self, row: int) -> None:
        with self._changed:
            self._turn = row
            self._changed.notify_all()

    def close(self) -> None:
        """Whoever waits for memory gets RetryError."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def _stop_if_closed(self) -> None:
        if self._closed:
            raise RetryError("stopped")


class _Grant:
    """The bytes that one fetch may hold."""

    def __init__(self, memory: _Memory, row: int, max_bytes: int) -> None:
        self._memory = memory
        self._row = row
        self._max_bytes = max_bytes
        self._granted = GRANT_BYTES
        memory.take_patiently(row, GRANT_BYTES)

    def grow(self, num_bytes: int) -> None:
        """Raises RejectedError for too many bytes, _LaterError where they must wait."""
        if num_bytes > self._max_bytes + 1:
            raise RejectedError("too many bytes", f"more than {self._max_bytes}")
        if num_bytes > self._granted:
            more = max(num_bytes - self._granted, min(self._granted, self._max_bytes - self._granted))
            if not self._memory.take(self._row, more):
                raise _LaterError
            self._granted += more

    def keep(self, num_bytes: int) -> None:
        """Give back what is not needed for so many bytes. Raises RejectedError for too many."""
        self._memory.give_back(self._granted - num_bytes)
        self._granted = num_bytes
        if num_bytes > self._max_bytes:
            self.keep(0)
            raise RejectedError("too many bytes", f"more than {self._max_bytes}")


class _Outage:
    """Tells an outage from bad luck by failures in a row that are alike."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._cause = ""
        self._num_alike = 0
        self._any_good = False

    def end(self) -> None:
        self._any_good = True
        self._num_alike = 0

    def note(self, failure: _FailedError, url: str) -> None:
        self._num_alike = self._num_alike + 1 if failure.cause == self._cause else 1
        self._cause = failure.cause
        if self._num_alike >= self._limit and (failure.passing or not self._any_good):
            raise UserError(
                f"{self._num_alike} images in a row could not be fetched, all for one cause: "
                f"{failure.reject}, such as {show_url(url)}; mend that (network, credentials), or take "
                f"them out of the source"
            )
