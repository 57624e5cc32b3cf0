"""Runs on one, two and four ranks, by gloo on the CPU: the same losses, few collectives, one end for all."""

import json
import os
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.train.rank_server import RankServer
from tests.train.small import SMALL, small

from linerate.shards.catalog import Catalog
from linerate.train.checkpoint import list_checkpoints, load_newest
from linerate.train.pretrain import pretrain
from linerate.train.run_folder import RunFolder

WORKER = "tests.train.run_worker"
Found = dict[str, dict[str, Any]]
# Sums in another order, over a few steps: the bound on the relative difference of a loss.
LOSS_BOUND = 1e-4


def _losses(run: Path) -> list[float]:
    return [line["loss"] for line in RunFolder(run).load_log("step")]


def _begin_alone(shards: Catalog, run: Path) -> None:
    """The first four steps, on one rank."""

    def stop_at_four(event: Mapping[str, Any]) -> None:
        if event["event"] == "step" and event["step"] == 4:
            os.kill(os.getpid(), signal.SIGTERM)

    assert pretrain(SMALL, shards=shards.root, run_dir=run, on_event=stop_at_four).step == 4


@pytest.fixture(scope="module")
def alone(shards: Catalog, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("alone") / "run"
    pretrain(small(knn_epochs=0), shards=shards.root, run_dir=run)
    return run


@pytest.fixture(scope="module")
def two(
    shards: Catalog, ranks: RankServer, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, list[Found]]:
    """All the runs on two ranks, in one start."""
    out = tmp_path_factory.mktemp("two")
    _begin_alone(shards, out / "moved")
    names = ("whole", "moved", "waiting", "judging", "saving")
    ranks.run(WORKER, shards.root, out, *names, world_size=2, out=out).require_success()
    return out, [json.loads((out / f"rank-{rank}.json").read_text()) for rank in range(2)]


def _require_same_losses(run: Path, alone: Path) -> None:
    """The run's log has the mean of every four steps."""
    each = _losses(alone)
    means = [sum(each[first : first + 4]) / 4 for first in range(0, len(each), 4)]
    assert _losses(run) == pytest.approx(means, rel=LOSS_BOUND)


def _require_same_state(run: Path, alone: Path) -> None:
    """BN statistics, too: each rank has seen its own share, the checkpoint holds the mean."""
    many, one = (load_newest(path / "checkpoints") for path in (run, alone))
    assert many is not None
    assert one is not None
    assert many[0].moco.keys() == one[0].moco.keys()
    for name, tensor in many[0].moco.items():
        assert torch.allclose(tensor, one[0].moco[name], rtol=1e-3, atol=1e-3), name


def _require_few_collectives(calls: list[list[str]]) -> None:
    """Of every step, with whatever is due after it: the images, the keys, and whether to go on."""
    assert len(calls) == 11
    quiet = [names for number, names in enumerate(calls, 1) if number % 4]
    assert all(
        sorted(names) == ["all_gather_into_tensor", "all_reduce", "all_to_all_single"] for names in quiet
    )
    # Every log_steps their metrics are one more.
    assert max(len(names) for names in calls) <= 4
    assert not [name for names in calls for name in names if "broadcast" in name]


def test_two_ranks_have_the_losses_of_one_by_three_collectives_a_step(
    two: tuple[Path, list[Found]], alone: Path
) -> None:
    out, ranks = two
    _require_same_losses(out / "whole", alone)
    _require_same_state(out / "whole", alone)
    for rank in ranks:
        assert (rank["whole"]["world_size"], rank["whole"]["step"]) == (2, 12)
        _require_few_collectives(rank["whole"]["calls"])


def test_four_ranks_have_the_losses_of_one_by_three_collectives_a_step(
    shards: Catalog, ranks: RankServer, alone: Path, tmp_path: Path
) -> None:
    ranks.run(WORKER, shards.root, tmp_path, "whole", world_size=4, out=tmp_path).require_success()
    _require_same_losses(tmp_path / "whole", alone)
    _require_same_state(tmp_path / "whole", alone)
    for rank in range(4):
        found = json.loads((tmp_path / f"rank-{rank}.json").read_text())["whole"]
        assert (found["world_size"], found["step"]) == (4, 12)
        _require_few_collectives(found["calls"])


def test_a_run_moves_from_one_rank_to_two_and_back_with_the_same_losses(
    two: tuple[Path, list[Found]], alone: Path, shards: Catalog
) -> None:
    out, ranks = two
    # Only the last rank was told; all ended after the same step, and the log knows by what.
    assert [(r["moved"]["step"], r["moved"]["stopped_by"]) for r in ranks] == [(8, "SIGUSR1")] * 2
    summary = pretrain(SMALL, shards=shards.root, run_dir=out / "moved", resume=True)
    assert (summary.finished, summary.world_size) == (True, 1)
    assert _losses(out / "moved") == pytest.approx(_losses(alone), rel=LOSS_BOUND)


@pytest.mark.parametrize(("scenario", "step"), [("waiting", 5), ("judging", 4), ("saving", 5)])
def test_one_rank_that_is_told_ends_all_wherever_they_are(
    two: tuple[Path, list[Found]], scenario: str, step: int
) -> None:
    out, ranks = two
    assert [(r[scenario]["step"], r[scenario]["stopped_by"]) for r in ranks] == [(step, "SIGUSR1")] * 2
    assert [path.name for path in list_checkpoints(out / scenario / "checkpoints")] == [f"step-{step:09}.pt"]
    notes = [line["text"] for line in RunFolder(out / scenario).load_log("note")]
    assert notes == (["no kNN after epoch 1: SIGUSR1 came"] if scenario == "judging" else [])
