"""A loopback HTTP server of one folder that drops, stalls, truncates and refuses as it is told."""

import re
import threading
import time
from collections import Counter
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

STALL_S = 30.0


class FlakyServer:
    """`trouble(name, nth)` says what happens to the nth request for a file: a word of _Handler, or None."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.trouble: Callable[[str, int], str | None] = lambda name, nth: None
        self.delay_s = 0.0
        self.requests: list[tuple[str, int, int]] = []
        """(name, first byte, bytes sent) of every GET, as far as it got."""
        self.counts: Counter[str] = Counter()
        self.lock = threading.Lock()
        self.stopping = threading.Event()
        owner = self

        class Handler(_Handler):
            server_of = owner

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02})
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def sent(self, name: str) -> int:
        """Bytes of the file that went out in all."""
        with self.lock:
            return sum(sent for asked, _, sent in self.requests if asked == name)

    def __enter__(self) -> "FlakyServer":
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.stopping.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server_of: FlakyServer

    def log_message(self, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, *, body: bool) -> None:
        owner, name = self.server_of, self.path.rpartition("/")[2]
        path = owner.root / name
        trouble = None
        if body:
            with owner.lock:
                trouble = owner.trouble(name, owner.counts[name])
                owner.counts[name] += 1
        if trouble in ("403", "500") or not path.is_file():
            self._refuse(int(trouble or 404))
            return
        data = path.read_bytes()
        found = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        first, last = (int(found[1]), int(found[2])) if found else (0, len(data) - 1)
        if trouble == "whole":
            found, first, last = None, 0, len(data) - 1
        part = data[first : last + 1]
        if trouble == "corrupt":
            part = bytes([part[0] ^ 1]) + part[1:]
        if trouble == "truncate":  # as a proxy that lost the end and says so
            part = part[: len(part) // 2]
        if not part and found:
            self._refuse(416)
            return
        self.send_response(206 if found else 200)
        self.send_header("Content-Length", str(len(part)))
        self.end_headers()
        if body:
            self._send(part, trouble, first, name)

    def _send(self, part: bytes, trouble: str | None, first: int, name: str) -> None:
        owner = self.server_of
        time.sleep(owner.delay_s)
        if trouble in ("drop", "stall"):
            part = part[: len(part) // 2]
        with owner.lock:
            owner.requests.append((name, first, len(part)))
        try:
            self.wfile.write(part)
            self.wfile.flush()
            if trouble == "stall":
                owner.stopping.wait(STALL_S)
        except OSError:
            pass
        if trouble in ("drop", "stall"):
            self.close_connection = True

    def _refuse(self, status: int) -> None:
        self.send_response(status)
        self.send_header("Content-Length", "0")
        self.end_headers()
