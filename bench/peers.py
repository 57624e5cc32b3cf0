"""Other projects: which of them are missing here and how to bring them, and a process that does their work.

Peers whose pins clash with ours live in an environment of their own, .venv-peers, which `make bench-peers`
builds; LINERATE_BENCH_PEERS names the python of another one. Others are imported beside our own code.
"""

import contextlib
import functools
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from linerate.bench.contest import Disagreement

PEERS_PYTHON = "LINERATE_BENCH_PEERS"
ROOT = Path(__file__).resolve().parent.parent
BUILT_PYTHON = ROOT / ".venv-peers" / "bin" / "python"
WORKER = Path(__file__).resolve().with_name("peers_worker.py")

# Module -> the name that it is installed by, of those that work in a process of their own.
APART = {
    "img2dataset": "img2dataset",
    "lightly": "lightly",
    "litdata": "litdata",
    "streaming": "mosaicml-streaming",
}
_REMEDIES = {"ffcv": "make ffcv"}

Ask = Callable[..., Any]
"""ask("task", name=value, ...) -> what the task returns; raises Disagreement with what the peer says"""


def missing_peer(module: str) -> str | None:
    """None where the peer can be run, else a line that names it and says how to bring it."""
    name = APART.get(module, module)
    if module not in APART:
        if importlib.util.find_spec(module) is not None:
            return None
        return f"{name} is not installed; bring it with: {_REMEDIES.get(module, f'pip install {name}')}"
    if find_python(module) is not None:
        return None
    if named := os.environ.get(PEERS_PYTHON):
        return (
            f"{name} is not installed for {named}, which {PEERS_PYTHON} names; bring it there, "
            f"or unset that and run: make bench-peers"
        )
    return f"{name} is not installed; bring it with: make bench-peers"


def find_python(module: str) -> str | None:
    """The python that has the peer: the one that the variable names; else .venv-peers', else this one."""
    if named := os.environ.get(PEERS_PYTHON):
        return named if module in _installed(named) else None
    if BUILT_PYTHON.exists() and module in _installed(os.fspath(BUILT_PYTHON)):
        return os.fspath(BUILT_PYTHON)
    return sys.executable if importlib.util.find_spec(module) is not None else None


@functools.cache
def _installed(python: str) -> frozenset[str]:
    """Those of APART that a python can import; none where it does not start."""
    probe = f"import importlib.util as u; print(*(m for m in {[*APART]} if u.find_spec(m)))"
    try:
        done = subprocess.run([python, "-P", "-c", probe], capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return frozenset()
    return frozenset(done.stdout.split()) if done.returncode == 0 else frozenset()


@contextlib.contextmanager
def open_peer(module: str) -> Iterator[Ask]:
    """A process in which the peer does one task after the other, on the cores that the caller has now.

    What a task loads or opens stays for the next one, as it would in a process of ours.
    """
    python = find_python(module)
    assert python is not None, "missing_peer comes first"
    quiet = {"NO_ALBUMENTATIONS_UPDATE": "1", "PYTHONWARNINGS": "ignore", "HF_HUB_OFFLINE": "1"}
    # For the encoder, which both sides of `step` share. -P: the worker's own folder is no place of modules.
    paths = [os.fspath(ROOT / "src"), *filter(None, [os.environ.get("PYTHONPATH")])]
    with (
        tempfile.TemporaryFile("w+") as said,
        subprocess.Popen(
            [python, "-P", os.fspath(WORKER)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=said,
            text=True,
            env=os.environ | quiet | {"PYTHONPATH": os.pathsep.join(paths)},
        ) as process,
    ):
        try:
            yield functools.partial(_ask, process, said, APART[module])
        finally:
            _end(process)


def _ask(process: "subprocess.Popen[str]", said: IO[str], name: str, task: str, /, **what: object) -> Any:
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        process.stdin.write(json.dumps({"task": task, "what": what}) + "\n")
        process.stdin.flush()
        line = process.stdout.readline()
    except BrokenPipeError:
        line = ""
    if not line:
        said.seek(0)
        last = next((line.strip() for line in reversed(said.readlines()) if line.strip()), "nothing")
        raise Disagreement(f"{name} ended and said: {last[:300]}")
    answer = json.loads(line)
    if "error" in answer:
        raise Disagreement(f"{name} could not do {task}: {answer['error']}")
    return answer["value"]


def _end(process: "subprocess.Popen[str]") -> None:
    """It ends by itself where it can: what it keeps in shared memory would stay."""
    assert process.stdin is not None
    with contextlib.suppress(BrokenPipeError):  # what an ended process did not read
        process.stdin.close()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(timeout=10)
    process.kill()
