"""Servers on loopback that tests fetch from: files with every fault that a network has, and S3."""

from __future__ import annotations

import contextlib
import re
import socket
import ssl
import threading
import time
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

STALL_S = 5.0


class FaultyServer(ThreadingHTTPServer):
    """Serves `files` by name; the first part of a path says what goes wrong.

    /ok/NAME  /chunked/NAME  /flaky/N/NAME (HTTP 500 N times)  /busy/N/NAME (503 with Retry-After: 0)
    /drop/NAME (half of it, then the end)  /short/NAME (Content-Length too large)
    /long/NAME (Content-Length too small)  /lie/N/NAME (Content-Length N, then silence)
    /stall/... (headers never come)  /drip/... (a byte of the header now and then)  /headers/... (no end of
    them)  /endless/... (a body without end)  /once/NAME (the connection dies after each answer, unannounced)
    /ranged/NAME (whole or by ranges)  /broken/N/NAME (the same, but the connection dies after N bytes)
    /deaf/N/NAME (knows no ranges; the first answer to more than a byte dies after N bytes)
    /redirect/STATUS?to=URL  /loop/...  /status/N/...
    """

    daemon_threads = True
    block_on_close = False
    request_queue_size = 128

    def __init__(self, files: dict[str, bytes], *, context: ssl.SSLContext | None = None) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.files = files
        self.hits: Counter[str] = Counter()
        """Requests by path."""
        self.ranges: list[tuple[str, int, int]] = []
        """(name, first byte, bytes sent) of every answer to /ranged and /broken."""
        self.versions: dict[str, str] = {}
        """ETags by name."""
        self.authorizations: list[str | None] = []
        """The Authorization header of every request."""
        self.num_connections = 0
        self.most_at_once = 0
        self.now = 0
        self.pause_s = 0.0
        """Before every answer."""
        self.lock = threading.Lock()
        self.stopping = threading.Event()
        if context:
            self.socket = context.wrap_socket(self.socket, server_side=True)

    def url(self, path: str, *, host: str = "127.0.0.1", scheme: str = "http") -> str:
        return f"{scheme}://{host}:{self.server_address[1]}/{path}"

    def get_request(self) -> tuple[socket.socket, tuple[str, int]]:
        self.num_connections += 1
        return super().get_request()

    def handle_error(self, request: object, client_address: object) -> None:
        """Clients that hang up are part of the tests."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: FaultyServer

    def setup(self) -> None:
        super().setup()
        self.connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        server = self.server
        with server.lock:
            server.hits[self.path] += 1
            server.authorizations.append(self.headers.get("Authorization"))
            server.now += 1
            server.most_at_once = max(server.most_at_once, server.now)
        try:
            if server.pause_s:
                server.stopping.wait(server.pause_s)
            self._answer(*urlsplit(self.path).path.strip("/").split("/"))
        finally:
            with server.lock:
                server.now -= 1

    def _answer(self, fault: str, *words: str) -> None:
        name = words[-1] if words else ""
        data = self.server.files.get(name, b"")
        if fault in ("flaky", "busy") and self.server.hits[self.path] <= int(words[0]):
            self._send(500 if fault == "flaky" else 503, b"later", {"Retry-After": "0"})
        elif fault == "status":
            self._send(int(words[0]), b"as you wish")
        elif fault == "redirect":
            to = parse_qs(urlsplit(self.path).query)["to"][0]
            self._send(int(words[0]), b"", {"Location": to})
        elif fault == "loop":
            self._send(302, b"", {"Location": f"{self.path}x"})
        elif method := getattr(self, f"_{fault}", None):
            self.close_connection = True
            with contextlib.suppress(OSError):
                method(data, words)
        elif name in self.server.files:
            self._send(200, data)
        else:
            self._send(404, b"no such file")

    def _send(self, status: int, data: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for key, value in ({"Content-Length": str(len(data))} | (headers or {})).items():
            self.send_header(key, value)
        self.end_headers()
        self.wfile.write(data)

    def _head(self, length: int | None = None) -> None:
        self.wfile.write(b"HTTP/1.1 200 OK\r\n")
        self.wfile.write(b"\r\n" if length is None else b"Content-Length: %d\r\n\r\n" % length)

    def _once(self, data: bytes, words: tuple[str, ...]) -> None:
        self._head(len(data))
        self.wfile.write(data)

    def _ranged(self, data: bytes, words: tuple[str, ...], limit: int | None = None) -> None:
        if words[-1] not in self.server.files:
            self._send(404, b"no such file")
            return
        found = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        first, last = (int(found[1]), int(found[2] or len(data) - 1)) if found else (0, len(data) - 1)
        part = data[first : last + 1]
        if found and not part:
            self._send(416, b"")
            return
        with self.server.lock:
            self.server.ranges.append((words[-1], first, len(part[:limit])))
        version = self.server.versions.get(words[-1], "v1")
        status = "206 Partial Content" if found else "200 OK"
        head = f"HTTP/1.1 {status}\r\nContent-Length: {len(part)}\r\nETag: {version}\r\n"
        if found:
            head += f"Content-Range: bytes {first}-{first + len(part) - 1}/{len(data)}\r\n"
        self.wfile.write(head.encode() + b"\r\n" + part[:limit])

    def _broken(self, data: bytes, words: tuple[str, ...]) -> None:
        self._ranged(data, words, int(words[0]))

    def _deaf(self, data: bytes, words: tuple[str, ...]) -> None:
        num_before = self.server.hits[self.path]
        del self.headers["Range"]
        self._ranged(data, words, int(words[0]) if num_before <= 2 else None)

    def _chunked(self, data: bytes, words: tuple[str, ...]) -> None:
        self.wfile.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
        for start in range(0, len(data), 100):
            part = data[start : start + 100]
            self.wfile.write(b"%x\r\n%b\r\n" % (len(part), part))
        self.wfile.write(b"0\r\n\r\n")

    def _drop(self, data: bytes, words: tuple[str, ...]) -> None:
        self._head(len(data))
        self.wfile.write(data[: len(data) // 2])

    def _short(self, data: bytes, words: tuple[str, ...]) -> None:
        self._head(len(data) + 100)
        self.wfile.write(data)

    def _long(self, data: bytes, words: tuple[str, ...]) -> None:
        self._head(len(data) - 10)
        self.wfile.write(data)

    def _lie(self, data: bytes, words: tuple[str, ...]) -> None:
        self._head(int(words[0]))
        self.server.stopping.wait(STALL_S)

    def _stall(self, data: bytes, words: tuple[str, ...]) -> None:
        self.server.stopping.wait(STALL_S)

    def _drip(self, data: bytes, words: tuple[str, ...]) -> None:
        self.wfile.write(b"HTTP/1.1 200 OK\r\nX: ")
        end = time.monotonic() + STALL_S
        while time.monotonic() < end and not self.server.stopping.wait(0.02):
            self.wfile.write(b"x")

    def _headers(self, data: bytes, words: tuple[str, ...]) -> None:
        self.wfile.write(b"HTTP/1.1 200 OK\r\n")
        for _ in range(60):
            self.wfile.write(b"X: %b\r\n" % (b"x" * 4000))

    def _endless(self, data: bytes, words: tuple[str, ...]) -> None:
        self._head()
        while not self.server.stopping.is_set():
            self.wfile.write(bytes(1 << 16))


@contextlib.contextmanager
def serve(files: dict[str, bytes], *, context: ssl.SSLContext | None = None) -> Iterator[FaultyServer]:
    """A FaultyServer on a port of its own, until the block ends."""
    server = FaultyServer(files, context=context)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.stopping.set()
        server.shutdown()
        thread.join()
        server.server_close()


@contextlib.contextmanager
def serve_s3() -> Iterator[str]:
    """The endpoint of an S3 server in this process, empty at first."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        yield f"http://{host}:{port}"
    finally:
        server.stop()


def s3_environment(endpoint: str) -> dict[str, str]:
    """The variables by which every S3 client, here and in child processes, finds the server of serve_s3."""
    return {
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_ACCESS_KEY_ID": "testing",
        "AWS_SECRET_ACCESS_KEY": "testing",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_CONFIG_FILE": str(Path("/nonexistent/config")),
        "AWS_SHARED_CREDENTIALS_FILE": str(Path("/nonexistent/credentials")),
    }
