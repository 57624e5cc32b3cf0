"""`linerate tune` on two ranks, which are forks of this process: torch is imported once.

python tune_worker.py PORT OUT ARGS...   OUT/rank-N.json: what rank N found, its steps, its stdout.
"""

import contextlib
import dataclasses
import io
import json
import os
import sys
import traceback
from pathlib import Path
from typing import Any

from linerate.bench import tune as tuning
from linerate.bench.tune import Tuned
from linerate.bench.tune_cli import main
from linerate.train.learner import Learner

WORLD_SIZE = 2


def run_rank(args: list[str]) -> dict[str, Any]:
    found: list[Tuned] = []
    steps = 0

    def counted(self: Learner, *about: Any, **more: Any) -> None:
        nonlocal steps
        steps += 1
        taught(self, *about, **more)

    def kept(*about: Any, **more: Any) -> Tuned:
        found.append(tuned(*about, **more))
        return found[0]

    taught, tuned = Learner.step, tuning.tune
    Learner.step = counted  # type: ignore[method-assign]
    tuning.tune = kept
    few = (("channels_last", "step", (False,)),)
    tuning.candidates = lambda *_, **__: iter(few)  # type: ignore[assignment]
    with contextlib.redirect_stdout(io.StringIO()) as said:
        code = main(args)
    plain = dataclasses.asdict(dataclasses.replace(found[0], noise={}))
    return {"code": code, "found": plain, "steps": steps, "said": said.getvalue()}


def become_rank(rank: int, port: int, out: Path, args: list[str]) -> None:
    code = 1
    try:
        names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": WORLD_SIZE, "LOCAL_WORLD_SIZE": WORLD_SIZE}
        os.environ |= {name: str(value) for name, value in names.items()}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        (out / f"rank-{rank}.json").write_text(json.dumps(run_rank(args)))
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    ranks = []
    for number in range(WORLD_SIZE):
        if not (child := os.fork()):
            become_rank(number, int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:])
        ranks.append(child)
    sys.exit(any([os.waitpid(child, 0)[1] for child in ranks]))
