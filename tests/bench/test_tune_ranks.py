"""A rank that runs out of memory alone ends a trial on all ranks, or the tuning in one line."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from linerate.bench.tune_ranks import RankFailed, Ranks

FAILED = "does not fit the memory of rank 1"


def test_one_rank_out_of_memory_fails_on_all_and_one_that_is_waited_for_says_so_and_leaves(tmp_path: Path):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    worker = Path(__file__).with_name("tune_ranks_worker.py")
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = str(Path(__file__).parents[2] / "src")
    command = [sys.executable, str(worker), str(port), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment, check=False)
    told = [json.loads((tmp_path / f"rank-{rank}.json").read_text()) for rank in range(2)]
    expected = {"nowhere": "nothing failed", "before an exchange": FAILED}
    expected |= {"between two": FAILED, "after the last": FAILED}
    later = {f"{where}, later": [0, 1] for where in expected}
    assert told == [expected | later] * 2, done.stderr
    # The last scenario: rank 0 stands in a step, rank 1 leaves, and rank 0 finds it gone.
    assert done.stdout.split() == ["3", "2"]
    line = f"linerate: error: compile = step {FAILED}, and other ranks wait for it in a step; "
    assert done.stderr.count(line) == 1


def test_a_rank_alone_fails_by_itself():
    with pytest.raises(RankFailed, match=r"^does not fit the memory$"), Ranks().together("prefetch = 4"):
        raise torch.OutOfMemoryError("no memory")
    with pytest.raises(ZeroDivisionError), Ranks().together("prefetch = 4"):
        _ = 1 / 0
