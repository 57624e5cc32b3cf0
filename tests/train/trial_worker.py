"""`linerate train`, as one rank that writes down what it sees and kills or stops itself where it is told.

python trial_worker.py RECORDS FAULT ARGS...  FAULT: kill:RANK:STEP, stop:RANK:STEP or none
"""

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

from xxhash import xxh3_64_hexdigest

from linerate.__main__ import main
from linerate.pipeline.two_views import TwoViews
from linerate.train.learner import Learner

SIGNALS = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP}


def watch_steps(records: Path, fault: str) -> None:
    """Learner.step writes the positions and hashes of its views to a file of the rank, then may die."""
    rank = int(os.environ.get("RANK", "0"))
    how, _, where = fault.partition(":")
    taught = Learner.step

    def step(learner: Learner, batch: TwoViews, **options: Any) -> None:
        taught(learner, batch, **options)
        with (records / f"rank-{rank}.jsonl").open("a") as file:
            views = [xxh3_64_hexdigest(one.contiguous().numpy()) for one in (batch.query, batch.key)]
            line = {"step": options["step"], "positions": batch.position.tolist(), "views": views}
            print(json.dumps(line), file=file)
        if where == f"{rank}:{options['step']}":
            os.kill(os.getpid(), SIGNALS[how])

    Learner.step = step  # type: ignore[method-assign]


if __name__ == "__main__":
    watch_steps(Path(sys.argv[1]), sys.argv[2])
    sys.exit(main(["train", *sys.argv[3:]]))
