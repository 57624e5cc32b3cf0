"""A worker process of the supervisor in engines.py: tasks from a pipe, results into it."""

from __future__ import annotations

import errno
import functools
import importlib
import os
import signal
import threading
import traceback
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

from linerate.shards.errors import UserError

# The task's function gets the task and a function that takes progress (an amount, in the caller's unit).
Report = Callable[[int], None]
TaskFunction = Callable[[Any, Report], Any]
# A disk that is full, or a folder that may not be written, stays so: the run stops instead of retrying.
_HOPELESS = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EFBIG})


@dataclass(frozen=True)
class TaskFailure:
    """Why a task did not end well; `text` is one line, `trace` the worker's traceback if there is one."""

    kind: str
    text: str
    errno: int | None = None
    trace: str = ""

    @property
    def hopeless(self) -> bool:
        """No other attempt can succeed, nor any other task."""
        return self.kind == "UserError" or self.errno in _HOPELESS


def load_function(name: str) -> TaskFunction:
    module, _, attribute = name.partition(":")
    function: TaskFunction = getattr(importlib.import_module(module), attribute)
    return function


def describe(error: BaseException) -> TaskFailure:
    """An exception as plain data, for the pipe."""
    kind = "UserError" if isinstance(error, UserError) else type(error).__name__
    name = getattr(error, "filename", None)
    text = (
        f"{error.strerror}{f': {os.fsdecode(name)}' if name else ''}"
        if isinstance(error, OSError)
        else str(error)
    )
    return TaskFailure(
        kind,
        " ".join(f"{text}".split()),
        getattr(error, "errno", None),
        "".join(traceback.format_exception(error)),
    )


def serve() -> None:
    """The life of a worker process: tasks from the pipe until the pipe ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the supervisor's to handle
    threading.Thread(target=_die_with_parent, daemon=True).start()
    number, function_name = os.environ["LINERATE_WORKER"].split(" ", 1)
    pipe = Connection(int(number))
    function = load_function(function_name)
    lock = threading.Lock()  # the background thread answers on the same pipe

    def send(kind: str, index: int, payload: Any = None) -> None:
        with lock:
            pipe.send((kind, index, payload))

    def settle(index: int, rest: Callable[[], Any]) -> None:
        try:
            result = rest()
        except Exception as error:
            send("failed", index, describe(error))
        else:
            send("done", index, result)

    pending: Future[None] | None = None
    with ThreadPoolExecutor(1) as background:
        while True:
            try:
                index, task, alone = pipe.recv()
            except (EOFError, OSError):  # the supervisor is gone
                return
            if pending and alone:
                pending.result()
            try:
                result = function(task, functools.partial(send, "progress", index))
            except Exception as error:
                send("failed", index, describe(error))
            else:
                if pending:  # at most one shard waits for the disk
                    pending.result()
                pending = background.submit(settle, index, result) if callable(result) else None
                if not pending:
                    send("done", index, result)
            send("free", index)


def _die_with_parent() -> None:
    """The supervisor holds the other end of stdin; when it dies, however it dies, so does the worker."""
    os.read(0, 1)
    os._exit(1)
