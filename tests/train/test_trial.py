"""The trial: two ranks, shards in a bucket that stalls and drops, poisoned, and a rank that dies or hangs."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import xxhash
from tests.pipeline.flaky_server import FlakyServer
from tests.shards.servers import s3_environment

from linerate.pipeline.bad_samples import KnownBad
from linerate.pipeline.order import EpochOrder
from linerate.shards.catalog import SHARDS_NAME, Catalog
from linerate.train.run_folder import RunFolder
from linerate.train.watchdog import EXIT_CODE

pytest.importorskip("s3fs")

WORKER = Path(__file__).with_name("trial_worker.py")
STEPS, LANES = 12, 4
FLAGS = [
    *("--encoder", "tiny-resnet-w4", "--size", "16", "--dim", "8", "--num-keys", "40", "--bn-group", "4"),
    *("--global-batch", "16", "--num-lanes", str(LANES), "--lr", "0.05", "--iterations", str(STEPS)),
    *("--loader-threads", "1", "--log-steps", "1", "--checkpoint-steps", "3", "--knn-epochs", "0"),
]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HOME": "/nonexistent"}
ENVIRONMENT["PYTHONPATH"] = os.pathsep.join(sys.path)


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


def launch(records: Path, fault: str, *args: str, env: dict[str, str]) -> subprocess.CompletedProcess[str]:
    records.mkdir()
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [sys.executable, *launcher, str(WORKER), str(records), fault, "demo", *args, *FLAGS]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=400, check=False)


def load_records(folder: Path) -> dict[tuple[int, int], dict[str, Any]]:
    """(step, rank) -> what that rank saw."""
    return {
        (line["step"], rank): line
        for rank in range(2)
        for line in map(json.loads, (folder / f"rank-{rank}.jsonl").read_text().splitlines())
    }


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


def test_a_poisoned_stalled_and_killed_run_sees_the_right_samples(shards: Catalog, tmp_path: Path) -> None:
    bucket, run = tmp_path / "bucket", tmp_path / "run"
    shutil.copytree(shards.root, bucket)
    known, catalog = poison(bucket)
    with FlakyServer(bucket) as server:
        server.trouble = trouble
        env = ENVIRONMENT | s3_environment(server.url)
        where = ["--shards", "s3://photos/in", "--cache-dir", str(tmp_path / "cache"), "--timeout-s", "1"]
        args = [*where, "--run-dir", str(run), "--bad-share", "0.9", "--json", "--stall-seconds", "30"]
        killed = launch(tmp_path / "killed", "kill:1:7", *args, env=env)
        done = launch(tmp_path / "resumed", "none", *args, "--resume", env=env)
    # Rank 1 is dead; rank 0 has ended by itself, with its place and its stacks.
    assert killed.returncode != 0
    assert "has lost another rank" in killed.stderr, killed.stderr
    stacks = (run / "stall-rank00000.txt").read_text()
    assert "rank 0 after step" in stacks
    assert "pretrain.py" in stacks
    assert not (run / "stall-rank00001.txt").exists()
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout)
    assert (summary["step"], summary["finished"], summary["world_size"]) == (STEPS, True, 2)
    (resumed,) = RunFolder(run).load_log("note")[-1:]
    assert resumed["text"] == "continuing after step 6"
    positions, num_replaced = expected(catalog, known)
    before, after = load_records(tmp_path / "killed"), load_records(tmp_path / "resumed")
    seen = before | after
    assert {s: seen[s, 0]["positions"] + seen[s, 1]["positions"] for s in range(STEPS)} == positions
    # The steps after the checkpoint were done twice, with bit-equal views.
    twice = before.keys() & after.keys()
    assert len(twice) >= 3
    assert all(before[one] == after[one] for one in twice)
    assert summary["replaced"] == num_replaced > 8
    assert server.counts["shard-000000.tar"] >= 3
    told = {(one["shard"], one["num_samples"]) for one in summary["damage"]}
    assert told == {(catalog.files[1], 3), (catalog.files[4], None)}
    assert [Path(path).name for path in summary["bad_sample_logs"]] == [
        "bad_samples-rank00000.jsonl",
        "bad_samples-rank00001.jsonl",
    ]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def test_when_a_rank_hangs_every_rank_tells_its_place_and_ends_with_75(
    shards: Catalog, tmp_path: Path
) -> None:
    """Rank 1 stands still, as in a driver that never returns: rank 0 waits for it in a collective."""
    records, run = tmp_path / "records", tmp_path / "run"
    records.mkdir()
    args = ["--shards", str(shards.root), "--run-dir", str(run), "--backend", "synthetic", *FLAGS]
    command = [sys.executable, str(WORKER), str(records), "stop:1:2", "demo", *args, "--stall-seconds", "2"]
    env = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    env |= {"MASTER_PORT": str(free_port())}
    ranks = [
        subprocess.Popen(
            command,
            env=ENVIRONMENT | env | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        _, first = ranks[0].communicate(timeout=300)
        assert ranks[1].poll() is None
        ranks[1].send_signal(signal.SIGCONT)
        _, second = ranks[1].communicate(timeout=120)
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
    assert [rank.returncode for rank in ranks] == [EXIT_CODE, EXIT_CODE]
    for rank, told in enumerate((first, second)):
        assert f"error: rank {rank} after step" in told
        stacks = (run / f"stall-rank{rank:05d}.txt").read_text()
        assert f"rank {rank} after step" in stacks
        assert "trial_worker.py" in stacks
    assert "has had no batch for" in first
