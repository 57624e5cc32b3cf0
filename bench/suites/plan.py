"""Planning a manifest: filter, global shuffle, task lists, on one core; and its memory, which must not grow.

The peer is DuckDB's bare `COPY (... ORDER BY hash(path))` of the same rows: one sorted file, no task lists,
an order that another version of it need not keep. Of our time, 0.12 us a row is what an order for all time
costs (xxh3 by its library), and 0.1 us the digest and the task lists.

Run as a module, with MANIFEST FOLDER MEMORY for arguments, it is the child whose memory is measured.
"""

import contextlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import duckdb

from linerate.bench.contest import Bar, Ceiling, Contest, Count, Disagreement, Setting
from linerate.bench.timing import Side, one_core
from linerate.shards.manifest import ManifestSource
from linerate.shards.options import Dedup, Selection, Sizing
from linerate.shards.plan import Plan, make_plan

WHERE = "size > 21000"  # leaves out one row in 200
MEMORY = "4GB"


def bench_plan(setting: Setting) -> Iterator[Contest | Count]:
    """Filter + shuffle + task lists of a table of 60-byte paths; the full size takes most of an hour."""
    rows = setting.pick(tiny=2_000, quick=500_000, full=50_000_000)
    folder = setting.scratch / "table"
    folder.mkdir()
    table = _write_table(folder / "rows.parquet", rows)
    with one_core():
        yield _contest(setting, [table], rows, dedup=None)
        again = folder / "again.parquet"
        with duckdb.connect() as db:
            db.execute(f"COPY (SELECT * FROM '{table}' LIMIT {rows // 100}) TO '{again}'")
        yield _contest(setting, [table, again], rows + rows // 100, dedup="key")
    again.unlink()
    yield _memory_count(setting, table, rows)


def _write_table(path: Path, rows: int) -> Path:
    with duckdb.connect() as db:
        db.execute("SET enable_progress_bar = false")
        db.execute(
            "COPY (SELECT 'images/part-' || lpad((i % 1000)::VARCHAR, 4, '0') || '/' || md5(i::VARCHAR) "
            "|| '-00.jpg' AS path, (hash(i) % 200000 + 20000)::INTEGER AS size, "
            f"(hash(i * 7) % 1000)::INTEGER AS label FROM range({rows}) r(i)) TO '{path}' (COMPRESSION zstd)"
        )
    return path


def _contest(setting: Setting, tables: list[Path], rows: int, *, dedup: Dedup | None) -> Contest:
    ours, theirs = setting.scratch / "plan", setting.scratch / "sorted"
    listed = "[" + ", ".join(f"'{table}'" for table in tables) + "]"
    wanted = f"SELECT * FROM read_parquet({listed}) WHERE {WHERE}"
    if dedup:
        wanted = f"SELECT path, min(size) AS size, min(label) AS label FROM ({wanted}) GROUP BY path"

    def copy() -> None:
        config: dict[str, str | bool | int | float | list[str]] = {
            "memory_limit": MEMORY,
            "threads": 1,
            "temp_directory": os.fspath(theirs / "spill"),
        }
        with duckdb.connect(config=config) as db:
            db.execute("SET enable_progress_bar = false")
            db.execute(f"COPY ({wanted} ORDER BY hash(path)) TO '{theirs / 'rows.parquet'}'")

    def scan() -> None:
        with duckdb.connect(config={"threads": 1}) as db:
            # Every column is read, and the hash of every path that is sorted by is computed.
            db.execute(f"SELECT bit_xor(hash(path)), sum(size), sum(label) FROM ({wanted})").fetchall()

    def agree() -> str:
        _empty(ours)
        plan = _plan(tables, ours, dedup=dedup)
        _empty(theirs)
        copy()
        return _require_same_rows(plan, theirs / "rows.parquet")

    return Contest(
        peer=f"DuckDB's bare {'GROUP BY path + ' if dedup else ''}ORDER BY hash, COPY",
        work=f"{rows:,} rows of 60-byte paths: filter{', dedup by key' if dedup else ''}, global shuffle, "
        f"task lists; {MEMORY}, one core",
        unit="rows/s",
        amount=rows,
        ours=Side(run=lambda: _plan(tables, ours, dedup=dedup), prepare=lambda: _empty(ours)),
        theirs=Side(run=copy, prepare=lambda: _empty(theirs)),
        agree=agree,
        bar=Bar(1 / 1.3, full_size=setting.size == "full"),
        ceiling=Ceiling(
            name=f"DuckDB's scan, filter{', GROUP BY path' if dedup else ''} hash of each path",
            side=Side(run=scan),
        ),
    )


def _plan(tables: list[Path], folder: Path, *, dedup: Dedup | None = None, memory: str = MEMORY) -> Plan:
    return make_plan(
        ManifestSource(tables),
        folder,
        seed=0,
        sizing=Sizing(),
        options={},
        selection=Selection(where=WHERE, dedup=dedup),
        memory=memory,
    )


def _require_same_rows(plan: Plan, other: Path) -> str:
    sums = "count(*), bit_xor(hash(k, size, label)), sum(hash(k, size, label))"
    with duckdb.connect() as db:
        files = f"read_parquet('{plan.folder}/plan*.parquet')"
        a = db.execute(
            f"SELECT {sums} FROM (SELECT key AS k, size::INTEGER AS size, label FROM {files})"
        ).fetchall()
        b = db.execute(f"SELECT {sums} FROM (SELECT path AS k, size, label FROM '{other}')").fetchall()
    if a != b:
        raise Disagreement(f"the plan holds {a[0][0]:,} rows, the sorted file {b[0][0]:,}, or others")
    return f"the {plan.num_samples:,} rows of both, in {plan.num_shards:,} task lists"


def _memory_count(setting: Setting, table: Path, rows: int) -> Count:
    """Peaks at a quarter of the rows and at all; with a limit that a quarter's sort exceeds already."""
    quarter = _write_table(table.with_name("quarter.parquet"), rows // 4)
    memory = setting.pick(tiny="256MB", quick="256MB", full="1GB")
    small, large = (_child_peak(one, setting.scratch / "plan", memory) for one in (quarter, table))
    return Count(
        peer=f"the same of {rows // 4:,} rows",
        work=f"peak memory of a plan of {rows:,} rows, --memory {memory}",
        unit="MiB",
        ours=large,
        theirs=small,
        bar=Bar(0.9, full_size=setting.size == "full"),
        note="resident memory of a process of its own, imports and all",
    )


def _child_peak(table: Path, folder: Path, memory: str) -> float:
    _empty(folder)
    command = [sys.executable, "-m", __name__, os.fspath(table), os.fspath(folder), memory]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, env=environment)
    return float(json.loads(done.stdout)["peak_mib"])


def _empty(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()


def main(argv: list[str], write: Callable[[str], object] = sys.stdout.write) -> None:
    """The child: plan the manifest, then the MiB of its peak."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    _plan([Path(argv[0])], Path(argv[1]), memory=argv[2])
    lines = Path("/proc/self/status").read_text().splitlines()
    peak_kib = next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))
    write(json.dumps({"peak_mib": peak_kib / 1024}))


if __name__ == "__main__":
    main(sys.argv[1:])
