"""Run tasks on a Ray cluster, with the same results and the same ways to fail as our own supervisor."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import os
import pickle
import socket
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from linerate import __version__
from linerate.shards import engines
from linerate.shards.errors import UserError
from linerate.shards.worker import TaskFailure, describe, load_function

# Half a core each: while one task waits for the disk, which is up to half of its time, another computes.
CORES_PER_TASK = 0.5
# So many tasks wait at the cluster beyond those that run, for an autoscaler to see.
WAITING_TASKS = 256
POLL_S = 0.5
CONNECT_LIMIT_S = 30.0


def run_on_ray(
    function: str,
    tasks: Sequence[Any],
    *,
    address: str,
    num_workers: int | None,
    on_done: Callable[[int, Any], None],
    on_progress: Callable[[int], None],
    on_retry: engines.OnRetry,
) -> dict[int, TaskFailure]:
    """engines.run_tasks on the cluster at `address`, or on one of this machine that ends with the call.

    num_workers: how many tasks run at once at most; None for all cores of the cluster, also those that an
    autoscaler adds. What the tasks read and write must lie at the same place on every node.
    Raises UserError where Ray is missing or the cluster cannot be reached, StoppedError as run_tasks does.
    """
    if importlib.util.find_spec("ray") is None:
        raise UserError("--engine ray needs Ray; `pip install 'linerate[ray]'`, or leave --engine out")
    if num_workers == 0:
        raise UserError("--workers 0 works in this process, --engine ray in others; give one of the two")
    if not tasks:
        return {}
    ray = importlib.import_module("ray")
    with _on_stderr(), _connected(ray, address, num_workers):
        run = _Run(ray, function, tasks, on_done, on_progress, on_retry)
        return run.run(num_workers)


@contextlib.contextmanager
def _on_stderr() -> Iterator[None]:
    """What Ray and its processes print to stdout goes to stderr: stdout is the result's alone."""
    sys.stdout.flush()
    kept = os.dup(1)
    try:
        os.dup2(2, 1)
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)


@contextlib.contextmanager
def _connected(ray: Any, address: str, num_workers: int | None) -> Iterator[None]:
    """A connection to the cluster; one that the caller has already is used and kept."""
    if ray.is_initialized():
        yield
        return
    address = address or os.environ.get("RAY_ADDRESS", "")
    if address:
        _require_reachable(address)
    quiet = {"log_to_driver": False, "logging_level": "error"}
    try:
        if address:
            ray.init(address, runtime_env={"env_vars": {"PYTHONPATH": _source_paths()}}, **quiet)
        else:
            with _environment(PYTHONPATH=_source_paths()):
                ray.init(
                    "local",
                    num_cpus=num_workers or engines.default_num_workers(),
                    include_dashboard=False,
                    object_store_memory=100_000_000,  # nothing of size goes through it
                    **quiet,
                )
    except (ConnectionError, ValueError, RuntimeError, ray.exceptions.RayError) as error:
        where = f"the Ray cluster at {address}" if address else "Ray on this machine"
        # Ray gives a token unasked to no address but `auto`; without it all that it says is "failed".
        token = "" if os.environ.get("RAY_AUTH_MODE") else ", RAY_AUTH_MODE=token where it asks for a token"
        raise UserError(
            f"{where} cannot be reached or started ({_first_line(error)}); check --ray-address and that the "
            f"cluster runs the same versions of Ray and Python{token}, or leave --engine out"
        ) from None
    try:
        yield
    finally:
        ray.shutdown()


def _require_reachable(address: str) -> None:
    """Raise UserError where nothing listens at host:port; Ray itself tries for many minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdigit():
        return  # `auto`: Ray says at once whether there is a cluster
    try:
        socket.create_connection((host.strip("[]"), int(port)), CONNECT_LIMIT_S).close()
    except OSError as error:
        raise UserError(
            f"nothing answers at --ray-address {address} ({error.strerror or error}); give that of the "
            f"cluster's head, mostly port 6379"
        ) from None


@contextlib.contextmanager
def _environment(**values: str) -> Iterator[None]:
    """Ray's processes inherit it; they start much faster so than by a runtime_env."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _source_paths() -> str:
    """Where this process imports from, apart from Python's own folders: a node has those itself."""
    own = tuple({sys.prefix, sys.base_prefix})
    return os.pathsep.join(path for path in sys.path if path and not path.startswith(own))


@dataclass
class _Attempt:
    index: int
    number: int
    reported: int = 0


@dataclass
class _Run:
    ray: Any  # the module; imported only when asked for
    function: str
    tasks: Sequence[Any]
    on_done: Callable[[int, Any], None]
    on_progress: Callable[[int], None]
    on_retry: engines.OnRetry
    waiting: deque[tuple[int, int]] = field(default_factory=deque)  # (task, number of its attempt)
    flying: dict[Any, _Attempt] = field(default_factory=dict)
    failures: dict[int, TaskFailure] = field(default_factory=dict)
    stopped: TaskFailure | None = None
    counter: Any = None

    def run(self, num_workers: int | None) -> dict[int, TaskFailure]:
        self.waiting.extend((index, 1) for index in range(len(self.tasks)))
        start, self.counter = _remote_parts(self.ray)
        try:
            while self.flying or (self.waiting and not self.stopped):
                limit = _limit(self.ray, num_workers)
                while not self.stopped and self.waiting and len(self.flying) < limit:
                    index, number = self.waiting.popleft()
                    ref = start(self.function, (index, number), self.tasks[index])
                    self.flying[ref] = _Attempt(index, number)
                ready, _ = self.ray.wait(list(self.flying), timeout=POLL_S)
                self._take_progress()
                for ref in ready:
                    self._settle(ref)
        finally:
            for ref in self.flying:
                self.ray.cancel(ref)
            self.ray.kill(self.counter)
        if self.stopped:
            raise engines.StoppedError(self.stopped)
        return self.failures

    def _take_progress(self) -> None:
        """What the workers told the counter since; it may be lost with its node, being for the eye only."""
        with contextlib.suppress(self.ray.exceptions.RayError):
            told = self.ray.get(self.counter.take.remote())
            attempts = {(a.index, a.number): a for a in self.flying.values()}
            for place, amount in told.items():
                if attempt := attempts.get(place):
                    attempt.reported += amount
                    self.on_progress(amount)

    def _settle(self, ref: Any) -> None:
        attempt = self.flying.pop(ref)
        try:
            kind, payload = self.ray.get(ref)
        except self.ray.exceptions.TaskCancelledError:
            return
        except self.ray.exceptions.RayError as error:
            kind, payload = "failed", _describe_death(self.ray, error)
        if isinstance(payload, str) and kind == "failed":
            payload = TaskFailure("UserError", payload)
        if kind == "done":
            result, amount = payload
            self.failures.pop(attempt.index, None)
            self.on_progress(amount - attempt.reported)
            self.on_done(attempt.index, result)
            return
        self.on_progress(-attempt.reported)
        self.failures[attempt.index] = payload
        if payload.hopeless:
            self._stop(payload)
        elif attempt.number < engines.MAX_ATTEMPTS and not self.stopped:
            self.waiting.append((attempt.index, attempt.number + 1))
            self.on_retry(attempt.index, payload)

    def _stop(self, failure: TaskFailure) -> None:
        """Give out nothing more and take back what has not begun; what runs may end."""
        self.stopped = self.stopped or failure
        for ref in self.flying:
            self.ray.cancel(ref)


def _limit(ray: Any, num_workers: int | None) -> int:
    if num_workers is not None:
        return num_workers
    return int(ray.cluster_resources().get("CPU", 1) / CORES_PER_TASK) + WAITING_TASKS


def _describe_death(ray: Any, error: Exception) -> TaskFailure:
    """As the supervisor says it; Ray's own text runs over many lines."""
    if isinstance(error, ray.exceptions.OutOfMemoryError):
        return TaskFailure("WorkerDied", "Ray killed the worker process, the node's memory was short")
    if isinstance(error, ray.exceptions.WorkerCrashedError):
        return TaskFailure("WorkerDied", "the worker process died (often: out of memory)")
    return TaskFailure(type(error).__name__, _first_line(error))


def _remote_parts(ray: Any) -> tuple[Callable[..., Any], Any]:
    """(start a task, the counter of progress).

    Both are made here and not at the top of a module so that Ray sends them by value: a node that lacks
    linerate then says so, instead of failing with an error of Ray's.
    """

    def run_one(function: str, place: tuple[int, int], task: bytes, counter: Any, version: str) -> Any:
        try:
            from linerate.shards.ray_engine import run_attempt
        except ImportError as error:
            return "failed", f"a node of the Ray cluster cannot import linerate ({error}); install it there"
        return run_attempt(function, place, task, counter, version)

    class Counter:
        def __init__(self) -> None:
            self.amounts: dict[tuple[int, int], int] = {}

        def add(self, place: tuple[int, int], amount: int) -> None:
            self.amounts[place] = self.amounts.get(place, 0) + amount

        def take(self) -> dict[tuple[int, int], int]:
            amounts, self.amounts = self.amounts, {}
            return amounts

    # Retries are ours: a task that kills its process must not be tried for ever, nor be taken for lost.
    remote = ray.remote(num_cpus=CORES_PER_TASK, max_retries=0)(run_one)
    counter = ray.remote(num_cpus=0, max_restarts=-1)(Counter).remote()

    def start(function: str, place: tuple[int, int], task: Any) -> Any:
        # As bytes: Ray would load the task's class in the worker before our code there may speak.
        return remote.remote(function, place, pickle.dumps(task), counter, __version__)

    return start, counter


def run_attempt(
    function: str, place: tuple[int, int], task: bytes, counter: Any, version: str
) -> tuple[str, Any]:
    """One attempt in a worker of Ray: ("done", (result, all it reported)) or ("failed", TaskFailure)."""
    total, pending, sent_at = 0, 0, time.monotonic()

    def report(amount: int) -> None:
        nonlocal total, pending, sent_at
        total += amount
        pending += amount
        if time.monotonic() - sent_at >= POLL_S:
            counter.add.remote(place, pending)
            pending, sent_at = 0, time.monotonic()

    try:
        if version != __version__:
            raise UserError(
                f"a node of the Ray cluster has linerate {__version__}, this command is {version}; "
                f"install the same there: two versions may write different bytes"
            )
        result = load_function(function)(pickle.loads(task), report)
        result = result() if callable(result) else result
    except Exception as error:
        return "failed", describe(error)
    return "done", (result, total)


def _first_line(error: BaseException) -> str:
    return next(iter(f"{error}".strip().splitlines()), type(error).__name__)[:200]
