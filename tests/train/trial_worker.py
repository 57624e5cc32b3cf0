"""A rank of `linerate train` that kills or stops itself where it is told, and writes what it sees.

See rank_server.py. FAULT: kill:RANK:STEP or stop:RANK:STEP.
"""

import contextlib
import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import s3fs  # type: ignore[import-untyped]  # noqa: F401
from xxhash import xxh3_64_hexdigest

from linerate.__main__ import main as command
from linerate.pipeline.two_views import TwoViews
from linerate.train.learner import Learner

SIGNALS = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP}


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


def main(records: str, fault: str, *args: str) -> int:
    """The exit code of the rank's `linerate train`."""
    with watched_steps(Path(records), fault):
        return command(["train", *args])
