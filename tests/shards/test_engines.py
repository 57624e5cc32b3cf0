"""The supervisor: a killed worker costs nobody else anything."""

import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from linerate.shards.engines import (
    StoppedError,
    choose_num_workers,
    default_num_workers,
    run_tasks,
)
from linerate.shards.errors import UserError
from linerate.shards.worker import TaskFailure, describe

TASKS = """
import os, signal
from pathlib import Path
from linerate.shards.errors import UserError

def double(task, report):
    report(task)
    return 2 * task

def in_background(task, report):
    return lambda: (task, os.getpid())

def killed_once(task, report):
    folder, number = task
    mark = Path(folder) / str(number)
    if number % 3 == 0 and not mark.exists():
        mark.touch()
        report(5)
        os.kill(os.getpid(), signal.SIGKILL)
    report(1)
    return lambda: number

def poison(task, report):
    if task == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    return lambda: task

def raising(task, report):
    report(1)
    if task == 1:
        raise KeyError("task 1")
    def rest():
        if task == 2:
            raise RuntimeError("in the background")
        return task
    return rest

def full_disk(task, report):
    if task == 3:
        raise OSError(28, "No space left on device", "/out")
    return task

def user_error(task, report):
    raise UserError("no such option")

def leaves(task, report):
    os._exit(7)
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "tasks_of_test_engines.py").write_text(TASKS)
    monkeypatch.syspath_prepend(tmp_path)
    return "tasks_of_test_engines"


class Run:
    """run_tasks and what came of it."""

    def __init__(self, function: str, tasks: list[Any], num_workers: int) -> None:
        self.results: dict[int, Any] = {}
        self.progress = 0
        self.failures = run_tasks(
            function, tasks, num_workers=num_workers, on_done=self._done, on_progress=self._progressed
        )

    def _done(self, index: int, result: Any) -> None:
        assert index not in self.results
        self.results[index] = result

    def _progressed(self, amount: int) -> None:
        self.progress += amount


@pytest.mark.parametrize("num_workers", [0, 2])
def test_every_task_is_done_once(module: str, num_workers: int) -> None:
    run = Run(f"{module}:double", list(range(20)), num_workers)
    assert run.results == {i: 2 * i for i in range(20)}
    assert run.failures == {}
    assert run.progress == sum(range(20))


def test_the_rest_of_a_task_runs_in_the_worker(module: str) -> None:
    run = Run(f"{module}:in_background", list(range(6)), 2)
    assert {task for task, _ in run.results.values()} == set(range(6))
    assert os.getpid() not in {pid for _, pid in run.results.values()}


def test_the_task_of_a_killed_worker_is_given_out_again(module: str, tmp_path: Path) -> None:
    run = Run(f"{module}:killed_once", [(str(tmp_path), i) for i in range(7)], 2)
    assert run.results == {i: i for i in range(7)}
    assert run.failures == {}
    assert run.progress == 7  # what the killed ones had reported is taken back


def test_a_task_that_kills_three_workers_is_reported_and_the_others_finish(module: str) -> None:
    run = Run(f"{module}:poison", list(range(6)), 2)
    assert run.results == {i: i for i in range(6) if i != 2}
    assert run.failures == {
        2: TaskFailure("WorkerDied", "the worker process was killed by SIGKILL (often: out of memory)")
    }


def test_a_worker_that_leaves_is_named_by_its_code(module: str) -> None:
    assert Run(f"{module}:leaves", [0], 1).failures[0].text == "the worker process ended with code 7"


@pytest.mark.parametrize("num_workers", [0, 1])
def test_exceptions_are_reported_with_their_traceback(module: str, num_workers: int) -> None:
    run = Run(f"{module}:raising", [0, 1, 2, 3], num_workers)
    assert run.results == {0: 0, 3: 3}
    assert {i: (f.kind, f.text) for i, f in run.failures.items()} == {
        1: ("KeyError", "'task 1'"),
        2: ("RuntimeError", "in the background"),
    }
    assert "tasks_of_test_engines.py" in run.failures[1].trace
    assert run.progress == 2


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_full_disk_stops_the_run(module: str, num_workers: int) -> None:
    with pytest.raises(StoppedError) as caught:
        Run(f"{module}:full_disk", list(range(100)), num_workers)
    assert caught.value.failure.errno == errno.ENOSPC
    assert caught.value.failure.text == "No space left on device: /out"


@pytest.mark.parametrize("num_workers", [0, 1])
def test_an_error_of_the_user_stops_the_run(module: str, num_workers: int) -> None:
    with pytest.raises(StoppedError, match="no such option"):
        Run(f"{module}:user_error", [1, 2], num_workers)


def test_workers_die_with_their_supervisor(tmp_path: Path) -> None:
    (tmp_path / "sleepers.py").write_text(
        "import os, time, pathlib\n"
        "def nap(task, report):\n"
        "    pathlib.Path(task).write_text(str(os.getpid()))\n"
        "    time.sleep(60)\n"
    )
    script = (
        "from linerate.shards.engines import run_tasks\n"
        f"run_tasks('sleepers:nap', [{str(tmp_path / 'pid')!r}], num_workers=1, on_done=print)\n"
    )
    paths = os.pathsep.join([str(tmp_path), *sys.path])
    supervisor = subprocess.Popen([sys.executable, "-c", script], env=os.environ | {"PYTHONPATH": paths})
    worker = int(_wait_for(tmp_path / "pid"))
    supervisor.send_signal(signal.SIGKILL)
    supervisor.wait()
    for _ in range(3000):
        try:
            os.kill(worker, 0)
        except ProcessLookupError:
            return
        if Path(f"/proc/{worker}/stat").read_text().split()[2] == "Z":
            return
        time.sleep(0.02)
    pytest.fail("the worker outlived its supervisor")


def _wait_for(path: Path) -> str:
    for _ in range(3000):
        if path.exists() and (text := path.read_text()):
            return text
        time.sleep(0.02)
    raise AssertionError(f"{path} was never written")


def test_negative_workers_are_refused(module: str) -> None:
    with pytest.raises(UserError, match="--workers is -1"):
        Run(f"{module}:double", [1], -1)


def test_little_work_is_done_in_this_process() -> None:
    assert choose_num_workers(5, num_bytes=1, may_crash=False) == 5
    assert choose_num_workers(None, num_bytes=1, may_crash=False) == 0
    assert choose_num_workers(None, num_bytes=1, may_crash=True) == 1
    assert choose_num_workers(None, num_bytes=10**12, may_crash=False) == default_num_workers()


def test_unknown_signals_have_a_number() -> None:
    from linerate.shards.engines import _signal_name

    assert _signal_name(9).startswith("SIGKILL")
    assert _signal_name(15) == "SIGTERM"
    assert _signal_name(250) == "signal 250"


def test_an_os_error_is_described_by_its_file() -> None:
    failure = describe(PermissionError(errno.EACCES, "Permission denied", b"/x"))
    assert (failure.kind, failure.text, failure.hopeless) == (
        "PermissionError",
        "Permission denied: /x",
        True,
    )
    assert not describe(ValueError("v")).hopeless
