"""Run tasks in processes that may be killed: one pipe per worker, what a dead one held is given out again."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from typing import Any, Literal

from linerate.shards.errors import UserError
from linerate.shards.worker import TaskFailure, TaskFunction, describe, load_function

MAX_ATTEMPTS = 3
# Packed or verified in the half second that a process takes to start.
WORTH_A_PROCESS_BYTES = 64_000_000


OnRetry = Callable[[int, TaskFailure], None]


@dataclass(frozen=True, kw_only=True)
class Engine:
    """Who runs the processes of run_tasks."""

    kind: Literal["local", "ray"] = "local"
    """Processes of this machine under our own supervisor, or tasks of a Ray cluster."""
    ray_address: str = ""
    """Of a running cluster; empty: $RAY_ADDRESS, else a cluster of this machine for this run alone."""

    def __post_init__(self) -> None:
        if self.ray_address and self.kind != "ray":
            raise UserError(f"--ray-address {self.ray_address} needs --engine ray; give both or neither")


LOCAL = Engine()


class StoppedError(Exception):
    """The run stopped early because of a failure that every task would share."""

    def __init__(self, failure: TaskFailure) -> None:
        super().__init__(failure.text)
        self.failure = failure


def default_num_workers() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def choose_num_workers(num_workers: int | None, *, num_bytes: int, may_crash: bool) -> int:
    """What the caller wants; else a process per core, fewer where little is to do.

    Work that is done before a process has started is done here, unless a decoder may crash in it.
    """
    if num_workers is not None:
        return num_workers
    if num_bytes < WORTH_A_PROCESS_BYTES and not may_crash:
        return 0
    return min(default_num_workers(), 1 + num_bytes // WORTH_A_PROCESS_BYTES)


def run_tasks(
    function: str,
    tasks: Sequence[Any],
    *,
    num_workers: int | None,
    on_done: Callable[[int, Any], None],
    on_progress: Callable[[int], None] = lambda amount: None,
    on_retry: OnRetry = lambda index, failure: None,
    engine: Engine = LOCAL,
) -> dict[int, TaskFailure]:
    """Call on_done(index, result) for every task; returns the failures of those that failed three times.

    function: "module:name" of a TaskFunction. When it returns a callable, that is called in a background
    thread of the worker, which goes on with the next task, and the callable's result counts.
    num_workers: 0 runs everything in this process; None is one per core, and on Ray all that the cluster
    has. on_retry(index, failure) hears of every attempt after which there is another.
    Raises StoppedError when no task can succeed.
    """
    if num_workers is not None and num_workers < 0:
        raise UserError(f"--workers is {num_workers}; give 1 or more, or 0 to work in this process")
    if engine.kind == "ray":
        from linerate.shards.ray_engine import run_on_ray

        return run_on_ray(
            function,
            tasks,
            address=engine.ray_address,
            num_workers=num_workers,
            on_done=on_done,
            on_progress=on_progress,
            on_retry=on_retry,
        )
    if num_workers == 0:
        return _run_here(
            load_function(function), tasks, on_done=on_done, on_progress=on_progress, on_retry=on_retry
        )
    supervisor = _Supervisor(function, tasks, on_done, on_progress, on_retry)
    return supervisor.run(min(num_workers or default_num_workers(), len(tasks)))


def _run_here(
    function: TaskFunction,
    tasks: Sequence[Any],
    *,
    on_done: Callable[[int, Any], None],
    on_progress: Callable[[int], None],
    on_retry: OnRetry,
) -> dict[int, TaskFailure]:
    failures = {}
    for index, task in enumerate(tasks):
        for attempt in range(1, MAX_ATTEMPTS + 1):
            seen = 0

            def report(amount: int) -> None:
                nonlocal seen
                seen += amount
                on_progress(amount)

            try:
                result = function(task, report)
                result = result() if callable(result) else result
            except Exception as error:
                on_progress(-seen)
                failures[index] = describe(error)
                if failures[index].hopeless:
                    raise StoppedError(failures[index]) from None
                if attempt < MAX_ATTEMPTS:
                    on_retry(index, failures[index])
            else:
                failures.pop(index, None)
                on_done(index, result)
                break
    return failures


@dataclass
class _Worker:
    process: subprocess.Popen[bytes]
    pipe: Connection
    held: dict[int, int] = field(default_factory=dict)  # task -> progress it has reported
    free: bool = True


@dataclass
class _Supervisor:
    function: str
    tasks: Sequence[Any]
    on_done: Callable[[int, Any], None]
    on_progress: Callable[[int], None]
    on_retry: OnRetry
    waiting: deque[int] = field(default_factory=deque)
    attempts: list[int] = field(default_factory=list)
    failures: dict[int, TaskFailure] = field(default_factory=dict)
    workers: list[_Worker] = field(default_factory=list)
    stopped: TaskFailure | None = None

    def run(self, num_workers: int) -> dict[int, TaskFailure]:
        self.waiting.extend(range(len(self.tasks)))
        self.attempts = [0] * len(self.tasks)
        try:
            while True:
                self._give_out(num_workers)
                busy = {worker.pipe: worker for worker in self.workers if worker.held or not worker.free}
                if not busy:
                    break
                for pipe in wait(list(busy)):
                    self._listen(busy[pipe])  # type: ignore[index]
        finally:
            for worker in self.workers:
                _end(worker)
        if self.stopped:
            raise StoppedError(self.stopped)
        return self.failures

    def _give_out(self, num_workers: int) -> None:
        if self.stopped:
            return
        for worker in self.workers:
            if not self.waiting:
                return
            # A task that failed before runs alone in its worker, so that it drags no other one down.
            if worker.free and not (worker.held and self.attempts[self.waiting[0]]):
                self._send(worker)
        while self.waiting and len(self.workers) < num_workers:
            self.workers.append(_start_worker(self.function))
            self._send(self.workers[-1])

    def _send(self, worker: _Worker) -> None:
        index = self.waiting.popleft()
        alone = self.attempts[index] > 0
        worker.held[index] = 0
        worker.free = False
        try:
            worker.pipe.send((index, self.tasks[index], alone))
        except OSError:  # it died while idle; _listen sees the end of its pipe and requeues
            return

    def _listen(self, worker: _Worker) -> None:
        try:
            kind, index, payload = worker.pipe.recv()
        except (EOFError, OSError):
            self._bury(worker)
            return
        if kind == "progress":
            worker.held[index] += payload
            self.on_progress(payload)
        elif kind == "free":
            worker.free = True
        elif kind == "done":
            del worker.held[index]
            self.failures.pop(index, None)
            self.on_done(index, payload)
        else:
            self._fail(worker, index, payload)

    def _fail(self, worker: _Worker, index: int, failure: TaskFailure) -> None:
        self.on_progress(-worker.held.pop(index))
        self.attempts[index] += 1
        self.failures[index] = failure
        if failure.hopeless:
            self.stopped = self.stopped or failure
        elif self.attempts[index] < MAX_ATTEMPTS:
            self.waiting.append(index)
            self.on_retry(index, failure)

    def _bury(self, worker: _Worker) -> None:
        self.workers.remove(worker)
        _end(worker)
        code = worker.process.returncode
        how = f"was killed by {_signal_name(-code)}" if code < 0 else f"ended with code {code}"
        for index in list(worker.held):
            self._fail(worker, index, TaskFailure("WorkerDied", f"the worker process {how}"))


def _signal_name(number: int) -> str:
    try:
        name = signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
    return f"{name} (often: out of memory)" if name == "SIGKILL" else name


def _start_worker(function: str) -> _Worker:
    ours, theirs = multiprocessing.Pipe()
    # Not multiprocessing.Process: it imports the caller's main script again, which breaks unguarded ones.
    # -P: a file of the working folder named like a standard module must not be imported in its place.
    process = subprocess.Popen(
        [sys.executable, "-P", "-c", "from linerate.shards.worker import serve; serve()"],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        pass_fds=[theirs.fileno()],
        env=os.environ
        | {
            "PYTHONPATH": os.pathsep.join(sys.path),
            "LINERATE_WORKER": f"{theirs.fileno()} {function}",
        },
    )
    theirs.close()
    return _Worker(process, ours)


def _end(worker: _Worker) -> None:
    worker.process.kill()
    worker.process.wait()
    worker.pipe.close()
    if worker.process.stdin:
        worker.process.stdin.close()
