"""What each shard cost: one row a shard, whatever was killed or packed again."""

from pathlib import Path

import pytest

from linerate.shards.catalog import Catalog
from linerate.shards.options import PackOptions
from linerate.shards.pack import pack
from linerate.shards.shard_stats import ShardStats, StatsLog, load_stats, write_stats
from linerate.shards.worker import TaskFailure

STATS = ShardStats(
    shard=1,
    samples=7,
    rejects=1,
    bytes_read=10,
    bytes_written=20,
    seconds=0.5,
    sync_seconds=0.1,
    peak_rss_mib=50.0,
    images_per_s=16.0,
    host="here",
    finished_at=1.0,
)


def test_a_row_tells_what_a_shard_cost(packed: Catalog, photo_folder: Path) -> None:
    rows = load_stats(packed.root)
    assert [(row.shard, row.samples, row.rejects, row.retries) for row in rows] == [
        (shard, 8, 0, 0) for shard in range(5)
    ]
    assert sum(row.bytes_read for row in rows) == sum(p.stat().st_size for p in photo_folder.rglob("*.jpg"))
    assert [row.bytes_written for row in rows] == list(packed.shard_bytes)
    for row in rows:
        assert row.images_per_s == pytest.approx(8 / row.seconds)
        assert row.peak_rss_mib > 10


def test_a_killed_run_keeps_what_it_measured(tmp_path: Path) -> None:
    work = tmp_path / ".pack"
    work.mkdir()
    log = StatsLog(work / "stats.jsonl")
    log.retried(4, TaskFailure("WorkerDied", "killed"))
    log.add(4, STATS)
    with (work / "stats.jsonl").open("a") as file:
        file.write('{"shard": 2, "samp')
    write_stats(tmp_path, work)
    (row,) = load_stats(tmp_path)
    assert (row.shard, row.retries) == (1, 1)


def test_later_rows_take_the_place_of_earlier_ones(tmp_path: Path) -> None:
    work = tmp_path / ".pack"
    work.mkdir()
    StatsLog(work / "stats.jsonl").add(0, STATS)
    write_stats(tmp_path, work)
    (work / "stats.jsonl").unlink()
    write_stats(tmp_path, work)
    assert [row.samples for row in load_stats(tmp_path)] == [7]
    StatsLog(work / "stats-0-of-2.jsonl").add(0, ShardStats(**{**vars(STATS), "samples": 9}))
    write_stats(tmp_path, work)
    assert [row.samples for row in load_stats(tmp_path)] == [9]


def test_there_may_be_none(tmp_path: Path) -> None:
    write_stats(tmp_path, tmp_path)
    assert load_stats(tmp_path) == []
    (tmp_path / "pack_stats.parquet").write_bytes(b"PAR1")
    StatsLog(tmp_path / "stats.jsonl").add(0, STATS)
    write_stats(tmp_path, tmp_path)
    assert len(load_stats(tmp_path)) == 1


def test_retries_are_counted(photo_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from linerate.shards import pack_shard

    run_task, seen = pack_shard.run_task, set[int]()

    def fail_once(task: pack_shard.ShardTask, report: object) -> object:
        if task.shard not in seen:
            seen.add(task.shard)
            raise RuntimeError("once")
        return run_task(task, report)  # type: ignore[arg-type]

    monkeypatch.setattr(pack_shard, "run_task", fail_once)
    pack(photo_folder, tmp_path / "out", options=PackOptions(shard_samples=20), num_workers=0)
    assert {row.retries for row in load_stats(tmp_path / "out")} == {1}
