"""Pack a source into shards: plan, one task per shard, finish; each step can be taken again after a kill."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import os
import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from linerate.shards.catalog import CATALOG_NAME, REJECTED_NAME, Catalog, write_catalog
from linerate.shards.dedup import drop_equal_images
from linerate.shards.engines import StoppedError, choose_num_workers, run_tasks
from linerate.shards.errors import UserError
from linerate.shards.manifest import ManifestSource, open_any_source
from linerate.shards.options import PackOptions
from linerate.shards.out_folder import (
    WORK_NAME,
    claim_folder,
    lock_folder,
    remove_marks,
    remove_stale,
    remove_work,
    require_space,
    tidy_folder,
)
from linerate.shards.pack_shard import ShardMark, ShardTask, load_mark, load_plan_id
from linerate.shards.plan import (
    DEFAULT_MEMORY,
    REJECT_SCHEMA,
    REJECTS_NAME,
    Plan,
    load_options,
    make_plan,
)
from linerate.shards.sources import Source
from linerate.shards.worker import TaskFailure

Progress = Callable[[str, float], None]
"""Called with ("list", rows listed since), ("plan", samples to do), ("pack", samples done since)."""


def pack(
    source: Path | str | Sequence[Path | str],
    out: Path | str,
    *,
    options: PackOptions | None = None,
    num_workers: int | None = None,
    memory: str = DEFAULT_MEMORY,
    on_progress: Progress = lambda stage, amount: None,
) -> Catalog:
    """The catalog of `out`, which holds every acceptable image of `source` when this returns.

    source: a folder of images (class folders become labels), one or several tars of one, or manifests.
    The same call again continues where a killed one stopped, and is quick when nothing is left to do.
    num_workers: processes, by default one per core, or none for little work; 0 works in this one. It never
    changes a byte.
    memory: that planning may take, such as `4GB`; a longer list spills into OUT.
    Raises UserError for what cannot work; nothing that `out` held before is touched then.
    """
    paths = [source] if isinstance(source, Path | str) else list(source)
    options = options or PackOptions()
    opened = open_any_source(paths, columns=options.manifest_columns)
    return pack_source(
        opened, out, options=options, num_workers=num_workers, memory=memory, on_progress=on_progress
    )


def pack_source(
    opened: Source | ManifestSource,
    out: Path | str,
    *,
    options: PackOptions | None = None,
    num_workers: int | None = None,
    memory: str = DEFAULT_MEMORY,
    on_progress: Progress = lambda stage, amount: None,
) -> Catalog:
    """As `pack`, for a source that is open already."""
    options = options or PackOptions()
    out = Path(out)
    made = claim_folder(out, sources=opened.containers)
    with lock_folder(out):
        try:
            return _pack_locked(opened, out, options, num_workers, memory, on_progress)
        except _NothingKeptError as error:
            remove_marks(out, options.name)
            raise UserError(str(error)) from None
        finally:
            tidy_folder(out, made=made)


class _NothingKeptError(UserError):
    pass


def _pack_locked(
    source: Source | ManifestSource,
    out: Path,
    options: PackOptions,
    num_workers: int | None,
    memory: str,
    on_progress: Progress,
) -> Catalog:
    remove_stale(out)
    _refuse_other_options(out, options)
    plan = _plan(source, out, options, num_workers, memory, on_progress)
    tasks = [
        ShardTask(
            plan_folder=os.fspath(plan.folder),
            shard=shard,
            out=os.fspath(out),
            name=options.name,
            policy=options.policy,
        )
        for shard in range(plan.num_shards)
    ]
    marks = {task.shard: mark for task in tasks if (mark := load_mark(task, plan_id=plan.plan_id))}
    todo = [task for task in tasks if task.shard not in marks]
    if not todo and (out / CATALOG_NAME).exists():
        remove_work(out)
        return Catalog.load(out)
    # Of what is left alone: shards that an earlier call finished would show as a rate that nobody reached.
    on_progress("plan", plan.num_samples * len(todo) // plan.num_shards)
    jpeg_bytes = options.expected_bytes(samples=plan.num_samples, total_bytes=plan.total_bytes)
    num_bytes = (jpeg_bytes + 1024 * plan.num_samples) * len(todo) // plan.num_shards
    require_space(out, num_bytes=num_bytes)

    def on_done(index: int, mark: ShardMark) -> None:
        marks[mark.shard] = mark

    try:
        failures = run_tasks(
            "linerate.shards.pack_shard:run_task",
            todo,
            num_workers=choose_num_workers(
                num_workers, num_bytes=plan.total_bytes, may_crash=options.may_crash
            ),
            on_done=on_done,
            on_progress=lambda samples: on_progress("pack", samples),
        )
    except StoppedError as stop:
        raise _stopped(out, stop.failure, done=len(marks), total=len(tasks)) from None
    if failures:
        raise _failed({todo[i].shard: f for i, f in failures.items()}, done=len(marks), total=len(tasks))
    return finish(out, plan, [marks[task.shard] for task in tasks], options)


def finish(out: Path, plan: Plan, marks: list[ShardMark], options: PackOptions) -> Catalog:
    """Write rejected.parquet, shards.parquet and, last, catalog.json from the marks of all shards."""
    rejects = _collect_rejects(plan, marks)
    kept = [mark for mark in marks if mark.samples]
    if not kept:
        raise _NothingKeptError(_all_rejected(rejects))
    temp = out / f".{REJECTED_NAME}.tmp"
    pq.write_table(rejects, temp, compression="zstd")
    temp.replace(out / REJECTED_NAME)
    shards = pa.table(
        {
            "file": pa.array([f"{options.name}-{mark.shard:06d}.tar" for mark in kept], pa.string()),
            "samples": pa.array([mark.samples for mark in kept], pa.int64()),
            "bytes": pa.array([mark.tar_bytes for mark in kept], pa.int64()),
            "xxh3": pa.array([mark.tar_xxh3 for mark in kept], pa.uint64()),
        }
    )
    header = {
        "name": options.name,
        "seed": options.seed,
        "plan_id": plan.plan_id,
        "num_samples": sum(mark.samples for mark in kept),
        "num_planned": plan.num_samples,
        "num_rejected": rejects.num_rows,
        "max_height": max(mark.max_height for mark in kept),
        "max_width": max(mark.max_width for mark in kept),
        "max_sample_bytes": max(mark.max_sample_bytes for mark in kept),
        "options": dataclasses.asdict(options),
        "filtered": plan.filtered,
        "class_names": plan.class_names,
    }
    write_catalog(out, header=header, shards=shards)
    remove_work(out)
    return Catalog.load(out)


def _collect_rejects(plan: Plan, marks: list[ShardMark]) -> Any:
    rows = [row for mark in marks for row in mark.rejects]
    columns = list(zip(*rows, strict=True)) or [()] * len(REJECT_SCHEMA)
    arrays = [pa.array(column, field.type) for column, field in zip(columns, REJECT_SCHEMA, strict=True)]
    packed = pa.Table.from_arrays(arrays, schema=REJECT_SCHEMA)
    return pa.concat_tables([packed, pq.read_table(plan.folder / REJECTS_NAME)]).combine_chunks()


def _all_rejected(rejects: Any) -> str:
    rows = zip(rejects.column("reason").to_pylist(), rejects.column("detail").to_pylist(), strict=True)
    seen = Counter(f"{reason} ({detail})" if detail else reason for reason, detail in rows)
    listed = "; ".join(f"{count} {reason}" for reason, count in seen.most_common(4))
    return (
        f"none of the {rejects.num_rows} files is an image that can be packed: {listed}; shards hold JPEGs, "
        f"and --baseline makes them of PNG, WebP, GIF, BMP, TIFF, PNM and AVIF"
    )


def _refuse_other_options(out: Path, options: PackOptions) -> None:
    stored: dict[str, Any] | None = None
    with contextlib.suppress(OSError, ValueError, KeyError):
        stored = load_options(out / WORK_NAME)
    if stored is None and (out / CATALOG_NAME).exists():
        stored = Catalog.load(out).options
    if stored is None:
        return
    wanted = dataclasses.asdict(options)
    differ = [
        f"--{key.replace('_', '-')} was {stored.get(key)}, now {wanted.get(key)}"
        for key in sorted(stored.keys() | wanted.keys())
        if stored.get(key) != wanted.get(key)
    ]
    if differ:
        raise UserError(
            f"OUT {out} was begun with other options: {'; '.join(differ)}; repeat those, or give another OUT"
        )


def _plan(
    source: Source | ManifestSource,
    out: Path,
    options: PackOptions,
    num_workers: int | None,
    memory: str,
    on_progress: Progress,
) -> Plan:
    """A plan of the source as it is now; refused when it is not the one that OUT was begun with."""
    work = out / WORK_NAME
    before = _plan_before(out)
    fresh = work / "new"
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir()
    plan = make_plan(
        source,
        fresh,
        seed=options.seed,
        sizing=options.sizing,
        options=dataclasses.asdict(options),
        selection=options.selection,
        memory=memory,
        on_rows=lambda rows: on_progress("list", rows),
    )
    if options.dedup == "bytes":
        plan = drop_equal_images(
            plan,
            work / "hashes",
            sizing=options.sizing,
            num_workers=num_workers,
            memory=memory,
            on_progress=lambda images: on_progress("list", images),
        )
    if before is not None and before[0] != plan.plan_id:
        raise UserError(
            f"the source is not the one that OUT {out} was begun with ({before[1]} samples then, "
            f"{plan.num_samples} now, or other names, sizes or options); give that one, or another OUT"
        )
    for path in fresh.iterdir():
        if path.is_file():
            path.replace(work / path.name)
    shutil.rmtree(fresh)
    return Plan.load(work)


def _plan_before(out: Path) -> tuple[str, int | str] | None:
    """(plan id, number of samples) of what lies in OUT already."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        stored = Plan.load(out / WORK_NAME)
        return stored.plan_id, stored.num_samples
    if (out / CATALOG_NAME).exists():
        catalog = Catalog.load(out)
        return catalog.plan_id, catalog.num_planned
    for path in sorted(out.glob("*-??????.parquet")):
        if (plan_id := load_plan_id(path)) is not None:
            return plan_id, "other"
    return None


def _stopped(out: Path, failure: TaskFailure, *, done: int, total: int) -> UserError:
    kept = f"{done} of {total} shards are whole; the same command again continues"
    if failure.errno in (errno.ENOSPC, errno.EDQUOT):
        return UserError(f"no space left for {out}; {kept} once there is space")
    return UserError(f"{failure.text}; {kept} once that is mended")


def _failed(failures: dict[int, TaskFailure], *, done: int, total: int) -> UserError:
    listed = "; ".join(f"shard {shard}: {f.kind}: {f.text}" for shard, f in sorted(failures.items())[:3])
    return UserError(
        f"{len(failures)} of {total} shards failed three times ({listed}); the other {done} are whole, and "
        f"the same command again tries only what is missing"
    )
