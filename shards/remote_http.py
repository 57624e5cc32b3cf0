"""One image by HTTP: checked addresses, bounded redirects, headers, time and bytes.

The standard library's parser on a socket of our own: a client that resolves names itself could be led to an
address that was not checked.
"""

from __future__ import annotations

import base64
import contextlib
import io
import math
import re
import socket
import ssl
import time
from collections import OrderedDict
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from http.client import HTTPException, HTTPResponse
from typing import Any, cast
from urllib.parse import urljoin

from linerate.shards.addresses import resolve
from linerate.shards.fetch_options import FetchOptions
from linerate.shards.inspect_image import RejectedError
from linerate.shards.remote_url import HTTP_PORTS, Url, parse_url, show_url

MAX_REDIRECTS = 5
MAX_HEAD_BYTES = 1 << 16
MAX_KEPT = 8
# One try may take so many times the time-out, however steadily bytes drip.
WHOLE_TRY = 6
CHUNK_BYTES = 1 << 18
_REDIRECTS = frozenset({301, 302, 303, 307, 308})
_GONE = frozenset({404, 410})
_FORBIDDEN = frozenset({401, 402, 403, 407, 451})
_TRY_AGAIN = frozenset({408, 425, 429})
_MAX_PAUSE_S = 60.0


class RetryError(Exception):
    """This try failed, another one may not.

    cause: what kind of failure it is, the same text for all of its kind.
    """

    def __init__(self, cause: str, detail: str = "", *, pause_s: float = 0.0) -> None:
        super().__init__(f"{cause} ({detail})" if detail else cause)
        self.cause = cause
        self.pause_s = pause_s


@dataclass(frozen=True)
class Answer:
    """What the head of an answer tells of the whole file."""

    total: int | None
    """Its bytes; None where the server does not say."""
    version: str
    """Its ETag or the time of its last change; empty where the server tells neither."""


class HttpClient:
    """The connections of one thread, kept open between images. Close it when the thread ends."""

    def __init__(self, options: FetchOptions) -> None:
        self._options = options
        self._kept: OrderedDict[str, _Connection] = OrderedDict()
        self._current: _Connection | None = None
        self._stopped = False
        self._chunk = memoryview(bytearray(CHUNK_BYTES))
        self._tls: ssl.SSLContext | None = None

    def get(self, url: Url, body: bytearray, grow: Callable[[int], None]) -> None:
        """Append what the URL holds to `body`.

        grow: called with the new length before the body gets longer, and with what the server says the
        length will be; what it raises ends the fetch.
        Raises RejectedError for what is so for good, RetryError for what may pass.
        """
        deadline = time.monotonic() + WHOLE_TRY * self._options.timeout_s
        first = url
        for _ in range(1 + MAX_REDIRECTS):
            # The name and password belong to the URL that had them; a redirect's own are not used.
            userinfo = first.userinfo if url is first else None
            target = self._get_one(url, userinfo, deadline, body, grow)
            if target is None:
                return
            url = _redirected(url, target)
        raise RejectedError("redirected", f"more than {MAX_REDIRECTS} times")

    def ask(self, url: Url) -> Answer:
        """What lies there, told by one byte of it: HEAD is refused by signed URLs. Errors: as `get`."""
        with contextlib.closing(self.stream(url, 0, end=1)) as chunks:
            answer = next(chunks)
        assert isinstance(answer, Answer)
        return answer

    def stream(self, url: Url, start: int, *, end: int | None = None) -> Generator[Answer | bytes]:
        """First what the answer tells of the file, then its bytes from `start` on, in chunks.

        A server that knows no ranges sends what lies before `start` too; that is dropped here. There is no
        limit to the whole time, only to the time in which nothing comes. Errors: as `get`.
        """
        if start == 0 and end is None:
            wanted = []
        else:
            wanted = [f"Range: bytes={start}-{'' if end is None else end - 1}"]
        first = url
        for _ in range(1 + MAX_REDIRECTS):
            userinfo = first.userinfo if url is first else None
            connection, response = self._answer(url, _request(url, userinfo, wanted), math.inf)
            try:
                if response.status in _REDIRECTS and (target := response.headers.get("Location")):
                    url = _redirected(url, target)
                    continue
                answer, skipped = _judge_range(response, start)
                yield answer
                yield from self._body_chunks(response, skipped)
                return
            except HTTPException as error:
                raise RetryError("cut short", type(error).__name__) from None
            except TimeoutError:
                raise RetryError("timed out") from None
            except OSError as error:
                raise RetryError("connection lost", error.strerror or type(error).__name__) from None
            finally:
                response.close()
                self._put_back(url.origin, connection, keep=False)
        raise RejectedError("redirected", f"more than {MAX_REDIRECTS} times")

    def _body_chunks(self, response: HTTPResponse, skipped: int) -> Iterator[bytes]:
        while num := response.readinto(self._chunk):
            if skipped < num:
                yield bytes(self._chunk[skipped:num])
            skipped = max(0, skipped - num)
        if response.length:
            raise RetryError("cut short", f"{response.length} bytes are missing")

    def abort(self) -> None:
        """End what is under way, from another thread; it and all that follows fail with RetryError."""
        self._stopped = True
        if connection := self._current:
            connection.abort()

    def close(self) -> None:
        for connection in self._kept.values():
            connection.close()
        self._kept.clear()

    def _get_one(
        self,
        url: Url,
        userinfo: tuple[str, str] | None,
        deadline: float,
        body: bytearray,
        grow: Callable[[int], None],
    ) -> str | None:
        """Where a redirect leads; None when the body is there."""
        request = _request(url, userinfo)
        connection, response = self._answer(url, request, deadline)
        keep = False
        try:
            status = response.status
            if status == 200:
                self._read_body(response, body, grow)
            else:
                # A short page of excuses is read, so that the connection can be used again.
                short = response.length is not None and response.length <= MAX_HEAD_BYTES
                keep = short and not response.will_close and response.read() is not None
                if status in _REDIRECTS and (target := response.headers.get("Location")):
                    return str(target)
                raise _judged(status, response.headers.get("Retry-After", ""))
            keep = not response.will_close
            return None
        except HTTPException as error:
            raise RetryError("cut short", type(error).__name__) from None
        except TimeoutError:
            raise RetryError("timed out") from None
        except OSError as error:
            raise RetryError("connection lost", error.strerror or type(error).__name__) from None
        finally:
            response.close()
            self._put_back(url.origin, connection, keep=keep)

    def _answer(self, url: Url, request: bytes, deadline: float) -> tuple[_Connection, HTTPResponse]:
        """The head of an answer, over a kept connection or, where it went stale, over a new one."""
        kept = self._current = self._kept.pop(url.origin, None)
        if kept is not None:
            with contextlib.suppress(OSError, HTTPException):
                return kept, kept.ask(request, deadline)
            kept.close()
        connection = self._current = self._connect(url, deadline)
        try:
            if self._stopped:
                raise TimeoutError
            return connection, connection.ask(request, deadline)
        except TimeoutError:
            connection.close()
            raise RetryError("timed out") from None
        except HTTPException as error:
            connection.close()
            raise RetryError("no HTTP answer", type(error).__name__) from None
        except OSError as error:
            connection.close()
            raise RetryError("connection lost", error.strerror or type(error).__name__) from None

    def _connect(self, url: Url, deadline: float) -> _Connection:
        try:
            places = resolve(url.host, url.port, allow_private=self._options.allow_private)
        except (socket.gaierror, UnicodeError) as error:
            raise RetryError("name not resolved", str(getattr(error, "strerror", error))) from None
        problem: OSError = OSError("no address")
        for family, where in places:
            sock = socket.socket(family, socket.SOCK_STREAM)
            try:
                sock.settimeout(min(self._options.timeout_s, max(deadline - time.monotonic(), 0.001)))
                sock.connect(where)
                if url.scheme == "https":
                    sock = self._context().wrap_socket(sock, server_hostname=url.host)
            except ssl.SSLCertVerificationError as error:
                sock.close()
                raise RejectedError("unreachable", f"its certificate: {error.verify_message}") from None
            except OSError as error:
                sock.close()
                problem = error
                continue
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            return _Connection(sock, self._options.timeout_s)
        if isinstance(problem, TimeoutError):
            raise RetryError("timed out", "no connection")
        raise RetryError("no connection", problem.strerror or type(problem).__name__)

    def _context(self) -> ssl.SSLContext:
        if self._tls is None:
            self._tls = ssl.create_default_context()
        return self._tls

    def _read_body(self, response: HTTPResponse, body: bytearray, grow: Callable[[int], None]) -> None:
        expected = response.length
        if expected is not None:
            grow(expected)
        while num := response.readinto(self._chunk):
            grow(len(body) + num)
            body += self._chunk[:num]
        if expected is not None and len(body) != expected:
            raise RetryError("cut short", f"{len(body)} of {expected} bytes")

    def _put_back(self, origin: str, connection: _Connection, *, keep: bool) -> None:
        self._current = None
        if not keep:
            connection.close()
            return
        self._kept[origin] = connection
        if len(self._kept) > MAX_KEPT:
            self._kept.popitem(last=False)[1].close()


class _Connection:
    """A socket whose every read is bounded in time, and in bytes until the head of an answer is over."""

    def __init__(self, sock: socket.socket, timeout_s: float) -> None:
        self._sock = sock
        self._timeout_s = timeout_s
        self._deadline = 0.0
        self._limit_s = 0.0
        self._head_bytes: int | None = None

    def ask(self, request: bytes, deadline: float) -> HTTPResponse:
        self._deadline = deadline
        self._head_bytes = MAX_HEAD_BYTES
        self._limit_time()
        self._sock.sendall(request)
        response = HTTPResponse(cast(socket.socket, self), method="GET")
        try:
            response.begin()
        except BaseException:
            response.close()
            raise
        self._head_bytes = None
        return response

    def makefile(self, mode: str) -> io.BufferedReader:
        return io.BufferedReader(_Stream(self))

    def read_into(self, view: Any) -> int:
        self._limit_time()
        num = self._sock.recv_into(view)
        if self._head_bytes is not None:
            self._head_bytes -= num
            if self._head_bytes < 0:
                raise HTTPException(f"headers of more than {MAX_HEAD_BYTES} bytes")
        return num

    def abort(self) -> None:
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self._sock.close()

    def _limit_time(self) -> None:
        left = self._deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError
        limit_s = min(left, self._timeout_s)
        if limit_s != self._limit_s:  # a system call
            self._sock.settimeout(limit_s)
            self._limit_s = limit_s


class _Stream(io.RawIOBase):
    """Closing it leaves the socket open for the next answer."""

    def __init__(self, connection: _Connection) -> None:
        self._connection = connection

    def readable(self) -> bool:
        return True

    def readinto(self, view: Any) -> int:
        return self._connection.read_into(view)


def _request(url: Url, userinfo: tuple[str, str] | None, more: Sequence[str] = ()) -> bytes:
    lines = [
        f"GET {url.target} HTTP/1.1",
        f"Host: {url.authority}",
        "User-Agent: linerate (image fetcher)",
        "Accept: image/*, */*;q=0.5",
        "Accept-Encoding: identity",
        *more,
    ]
    if userinfo is not None:
        secret = base64.b64encode(":".join(userinfo).encode()).decode()
        lines.append(f"Authorization: Basic {secret}")
    return "\r\n".join([*lines, "", ""]).encode("ascii")


def _judge_range(response: HTTPResponse, start: int) -> tuple[Answer, int]:
    """(what the answer tells of the file, how many of its bytes come before `start`)."""
    headers = response.headers
    version = str(headers.get("ETag") or headers.get("Last-Modified") or "")
    if response.status == 200:
        return Answer(response.length, version), start
    if response.status == 206:
        found = re.fullmatch(r"bytes (\d+)-\d+/(\d+)", str(headers.get("Content-Range", "")))
        if found and int(found[1]) <= start:
            return Answer(int(found[2]), version), start - int(found[1])
        raise RejectedError("unreachable", "HTTP 206 without a Content-Range of what was asked for")
    if response.status == 416:
        raise RejectedError("no bytes", "the file is empty, or shorter than before (HTTP 416)")
    raise _judged(response.status, headers.get("Retry-After", ""))


def _redirected(url: Url, target: str) -> Url:
    try:
        whole = urljoin(f"{url.origin}{url.target}", target.strip())
    except ValueError as error:  # an IPv6 address that is none
        raise RejectedError("redirected", f"to what is no URL: {error}") from None
    try:
        new = parse_url(whole)
    except RejectedError as error:
        raise RejectedError("redirected", f"to {show_url(whole)}: {error.detail}") from None
    if new.scheme not in HTTP_PORTS:
        raise RejectedError("redirected", f"to {show_url(whole)}; from http only http and https are followed")
    return new


def _judged(status: int, retry_after: str) -> RejectedError | RetryError:
    said = f"HTTP {status}"
    if status in _GONE:
        return RejectedError("not found", said)
    if status in _FORBIDDEN:
        return RejectedError("forbidden", said)
    if status in _TRY_AGAIN or status >= 500:
        pause_s = min(float(retry_after), _MAX_PAUSE_S) if retry_after.isdecimal() else 0.0
        return RetryError(said, pause_s=pause_s)
    return RejectedError("unreachable", said)
