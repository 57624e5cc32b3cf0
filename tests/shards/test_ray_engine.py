"""The Ray engine: the results and the failures of the supervisor, on a cluster of two cores."""

import importlib.util
import socket
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from linerate.shards import ray_engine
from linerate.shards.engines import Engine, StoppedError, run_tasks
from linerate.shards.errors import UserError
from linerate.shards.options import PackOptions
from linerate.shards.pack import pack

RAY = Engine(kind="ray")
needs_ray = pytest.mark.skipif(
    importlib.util.find_spec("ray") is None, reason="needs Ray: the whole of --engine ray stays untested"
)

TASKS = """
import os, signal
from pathlib import Path
from linerate.shards.errors import UserError

def mixed(task, report):
    kind, folder = task
    report(1)
    if kind == "killed once" and not (Path(folder) / "mark").exists():
        (Path(folder) / "mark").touch()
        os.kill(os.getpid(), signal.SIGKILL)
    if kind == "poison":
        os.kill(os.getpid(), signal.SIGKILL)
    if kind == "raises":
        raise KeyError("no such thing")
    return lambda: kind

def full_disk(task, report):
    raise OSError(28, "No space left on device", "/out")
"""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The name of TASKS as a module, importable in the workers of a cluster of this process."""
    folder = tmp_path_factory.mktemp("modules")
    (folder / "tasks_of_test_ray.py").write_text(TASKS)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        ray: Any = importlib.import_module("ray")
        with ray_engine._on_stderr(), ray_engine._connected(ray, "", 2):
            yield "tasks_of_test_ray"


@needs_ray
def test_killed_tasks_are_given_out_again_and_poison_is_reported(cluster: str, tmp_path: Path) -> None:
    kinds = ["killed once", "a", "poison", "b", "raises", "c"]
    results: dict[int, Any] = {}
    retries: list[int] = []
    progress: list[int] = []
    failures = run_tasks(
        f"{cluster}:mixed",
        [(kind, str(tmp_path)) for kind in kinds],
        num_workers=2,
        on_done=results.__setitem__,
        on_progress=progress.append,
        on_retry=lambda index, failure: retries.append(index),
        engine=RAY,
    )
    assert results == {0: "killed once", 1: "a", 3: "b", 5: "c"}
    assert {index: (f.kind, f.text) for index, f in failures.items()} == {
        2: ("WorkerDied", "the worker process died (often: out of memory)"),
        4: ("KeyError", "'no such thing'"),
    }
    assert sum(progress) == 4
    assert sorted(retries) == [0, 2, 2, 4, 4]


@needs_ray
def test_a_full_disk_stops_the_run_on_ray(cluster: str) -> None:
    with pytest.raises(StoppedError) as caught:
        run_tasks(f"{cluster}:full_disk", [0, 1, 2], num_workers=None, on_done=print, engine=RAY)
    assert caught.value.failure.text == "No space left on device: /out"


@needs_ray
def test_ray_writes_the_same_bytes(
    cluster: str, photo_folder: Path, tmp_path: Path, read_all: Callable[[Path], dict[str, bytes]]
) -> None:
    options = PackOptions(seed=7, shard_samples=8, check="decode")
    pack(photo_folder, tmp_path / "here", options=options, num_workers=0)
    seen: dict[str, float] = {}

    def count(stage: str, amount: float) -> None:
        seen[stage] = seen.get(stage, 0) + amount

    pack(photo_folder, tmp_path / "ray", options=options, engine=RAY, on_progress=count)
    assert read_all(tmp_path / "ray") == read_all(tmp_path / "here")
    assert seen == {"list": 40, "plan": 40, "pack": 40}


@needs_ray
def test_another_version_on_a_node_stops_the_run(cluster: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_engine, "__version__", "0.0.1")
    with pytest.raises(StoppedError, match=r"has linerate \S+, this command is 0\.0\.1; install the same"):
        run_tasks(f"{cluster}:mixed", [("a", "")], num_workers=1, on_done=print, engine=RAY)


@needs_ray
def test_a_node_without_linerate_says_so(cluster: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The part that Ray sends by value, in a process where the import fails."""
    sent: list[Any] = []

    class FakeRay:
        """Keeps what would be sent."""

        def remote(self, **options: Any) -> Callable[[Any], Any]:
            def keep(part: Any) -> Any:
                sent.append(part)
                return type("Handle", (), {"remote": staticmethod(lambda *args: None)})

            return keep

    ray_engine._remote_parts(FakeRay())
    run_one = importlib.import_module("ray.cloudpickle").loads(
        importlib.import_module("ray.cloudpickle").dumps(sent[0])
    )
    monkeypatch.setitem(sys.modules, "linerate.shards.ray_engine", None)
    kind, text = run_one("m:f", (0, 1), b"", None, "1")
    assert kind == "failed"
    assert "a node of the Ray cluster cannot import linerate" in text
    assert "install it there" in text


def test_ray_is_needed_only_for_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"needs Ray; `pip install 'linerate\[ray\]'`"):
        run_tasks("m:f", [1], num_workers=None, on_done=print, engine=RAY)


def test_ray_has_no_worker_in_this_process() -> None:
    with pytest.raises(UserError, match="--workers 0 works in this process, --engine ray in others"):
        run_tasks("m:f", [1], num_workers=0, on_done=print, engine=RAY)


def test_an_address_without_the_engine_is_refused() -> None:
    with pytest.raises(UserError, match="--ray-address auto needs --engine ray"):
        Engine(ray_address="auto")


def test_an_address_where_nothing_listens_is_told_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    ray = pytest.importorskip("ray", reason="needs Ray: the check of --ray-address stays untested")
    # The cluster of the other tests would be used as it is.
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    with pytest.raises(UserError, match=f"nothing answers at --ray-address 127.0.0.1:{port}"):
        run_tasks(
            "m:f",
            [1],
            num_workers=None,
            on_done=print,
            engine=Engine(kind="ray", ray_address=f"127.0.0.1:{port}"),
        )


def test_progress_that_was_lost_with_a_node_comes_with_the_result() -> None:
    told: list[int] = []
    results: list[tuple[int, Any]] = []
    ray = SimpleNamespace(get=lambda ref: ref, exceptions=SimpleNamespace(TaskCancelledError=OSError))
    run = ray_engine._Run(ray, "", [None], lambda *done: results.append(done), told.append, lambda *_: None)
    run.flying[("done", ("shard", 20))] = ray_engine._Attempt(0, 1, reported=8)
    run._settle(("done", ("shard", 20)))
    assert (told, results) == ([12], [(0, "shard")])


@pytest.mark.parametrize(("mode", "hint"), [("", True), ("token", False)])
def test_a_cluster_that_asks_for_a_token_is_told_of(
    monkeypatch: pytest.MonkeyPatch, mode: str, hint: bool
) -> None:
    class AuthenticationError(Exception):
        pass

    def init(*args: Any, **named: Any) -> None:
        raise AuthenticationError("token is missing\nNote: ...")

    monkeypatch.setenv("RAY_AUTH_MODE", mode)
    exceptions = SimpleNamespace(RayError=AuthenticationError)
    ray = SimpleNamespace(is_initialized=lambda: False, init=init, exceptions=exceptions)
    with (
        pytest.raises(UserError, match=r"the Ray cluster at auto cannot .* \(token is missing\)") as told,
        ray_engine._connected(ray, "auto", None),
    ):
        pass
    assert ("RAY_AUTH_MODE=token where it asks for a token" in str(told.value)) is hint
