"""Ranks of many runs as forks of one process: importing torch and DALI is most of what a start costs.

stdin, a line of JSON a run: {"module", "words", "world_size", "out", "environment"}. In every rank the
module's `main(*words)` runs with torchrun's variables in the environment; what it prints is
OUT/output-RANK.txt, what it returns the exit code. stdout: {"codes", one a rank, of a killed one minus its
signal; "first", the rank that ended first}. Runs under torchrun itself are test_launch.py's.
"""

import contextlib
import importlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
LIMIT_S = 400


@dataclass(frozen=True)
class RanksEnd:
    """How the ranks of a run ended."""

    codes: list[int]
    first: int
    outputs: list[str]

    def require_success(self) -> None:
        assert not any(self.codes), (self.codes, [text[-3000:] for text in self.outputs])


class RankServer:
    """Starts ranks; the process behind it is started with the first ones."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None

    def run(
        self,
        module: str,
        *words: object,
        world_size: int,
        out: Path,
        environment: dict[str, str] | None = None,
    ) -> RanksEnd:
        """Wait for all ranks of a run. out: a folder for what they print."""
        if self._process is None:
            paths = os.pathsep.join([str(ROOT), str(ROOT / "src"), *filter(None, sys.path)])
            fixed = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HOME": "/nonexistent"}
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tests.train.rank_server"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                env={**os.environ, **fixed, "PYTHONPATH": paths},
                start_new_session=True,
            )
        asked = {"module": module, "words": [*map(str, words)], "world_size": world_size, "out": str(out)}
        print(json.dumps({**asked, "environment": environment or {}}), file=self._process.stdin, flush=True)
        if not select.select([self._process.stdout], [], [], LIMIT_S)[0]:
            self.close()
            raise TimeoutError(f"{module} {words} on {world_size} ranks took more than {LIMIT_S} s")
        found = json.loads(self._process.stdout.readline())
        texts = [(out / f"output-{rank}.txt").read_text() for rank in range(world_size)]
        return RanksEnd(**found, outputs=texts)

    def close(self) -> None:
        """End the process and all ranks that it has still."""
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.communicate()
            self._process = None


@contextlib.contextmanager
def rank_server() -> Iterator[RankServer]:
    server = RankServer()
    try:
        yield server
    finally:
        server.close()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def become_rank(rank: int, port: int, asked: dict[str, Any]) -> None:
    """In a fork: run to the end and leave with the exit code."""
    code = 1
    try:
        world_size = str(asked["world_size"])
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1"}
        os.environ |= {"WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": world_size, "MASTER_PORT": str(port)}
        os.environ |= asked["environment"]
        output = os.open(Path(asked["out"]) / f"output-{rank}.txt", os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
        os.dup2(output, 2)
        os.dup2(output, 1)
        code = importlib.import_module(asked["module"]).main(*asked["words"]) or 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def run_ranks(asked: dict[str, Any]) -> dict[str, Any]:
    """Fork, wait and say how they ended. What has stopped itself goes on when another rank has ended."""
    importlib.import_module(asked["module"])
    port, ranks = free_port(), dict[int, int]()
    for rank in range(asked["world_size"]):
        if not (child := os.fork()):
            become_rank(rank, port, asked)
        ranks[child] = rank
    codes, order = [0] * asked["world_size"], list[int]()
    while ranks:
        child, status = os.wait()
        order.append(ranks.pop(child))
        codes[order[-1]] = os.waitstatus_to_exitcode(status)
        for other in ranks:
            os.kill(other, signal.SIGCONT)
    return {"codes": codes, "first": order[0]}


def serve() -> None:
    # What imports print must not come between the answers.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    # What runs load when they begin.
    for module in (
        "linerate.pipeline.dali_kernels",
        "linerate.pipeline.dali_views",
        "linerate.train.pretrain",
    ):
        importlib.import_module(module)
    for line in sys.stdin:
        print(json.dumps(run_ranks(json.loads(line))), file=answers, flush=True)


if __name__ == "__main__":
    serve()
