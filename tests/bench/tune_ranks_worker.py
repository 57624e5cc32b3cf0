"""Two ranks of a tuning, forks of this process, of which rank 1 runs out of memory here and there.

python tune_ranks_worker.py PORT OUT   OUT/rank-N.json: what each scenario told rank N, until it ended.
"""

import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from linerate.bench import tune_ranks
from linerate.bench.tune_ranks import RankFailed, Ranks


def run_rank(ranks: Ranks, out: Path) -> None:
    told: dict[str, object] = {}

    def tell(name: str, value: object) -> None:
        told[name] = value
        out.write_text(json.dumps(told))

    def fail() -> None:
        if ranks.rank == 1:
            raise torch.OutOfMemoryError("no memory")

    def failed(where: str) -> str:
        try:
            with ranks.together("compile = step"):
                if where == "before an exchange":
                    fail()
                ranks.gather(ranks.rank)
                if where == "between two":
                    fail()
                ranks.gather(ranks.rank)
                if where == "after the last":
                    fail()
        except RankFailed as error:
            return str(error)
        return "nothing failed"

    for where in ("nowhere", "before an exchange", "between two", "after the last"):
        tell(where, failed(where))
        # Whatever happened, the ranks are still in step.
        tell(f"{where}, later", ranks.gather(ranks.rank))
    ranks.meet()
    tune_ranks.PATIENCE_S = 0.3
    with ranks.together("compile = step"):
        fail()
        dist.all_reduce(torch.zeros(1))
    tell("not reached", True)


def become_rank(rank: int, port: int, out: Path) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo", rank=rank, world_size=2)
    group = dist.new_group(backend="gloo")
    assert isinstance(group, dist.ProcessGroup)
    try:
        run_rank(Ranks(rank, 2, group), out / f"rank-{rank}.json")
    except RuntimeError:
        os._exit(3)  # the other rank is gone
    os._exit(0)


if __name__ == "__main__":
    ranks = []
    for number in range(2):
        if not (child := os.fork()):
            become_rank(number, int(sys.argv[1]), Path(sys.argv[2]))
        ranks.append(child)
    print(*(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in ranks))
