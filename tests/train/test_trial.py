"""The trial: two ranks, shards in a bucket that stalls and drops, poisoned, and a rank that dies or hangs."""

import json
import os
import shutil
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import xxhash
from tests.pipeline.flaky_server import FlakyServer
from tests.shards.servers import s3_environment
from tests.train.rank_server import RanksEnd, RankServer
from tests.train.trial_worker import watched_steps

from linerate.__main__ import main
from linerate.pipeline.bad_samples import KnownBad
from linerate.pipeline.order import EpochOrder
from linerate.shards.catalog import SHARDS_NAME, Catalog
from linerate.train.run_folder import RunFolder
from linerate.train.watchdog import EXIT_CODE

s3fs = pytest.importorskip("s3fs")

WORKER = "tests.train.trial_worker"
STEPS, LANES, DIES_AFTER = 8, 4, 4
FLAGS = [
    *("--encoder", "tiny-resnet-w4", "--size", "16", "--dim", "8", "--num-keys", "40", "--bn-group", "4"),
    *("--global-batch", "16", "--num-lanes", str(LANES), "--lr", "0.05", "--iterations", str(STEPS)),
    *("--loader-threads", "1", "--log-steps", "1", "--checkpoint-steps", "3", "--knn-epochs", "0"),
]


def poison(bucket: Path) -> tuple[KnownBad, Catalog]:
    """Of 72 samples in 9 shards: two with a flipped bit, one cut short, and a shard without its end.

    The hashes of the tars are those of the damaged ones: it happened before they were packed to the end.
    """
    catalog = Catalog.load(bucket)
    index = catalog.shard_index(1)
    with catalog.shard_path(1).open("r+b") as file:
        for row, place in ((2, 100), (5, 200)):
            file.seek(int(index.offset[row]) + place)
            byte = file.read(1)[0]
            file.seek(-1, os.SEEK_CUR)
            file.write(bytes([byte ^ 16]))
        half = int(index.size[7]) // 2
        file.seek(int(index.offset[7]) + half)
        file.write(bytes(int(index.size[7]) - half))
    table = pq.read_table(bucket / SHARDS_NAME)
    hashes = table.column("xxh3").to_pylist()
    hashes[1] = xxhash.xxh3_64_intdigest(catalog.shard_path(1).read_bytes())
    place = table.schema.get_field_index("xxh3")
    column = type(table.column("xxh3").combine_chunks()).from_pandas(np.array(hashes, dtype=np.uint64))
    pq.write_table(table.set_column(place, table.schema.field("xxh3"), column), bucket / SHARDS_NAME)
    os.truncate(catalog.shard_path(4), int(catalog.shard_index(4).offset[3]))
    first = int(catalog.starts[1])
    return KnownBad(frozenset({first + 2, first + 5, first + 7}), frozenset({4})), catalog


def trouble(name: str, nth: int) -> str | None:
    """For a while the bucket stalls and drops every tar."""
    return ("stall", "drop", None)[min(nth, 2)] if name.endswith("0.tar") or name.endswith("3.tar") else None


def load_records(folder: Path, *, world_size: int) -> dict[int, tuple[list[int], list[list[str]]]]:
    """step -> positions and hashes of both views of each image of the global batch, in its order."""
    found: dict[int, tuple[list[int], list[list[str]]]] = {}
    for rank in range(world_size):
        for line in map(json.loads, (folder / f"rank-{rank}.jsonl").read_text().splitlines()):
            positions, views = found.setdefault(line["step"], ([], []))
            positions += line["positions"]
            views += line["views"]
    return found


def expected(catalog: Catalog, known: KnownBad) -> tuple[dict[int, list[int]], int]:
    """By the order alone: step -> positions, and how many of them stand in for others."""
    steps, num_replaced = {}, 0
    for step in range(STEPS):
        epoch, at = divmod(step, catalog.num_samples // 16)
        order = EpochOrder(catalog.shard_sizes, seed=0, epoch=epoch, global_batch=16, num_lanes=LANES)
        positions = order.positions(at)
        stand_ins = known.stand_ins(positions, catalog.starts)
        steps[step] = stand_ins.tolist()
        num_replaced += int((positions != stand_ins).sum())
    return steps, num_replaced


@dataclass(frozen=True)
class Trial:
    """Two runs on two ranks: one whose rank 1 was killed, one whose rank 1 stood still."""

    args: list[str]
    """The killed one's; with --resume they continue it."""
    records: Path
    run: Path
    server: FlakyServer
    known: KnownBad
    catalog: Catalog
    killed: RanksEnd
    hung: RanksEnd


@pytest.fixture(scope="module")
def trial(shards: Catalog, ranks: RankServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Trial]:
    root = tmp_path_factory.mktemp("trial")
    bucket = root / "bucket"
    shutil.copytree(shards.root, bucket)
    known, catalog = poison(bucket)
    with FlakyServer(bucket) as server, pytest.MonkeyPatch.context() as patch:
        server.trouble = trouble
        for name, value in s3_environment(server.url).items():
            patch.setenv(name, value)
        where = ["--shards", "s3://photos/in", "--cache-dir", str(root / "cache"), "--timeout-s", "1"]
        args = ["demo", *where, "--run-dir", str(root / "killed"), *FLAGS, "--bad-share", "0.9", "--json"]
        # Rank 0 waits for rank 1 in a collective, as it would for one whose driver never returns.
        hangs = ["demo", "--shards", str(shards.root), "--run-dir", str(root / "hung"), *FLAGS]
        hangs += ["--backend", "synthetic", "--stall-seconds", "3"]
        ends = []
        for name, fault, words in (("killed", f"kill:1:{DIES_AFTER}", args), ("hung", "stop:1:2", hangs)):
            records = root / f"{name}-records"
            records.mkdir()
            environment = s3_environment(server.url)
            ends.append(
                ranks.run(WORKER, records, fault, *words, world_size=2, out=records, environment=environment)
            )
        killed, hung = ends
        s3fs.S3FileSystem.clear_instance_cache()
        yield Trial(args, root / "killed-records", root / "killed", server, known, catalog, killed, hung)
        s3fs.S3FileSystem.clear_instance_cache()


def test_a_rank_whose_peer_is_killed_ends_by_itself_with_its_place_and_its_stacks(trial: Trial) -> None:
    assert trial.killed.codes == [EXIT_CODE, -signal.SIGKILL]
    told = trial.killed.outputs[0]
    assert f"rank 0 after step {DIES_AFTER + 1}" in told
    assert "has lost another rank" in told
    stacks = (trial.run / "stall-rank00000.txt").read_text()
    assert f"rank 0 after step {DIES_AFTER + 1}" in stacks
    assert "pretrain.py" in stacks
    assert not (trial.run / "stall-rank00001.txt").exists()


def test_a_poisoned_stalled_and_killed_run_sees_the_right_samples(
    trial: Trial, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It goes on, on one rank, from the checkpoint after step 3: the same samples, bit for bit."""
    with watched_steps(tmp_path):
        assert main(["train", *trial.args, "--resume"]) == 0
    summary = json.loads(capsys.readouterr().out)
    assert (summary["step"], summary["finished"], summary["world_size"]) == (STEPS, True, 1)
    (resumed,) = RunFolder(trial.run).load_log("note")[-1:]
    assert resumed["text"] == "continuing after step 3"
    before, after = load_records(trial.records, world_size=2), load_records(tmp_path, world_size=1)
    assert sorted(before) == list(range(DIES_AFTER + 1))
    assert sorted(after) == list(range(3, STEPS))
    positions, num_replaced = expected(trial.catalog, trial.known)
    assert {step: seen for step, (seen, _) in (before | after).items()} == positions
    # The steps after the checkpoint were done twice, with bit-equal views.
    assert all(before[step] == after[step] for step in before.keys() & after.keys())
    assert summary["replaced"] == num_replaced > 8
    assert trial.server.counts["shard-000000.tar"] >= 3
    told = {(one["shard"], one["num_samples"]) for one in summary["damage"]}
    assert told == {(trial.catalog.files[1], 3), (trial.catalog.files[4], None)}
    assert [Path(path).name for path in summary["bad_sample_logs"]] == [
        "bad_samples-rank00000.jsonl",
        "bad_samples-rank00001.jsonl",
    ]


def test_when_a_rank_hangs_every_rank_tells_its_place_and_ends_with_75(trial: Trial) -> None:
    run, records = trial.run.with_name("hung"), trial.records.with_name("hung-records")
    assert (trial.hung.codes, trial.hung.first) == ([EXIT_CODE, EXIT_CODE], 0)
    for rank in range(2):
        # Rank 1 stood still after its third step; rank 0 waits for it before the fourth, or in it.
        assert f"error: rank {rank} after step " in trial.hung.outputs[rank]
        stacks = (run / f"stall-rank{rank:05d}.txt").read_text()
        assert f"rank {rank} after step " in stacks
        assert "trial_worker.py" in stacks
    assert "has had no batch for" in trial.hung.outputs[0]
    assert len((records / "rank-1.jsonl").read_text().splitlines()) == 3
