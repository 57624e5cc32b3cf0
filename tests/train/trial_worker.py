"""`linerate train` on two ranks, which kill or stop themselves where they are told, and write what they see.

python trial_worker.py PORT RECORDS FAULT ARGS... [-- RECORDS FAULT ARGS...]  FAULT: kill:RANK:STEP or
stop:RANK:STEP. The ranks of one run after another are forks of this process, so that torch and DALI are
imported once. A rank's stderr is RECORDS/stderr-N.txt. Prints one JSON line a run: how its ranks ended.
"""

import contextlib
import itertools
import json
import os
import signal
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import s3fs  # type: ignore[import-untyped]  # noqa: F401
from xxhash import xxh3_64_hexdigest

# What every rank needs is imported, its kernels compiled, before the forks.
import linerate.pipeline.dali_kernels
import linerate.pipeline.dali_views
import linerate.train.pretrain  # noqa: F401
from linerate.__main__ import main
from linerate.pipeline.two_views import TwoViews
from linerate.train.learner import Learner

SIGNALS = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP}
WORLD_SIZE = 2


@contextlib.contextmanager
def watched_steps(records: Path, fault: str = "") -> Iterator[None]:
    """Learner.step writes the positions and hashes of its views to a file of the rank, then may die."""
    rank = int(os.environ.get("RANK", "0"))
    how, _, where = fault.partition(":")
    taught = Learner.step

    def step(learner: Learner, batch: TwoViews, **options: Any) -> None:
        taught(learner, batch, **options)
        with (records / f"rank-{rank}.jsonl").open("a") as file:
            views = [
                [xxh3_64_hexdigest(view.contiguous().numpy()) for view in pair]
                for pair in zip(batch.query, batch.key, strict=True)
            ]
            line = {"step": options["step"], "positions": batch.position.tolist(), "views": views}
            print(json.dumps(line), file=file)
        if where == f"{rank}:{options['step']}":
            os.kill(os.getpid(), SIGNALS[how])

    Learner.step = step  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        Learner.step = taught  # type: ignore[method-assign]


def become_rank(rank: int, port: int, records: Path, fault: str, args: list[str]) -> None:
    """In a fork: run to the end and leave with the command's exit code."""
    code = 1
    try:
        names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": WORLD_SIZE, "LOCAL_WORLD_SIZE": WORLD_SIZE}
        os.environ |= {name: str(value) for name, value in names.items()}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        errors = os.open(records / f"stderr-{rank}.txt", os.O_CREAT | os.O_WRONLY | os.O_APPEND)
        os.dup2(errors, 2)
        os.dup2(errors, 1)
        with watched_steps(records, fault):
            code = main(["train", *args])
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def run_ranks(port: int, records: Path, fault: str, args: list[str]) -> dict[str, Any]:
    """Codes of the ranks (of a killed one, minus its signal), and which one ended first.

    What has stopped itself goes on when the first rank has ended.
    """
    records.mkdir()
    ranks: dict[int, int] = {}
    for rank in range(WORLD_SIZE):
        if not (child := os.fork()):
            become_rank(rank, port, records, fault, args)
        ranks[child] = rank
    codes, order = [0] * WORLD_SIZE, []
    for _ in range(WORLD_SIZE):
        child, status = os.wait()
        order.append(ranks.pop(child))
        codes[order[-1]] = os.waitstatus_to_exitcode(status)
        for other in ranks:
            os.kill(other, signal.SIGCONT)
    return {"codes": codes, "first": order[0]}


def split_at(words: list[str], mark: str) -> list[list[str]]:
    """The words between the marks."""
    groups = itertools.groupby(words, lambda word: word == mark)
    return [list(group) for is_mark, group in groups if not is_mark]


if __name__ == "__main__":
    first_port = int(sys.argv[1])
    for number, (folder, fault, *args) in enumerate(split_at(sys.argv[2:], "--")):
        print(json.dumps(run_ranks(first_port + number, Path(folder), fault, args)), flush=True)
