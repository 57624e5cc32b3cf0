"""One image of each content: every planned image is read once and hashed, and of equal ones the first stays.

What it costs: the whole source is read once more before packing (over the network: fetched once more), at
the speed of the reader, in as many processes as packing uses. The hashes, 32 bytes an image beside its key,
lie in OUT/.pack until the shards are done, so a run that was killed goes on where it stopped (not where OUT
is a URL), and one that is done knows it without them. With --worker-index one worker hashes while the others
wait.

An append compares with the shards that are there by size and xxh3_64, which their .parquet have; no tar is
read: among 1e9 images there and 1e7 new ones, sizes spread over 1e5 values, some pair has both equal by
chance with a probability of 5e-9. What was written anew when it was packed has another hash than its source,
so its equals are not found.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

from linerate.shards.engines import LOCAL, Engine, StoppedError, choose_num_workers, run_tasks
from linerate.shards.errors import UserError
from linerate.shards.fetch import SampleReader, hide_userinfo
from linerate.shards.fetch_options import FetchOptions
from linerate.shards.inspect_image import REWRITTEN, RejectedError
from linerate.shards.manifest_sql import literal
from linerate.shards.options import Sizing
from linerate.shards.plan import Plan, make_plan_without
from linerate.shards.plan_rows import DUPLICATE_BYTES
from linerate.shards.scan import REJECT_SCHEMA
from linerate.shards.spill import prepare_tasks, spilled_rows

_PLAN_KEY = b"linerate plan"
_REPORT_EVERY = 256


@dataclass(frozen=True, kw_only=True)
class HashTask:
    """The images of one planned shard; picklable and small."""

    plan_folder: str
    shard: int
    folder: str
    max_bytes: int
    fetch: FetchOptions

    @property
    def path(self) -> Path:
        """The file of hashes."""
        return Path(self.folder) / f"{self.shard:06d}.parquet"


@dataclass(frozen=True, kw_only=True)
class Equal:
    """What was found in the shards that an append adds to."""

    num_known: int
    """Images of the plan whose bytes they hold."""
    num_incomparable: int
    """Of their images those that were written anew when packed."""


def drop_equal_images(
    plan: Plan,
    folder: Path,
    *,
    known: Sequence[Path] = (),
    sizing: Sizing,
    num_workers: int | None,
    engine: Engine = LOCAL,
    memory: str,
    max_bytes: int = 1 << 30,
    fetch: FetchOptions | None = None,
    on_progress: Callable[[int], None] = lambda images: None,
) -> tuple[Plan, Equal]:
    """The plan less images whose bytes another has; each is a reject, `duplicate of KEY`.

    Of equal images the first by key stays, or none where a shard of `known`, .parquet files, holds one. It
    may be left without any. folder: for the hashes; those of this very plan are used again.
    max_bytes: images of more are left to packing, which rejects them. fetch: how URLs are fetched.
    Raises UserError where the source as a whole cannot be read.
    """
    folder.mkdir(exist_ok=True)
    tasks = [
        HashTask(
            plan_folder=os.fspath(plan.folder),
            shard=shard,
            folder=os.fspath(folder),
            max_bytes=max_bytes,
            fetch=fetch or FetchOptions(),
        )
        for shard in range(plan.num_shards)
    ]
    todo = [task for task in tasks if not _is_done(task, plan.plan_id)]
    local_workers = choose_num_workers(num_workers, num_bytes=plan.total_bytes, may_crash=False)
    try:
        # As when packing: large tars are read front to back, not image by image.
        prepare_tasks(plan, [task.shard for task in todo], num_workers=local_workers)
        failures = run_tasks(
            "linerate.shards.dedup:run_hash_task",
            todo,
            num_workers=local_workers if engine.kind == "local" else num_workers,
            engine=engine,
            on_done=lambda index, result: None,
            on_progress=on_progress,
        )
    except StoppedError as stop:
        raise UserError(
            f"{stop.failure.text}; the same command again continues once that is mended"
        ) from None
    if failures:
        failure = next(iter(failures.values()))
        raise UserError(
            f"the images of {len(failures)} of {len(tasks)} planned shards could not be hashed in three "
            f"attempts ({failure.kind}: {failure.text}); the same command again tries them once more"
        )
    return _drop(plan, folder, tasks, known, sizing=sizing, memory=memory)


def run_hash_task(task: HashTask, report: Callable[[int], None]) -> Callable[[], None]:
    """Hash the images of one planned shard into its file."""
    plan = Plan.load(Path(task.plan_folder))
    rows, containers = spilled_rows(plan, plan.load_rows(task.shard), task.shard)
    rows = hide_userinfo(rows, containers)
    first = plan.first_sample_id(task.shard)
    sizes: list[int] = rows.column("size").to_pylist()
    hashes: list[tuple[bytes | None, int | None]] = []
    with SampleReader(rows, containers, max_bytes=task.max_bytes, options=task.fetch) as reader:
        for row in range(len(sizes)):
            if row % _REPORT_EVERY == 0 and row:
                report(_REPORT_EVERY)
            try:
                sizes[row], digests = _hash_next(reader)
                hashes.append(digests)
            except RejectedError:
                hashes.append((None, None))
    report((len(sizes) - 1) % _REPORT_EVERY + 1)
    table = pa.table(
        {
            "sample_id": pa.array(range(first, first + len(sizes)), pa.int64()),
            "key": rows.column("key"),
            "size": pa.array(sizes, pa.int64()),
            # Null where the image cannot be read: packing will say why.
            "xxh3_128": pa.array([wide for wide, _ in hashes], pa.binary()),
            "xxh3_64": pa.array([narrow for _, narrow in hashes], pa.uint64()),
        }
    )
    table = table.replace_schema_metadata({_PLAN_KEY: plan.plan_id})
    return functools.partial(_write, table, task.path)


def _hash_next(reader: SampleReader) -> tuple[int, tuple[bytes, int]]:
    """(bytes, (xxh3_128, xxh3_64)) of the next image."""
    held = memoryview(b"")

    def room(size: int) -> memoryview:
        nonlocal held
        held = memoryview(bytearray(size + 1))
        return held

    size = reader.read_next(room)
    return size, (xxhash.xxh3_128_digest(held[:size]), xxhash.xxh3_64_intdigest(held[:size]))


def _write(table: Any, path: Path) -> None:
    temp = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    pq.write_table(table, temp, compression="zstd")
    temp.replace(path)


def _is_done(task: HashTask, plan_id: str) -> bool:
    try:
        schema = pq.read_schema(task.path)
        done = (schema.metadata or {}).get(_PLAN_KEY) == plan_id.encode()
        return bool(done and "xxh3_64" in schema.names)
    except (OSError, pa.ArrowException):
        return False


def _drop(
    plan: Plan, folder: Path, tasks: list[HashTask], known: Sequence[Path], *, sizing: Sizing, memory: str
) -> tuple[Plan, Equal]:
    from linerate.shards.plan_query import open_database

    with open_database(folder, memory=memory) as db:
        db.execute(
            f"CREATE VIEW hashed AS SELECT * FROM read_parquet({_listed(task.path for task in tasks)}) "
            f"WHERE xxh3_128 IS NOT NULL"
        )
        num_incomparable = _find_known(db, known)
        db.execute(
            """CREATE TABLE dropped AS
            SELECT sample_id, h.key, size, coalesce(k.key, first_key) AS first_key, k.key IS NOT NULL AS known
            FROM (SELECT *, first_value(key) OVER same AS first_key FROM hashed
                WINDOW same AS (PARTITION BY xxh3_128 ORDER BY key)) h
            LEFT JOIN known k USING (xxh3_64, size) WHERE known OR h.key != first_key"""
        )
        num_known = db.execute("SELECT count(*) FROM dropped WHERE known").fetchall()[0][0]
        ids = _batches(db, "SELECT sample_id FROM dropped ORDER BY sample_id")
        rejects = _batches(
            db,
            f"SELECT NULL::BIGINT AS sample_id, key, size, '{DUPLICATE_BYTES}' AS reason, "
            "'of ' || first_key AS detail FROM dropped ORDER BY key",
        )
        left = make_plan_without(
            plan,
            (batch.column("sample_id").to_numpy() for batch in ids),
            rejects=(pa.Table.from_batches([batch]).cast(REJECT_SCHEMA) for batch in rejects),
            sizing=sizing,
            listed_id=plan.plan_id,
        )
    return left, Equal(num_known=num_known, num_incomparable=num_incomparable)


def _find_known(db: Any, known: Sequence[Path]) -> int:
    """The table `known`: a key of each content that is there and in `hashed`. How many there have no say."""
    db.execute("CREATE TABLE known (xxh3_64 UBIGINT, size BIGINT, key VARCHAR)")
    if not known:
        return 0
    there = f"read_parquet({_listed(known)}, union_by_name = true)"
    db.execute(
        f"INSERT INTO known SELECT xxh3_64, size, min(key) FROM {there} "
        f"SEMI JOIN hashed USING (xxh3_64, size) WHERE flags & {REWRITTEN} = 0 GROUP BY ALL"
    )
    counted = db.execute(f"SELECT count(*) FROM {there} WHERE flags & {REWRITTEN} != 0").fetchall()
    return int(counted[0][0])


def _listed(paths: Iterable[Path]) -> str:
    return "[" + ", ".join(literal(os.fspath(path)) for path in paths) + "]"


def _batches(db: Any, query: str) -> Iterator[Any]:
    # A cursor of its own: two results are read side by side.
    found = db.cursor().sql(query)
    reader = getattr(found, "to_arrow_reader", None) or found.fetch_arrow_reader
    yield from reader(65_536)
