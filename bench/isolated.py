"""A benchmark in a process of its own: it may hang, crash or run too long, and the next one runs."""

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from typing import IO

from linerate.bench.machine import machine
from linerate.bench.record import Record, from_json


def run_isolated(name: str, options: Sequence[str], *, suite: str, limit_s: float) -> Iterator[Record]:
    """The records of `linerate bench run NAME OPTIONS`, as they are measured.

    What it measured before it failed, or before limit_s was over, counts; then comes a record that says so.
    """
    if limit_s <= 0:
        yield _failed(name, suite, "no time was left for it")
        return
    command = [sys.executable, "-m", "linerate", "bench", "run", name, *options, "--suite", suite, "--json"]
    deadline = time.monotonic() + limit_s
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=errors, text=True, start_new_session=True
        )
        try:
            lines = _lines(process)
            while True:
                try:
                    line = lines.get(timeout=max(0.0, deadline - time.monotonic()))
                except queue.Empty:
                    yield _failed(name, suite, f"it ran past its limit of {limit_s:g} s")
                    return
                if line is None:
                    break
                yield from_json(json.loads(line))
            code = process.wait()
        finally:
            _end(process)
        errors.seek(0)
        said = errors.read()
    # 1 says that sides disagree, which their records tell.
    if code not in (0, 1) or (code == 1 and "Traceback" in said):
        last = next((line.strip() for line in reversed(said.splitlines()) if line.strip()), "nothing")
        yield _failed(name, suite, f"it ended with exit code {code} and said: {last[:300]}")


def _lines(process: "subprocess.Popen[str]") -> "queue.Queue[str | None]":
    """The lines of its output as they come, None at the end."""
    found: queue.Queue[str | None] = queue.Queue()

    def read(stream: IO[str]) -> None:
        for line in stream:
            if line.startswith("{"):
                found.put(line)
        found.put(None)

    threading.Thread(target=read, args=(process.stdout,), daemon=True).start()
    return found


def _end(process: "subprocess.Popen[str]") -> None:
    """With all that it started: workers of loaders would hold the GPU's memory."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    if process.stdout is not None:
        process.stdout.close()


def _failed(name: str, suite: str, why: str) -> Record:
    return Record(name=name, peer=None, work=name, unit="", refused=why, suite=suite, machine=machine())
