"""The bytes of one URL in their order, once; where a connection breaks, on from the byte that it reached."""

from __future__ import annotations

import contextlib
import functools
import random
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from linerate.shards.errors import UserError
from linerate.shards.fetch_options import FetchOptions
from linerate.shards.inspect_image import RejectedError
from linerate.shards.remote_http import Answer, HttpClient, RetryError
from linerate.shards.remote_store import StoreClient
from linerate.shards.remote_url import Url, parse_url, show_url

# Of an object store, which answers ranges in parallel; what is held of one stream is their product.
PART_BYTES = 8 << 20
PARTS_AHEAD = 4
_LAST_PAUSE_S = 60.0
T = TypeVar("T")


@dataclass(frozen=True)
class RemoteFile:
    """What lies at a URL, as told before it is read."""

    url: str
    size: int
    """Bytes."""
    version: str
    """ETag or time of its last change; empty where the server tells neither."""


def ask_file(url: str, options: FetchOptions) -> RemoteFile:
    """What lies there now. Raises UserError where nothing does, or where it may not be read."""
    with _errors_of(url):
        return _ask(url, options)


def find_file(url: str, options: FetchOptions) -> RemoteFile | None:
    """As ask_file, but None where nothing lies there that may be read."""
    try:
        return _ask(url, options)
    except RejectedError:
        return None


def _ask(url: str, options: FetchOptions) -> RemoteFile:
    parts = parse_url(url)
    if parts.is_store:
        size, version = _patiently(lambda: StoreClient(options).ask(parts), url, options)
        return RemoteFile(url, size, version)
    answer = _patiently(lambda: _ask_http(parts, options), url, options)
    if answer.total is None:
        raise UserError(f"{show_url(url)}: the server does not say how long it is; download it first")
    return RemoteFile(url, answer.total, answer.version)


def stream(file: RemoteFile, options: FetchOptions) -> Generator[bytes]:
    """All bytes of the file, in order, in chunks of at most 8 MiB.

    Tried again `options.retries` times at every byte where it stops. Raises UserError where that does not
    help, and where the file is no longer the one that was asked about.
    """
    with _errors_of(file.url):
        parts = parse_url(file.url)
        chunks = _store_chunks(parts, file, options) if parts.is_store else _http_chunks(parts, file, options)
        yield from chunks


def download(
    file: RemoteFile,
    path: Path,
    options: FetchOptions,
    *,
    on_bytes: Callable[[int], None] = lambda size: None,
) -> None:
    """Write the whole file; what lies at `path` is whole or was there before."""
    temp = path.with_name(f".{path.name}.tmp")
    try:
        with temp.open("wb") as out:
            for chunk in stream(file, options):
                out.write(chunk)
                on_bytes(len(chunk))
        temp.replace(path)
    finally:
        temp.unlink(missing_ok=True)


def _http_chunks(url: Url, file: RemoteFile, options: FetchOptions) -> Iterator[bytes]:
    at, failures = 0, 0
    with contextlib.closing(HttpClient(options)) as client:
        while at < file.size:
            try:
                with contextlib.closing(client.stream(url, at)) as chunks:
                    _require_same(file, next(chunks))
                    for chunk in chunks:
                        assert isinstance(chunk, bytes)
                        at, failures = at + len(chunk), 0
                        yield chunk
                if at < file.size:
                    raise RetryError("cut short", f"{at} of {file.size} bytes")
            except RetryError as error:
                failures += 1
                _pause(file.url, failures, error, options)


def _store_chunks(url: Url, file: RemoteFile, options: FetchOptions) -> Iterator[bytes]:
    client = StoreClient(options)

    def part(start: int) -> bytes:
        found, end = [], min(start + PART_BYTES, file.size)
        while start < end:  # a proxy may lose the end and not say so
            read = functools.partial(client.read_range, url, start, end)
            found.append(_patiently(read, file.url, options))
            start += len(found[-1])
        return b"".join(found)

    ahead: deque[Future[bytes]] = deque()
    with ThreadPoolExecutor(PARTS_AHEAD, thread_name_prefix="stream") as pool:
        try:
            for start in range(0, file.size, PART_BYTES):
                ahead.append(pool.submit(part, start))
                if len(ahead) == PARTS_AHEAD:
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
    # Of parts that were read one by one nothing else tells that they belong together.
    size, version = _patiently(lambda: client.ask(url), file.url, options)
    _require_same(file, Answer(total=size, version=version))


def _patiently(function: Callable[[], T], url: str, options: FetchOptions) -> T:
    failures = 0
    while True:
        try:
            return function()
        except RetryError as error:
            failures += 1
            _pause(url, failures, error, options)


def _pause(url: str, failures: int, error: RetryError, options: FetchOptions) -> None:
    if failures > options.retries:
        tries = f" after {failures} tries" if failures > 1 else ""
        raise UserError(f"{show_url(url)} cannot be read: {error}{tries}; the same command again continues")
    jitter = random.Random(f"{url}/{failures}").uniform(0.5, 1.5)
    pause_s = min(options.backoff_s * 2 ** (failures - 1) * jitter, _LAST_PAUSE_S)
    time.sleep(max(pause_s, error.pause_s))


def _ask_http(url: Url, options: FetchOptions) -> Answer:
    with contextlib.closing(HttpClient(options)) as client:
        return client.ask(url)


def _require_same(file: RemoteFile, now: Answer | bytes) -> None:
    assert isinstance(now, Answer)
    if (now.total, now.version) != (file.size, file.version):
        raise UserError(
            f"{show_url(file.url)} changed while it was read ({file.size} bytes before, {now.total} now); "
            f"the same command again begins anew"
        )


@contextlib.contextmanager
def _errors_of(url: str) -> Iterator[None]:
    try:
        yield
    except RejectedError as reject:
        raise UserError(f"the source {show_url(url)} cannot be read: {reject}") from None
