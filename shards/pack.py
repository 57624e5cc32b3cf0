"""Pack a source into shards: plan, one task per shard, finish; each step can be taken again after a kill."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from linerate.shards.append import Base, NothingNewError, open_base, refuse_appended
from linerate.shards.bucket import Bucket
from linerate.shards.catalog import CATALOG_NAME, Catalog
from linerate.shards.dedup import drop_equal_images
from linerate.shards.engines import LOCAL, Engine, StoppedError, choose_num_workers, run_tasks
from linerate.shards.errors import UserError
from linerate.shards.fetch_options import FetchOptions
from linerate.shards.finish import finish
from linerate.shards.imagenet import LabelledSource, load_ground_truth
from linerate.shards.label_field import FieldLabelledSource
from linerate.shards.manifest import ManifestSource, open_any_source
from linerate.shards.options import ImagePolicy, PackOptions
from linerate.shards.out_folder import (
    WORK_NAME,
    claim_folder,
    lock_folder,
    remove_stale,
    remove_work,
    require_space,
    tidy_folder,
)
from linerate.shards.pack_shard import ShardMark, ShardTask, load_mark, load_plan_id
from linerate.shards.plan import DEFAULT_MEMORY, Plan, load_options, make_plan
from linerate.shards.plan import HEADER_NAME as PLAN_HEADER_NAME
from linerate.shards.plan_rows import SHARDS_PER_FILE, rows_path
from linerate.shards.remote_tars import bring_source, is_unread
from linerate.shards.shard_stats import ShardStats, StatsLog
from linerate.shards.sources import Source
from linerate.shards.spill import Spill, prepare_tasks, spilled_bytes
from linerate.shards.upload import is_remote, load_marks_there, pack_through, publish_plan
from linerate.shards.worker import TaskFailure

Progress = Callable[[str, float], None]
"""Called with ("list", rows listed since), ("plan", samples to do), ("pack", samples done since); before
these, where the source lies at URLs, with ("to fetch", bytes in all) and ("fetch", bytes since); and with
("known", samples) where an append finds nothing new."""


def pack(
    source: Path | str | Sequence[Path | str],
    out: Path | str,
    *,
    options: PackOptions | None = None,
    ground_truth: Path | None = None,
    num_workers: int | None = None,
    engine: Engine = LOCAL,
    append: bool = False,
    memory: str = DEFAULT_MEMORY,
    fetch: FetchOptions | None = None,
    staging: Path | None = None,
    on_progress: Progress = lambda stage, amount: None,
) -> Catalog:
    """The catalog of `out`, which holds every acceptable image of `source` when this returns.

    source: a folder of images (class folders become labels), one or several tars of one, or manifests; tars
    and manifests may be URLs, and s3:// or gs:// prefixes and patterns of them.
    ground_truth: a file that says the classes of images that no folder tells, see imagenet.py.
    The same call again continues where a killed one stopped, and is quick when nothing is left to do.
    num_workers: processes, by default one per core, or none for little work; 0 works in this one. It never
    changes a byte, and neither does the engine.
    append: `out` holds finished shards; the images of `source` whose keys they lack become further shards
    with the next numbers, and nothing that is there is touched but the catalog, last. Classes keep their
    numbers, new ones come after them.
    memory: that planning may take, such as `4GB`; a longer list spills into OUT.
    fetch: how images that the source names by URL are fetched.
    out: may be an s3:// or gs:// URL. Then `staging` holds the shards that are being packed, and in the end
    the files of the catalog that comes back; the shards lie in the bucket.
    Raises UserError for what cannot work; nothing that `out` held before is touched then.
    """
    paths = [source] if isinstance(source, Path | str) else list(source)
    options = options or PackOptions()
    effort = Effort(
        num_workers=num_workers,
        engine=engine,
        memory=memory,
        fetch=fetch or FetchOptions(),
        on_progress=on_progress,
    )
    opened = open_labelled(paths, options, ground_truth=ground_truth, fetch=fetch)
    return pack_source(opened, out, options=options, effort=effort, append=append, staging=staging)


def open_labelled(
    paths: Sequence[Path | str],
    options: PackOptions,
    *,
    ground_truth: Path | None = None,
    fetch: FetchOptions | None = None,
) -> Source | ManifestSource:
    """The source that these paths make, with the classes of a ground truth or a field where one is given."""
    opened = open_any_source(paths, columns=options.manifest_columns, fetch=fetch)
    if ground_truth is None:
        if options.label_column is None or isinstance(opened, ManifestSource):
            return opened
        return FieldLabelledSource(opened, options.label_column)
    if isinstance(opened, ManifestSource):
        raise UserError(
            "--ground-truth labels folders and tars; a manifest has a column for it: --label-column"
        )
    if options.label_column is not None:
        raise UserError("--ground-truth and --label-column both tell the classes; give one of them")
    return LabelledSource(opened, load_ground_truth(ground_truth))


@dataclass(frozen=True, kw_only=True)
class Effort:
    """How the work is done; nothing here changes a byte."""

    num_workers: int | None = None
    engine: Engine = LOCAL
    memory: str = DEFAULT_MEMORY
    fetch: FetchOptions = field(default_factory=FetchOptions)
    upload_to: str = ""
    """URL that whole shards are sent to; OUT is a staging folder then."""
    on_progress: Progress = lambda stage, amount: None


def pack_source(
    opened: Source | ManifestSource,
    out: Path | str,
    *,
    options: PackOptions | None = None,
    effort: Effort | None = None,
    append: bool = False,
    staging: Path | None = None,
) -> Catalog:
    """As `pack`, for a source that is open already."""
    options, effort = options or PackOptions(), effort or Effort()
    if not is_remote(out):
        return _pack_folder(opened, Path(out), options, effort, append=append)
    if effort.engine.kind == "ray" and staging is None:
        raise UserError(
            f"--engine ray with OUT {out} needs --staging: a folder that all nodes share, at the same place"
        )

    def pack_into(folder: Path, url: str) -> Catalog:
        there = dataclasses.replace(effort, upload_to=url)
        return _pack_folder(opened, folder, options, there, append=append)

    return pack_through(str(out), staging, pack_into, with_marks=append)


def _pack_folder(
    opened: Source | ManifestSource, out: Path, options: PackOptions, effort: Effort, *, append: bool
) -> Catalog:
    made = claim_folder(out, sources=opened.containers)
    with lock_folder(out):
        try:
            return _pack_locked(opened, out, options, effort, append=append)
        except NothingNewError as nothing:
            effort.on_progress("known", nothing.num_known)
            remove_work(out)
            return Catalog.load(out)
        finally:
            tidy_folder(out, made=made)


def _pack_locked(
    source: Source | ManifestSource, out: Path, options: PackOptions, effort: Effort, *, append: bool
) -> Catalog:
    remove_stale(out)
    plan, base = prepare(source, out, options, effort, append=append)
    tasks = plan_tasks(plan, out, asdict(options), base, effort)
    marks = load_marks(tasks, plan)
    if len(marks) == len(tasks) and (out / CATALOG_NAME).exists() and not base:
        remove_work(out)
        return Catalog.load(out)
    log = StatsLog(out / WORK_NAME / "stats.jsonl")
    if effort.upload_to:
        publish_plan(Bucket(effort.upload_to), out)
    pack_missing(out, plan, tasks, marks, options=options, effort=effort, log=log)
    return finish(out, plan, tasks, marks, asdict(options), base)


def prepare(
    source: Source | ManifestSource, out: Path, options: PackOptions, effort: Effort, *, append: bool
) -> tuple[Plan, Base | None]:
    """The plan and what it is appended to. Raises NothingNewError where an append has nothing to do."""
    base = open_base(out, name=options.name) if append else None
    if not base:
        refuse_appended(out)
    wanted = asdict(options) | (base.options if base else {})
    refuse_other_options(out, wanted, base)
    return _plan(source, out, options, wanted, base, effort), base


def plan_tasks(
    plan: Plan, out: Path, options: dict[str, Any], base: Base | None, effort: Effort | None = None
) -> list[ShardTask]:
    """One task for each shard of the plan, in order."""
    effort = effort or Effort()
    policy = ImagePolicy(**{field.name: options[field.name] for field in fields(ImagePolicy)})
    return [
        ShardTask(
            plan_folder=os.fspath(plan.folder),
            shard=shard,
            out=os.fspath(out),
            name=options["name"],
            policy=policy,
            first_shard=base.first_shard if base else 0,
            first_sample_id=base.first_sample_id if base else 0,
            fetch=effort.fetch,
            upload_to=effort.upload_to,
        )
        for shard in range(plan.num_shards)
    ]


def load_marks(tasks: list[ShardTask], plan: Plan) -> dict[int, ShardMark]:
    """The marks of the tasks whose shards are whole, by the shards' numbers."""
    if tasks and tasks[0].upload_to:
        return load_marks_there(tasks, plan_id=plan.plan_id)
    return {task.number: mark for task in tasks if (mark := load_mark(task, plan_id=plan.plan_id))}


def pack_missing(
    out: Path,
    plan: Plan,
    tasks: list[ShardTask],
    marks: dict[int, ShardMark],
    *,
    options: PackOptions,
    effort: Effort,
    log: StatsLog,
    spill_tars: bool = True,
) -> None:
    """Pack the tasks that `marks` lacks and add theirs. Raises UserError when some cannot be packed.

    spill_tars: read large tars front to back into buckets first; without it every image where it lies.
    """
    todo = [task for task in tasks if task.number not in marks]
    # Of what is known: a guess at sizes that only fetching tells must not refuse a disk that may do.
    jpeg_bytes = options.expected_bytes(samples=plan.num_samples, total_bytes=plan.known_bytes)
    num_bytes = (jpeg_bytes + 1024 * plan.num_samples) * len(todo) // plan.num_shards
    if not effort.upload_to:
        require_space(out, num_bytes=num_bytes - spilled_bytes(plan))

    spill = Spill(plan.folder)

    def on_done(index: int, result: tuple[ShardMark, ShardStats]) -> None:
        mark, stats = result
        marks[mark.shard] = mark
        log.add(index, stats)
        spill.shard_is_whole(todo[index].shard)

    source_bytes = plan.total_bytes * len(tasks) // plan.num_shards
    local_workers = choose_num_workers(
        effort.num_workers, num_bytes=source_bytes, may_crash=options.may_crash
    )
    try:
        if spill_tars:
            shards = [task.shard for task in todo]
            spill = prepare_tasks(plan, shards, num_workers=local_workers, on_progress=effort.on_progress)
        # Of what is left alone: shards that an earlier call finished would show as a rate nobody reached.
        effort.on_progress("plan", plan.num_samples * len(todo) // plan.num_shards)
        failures = run_tasks(
            "linerate.shards.shard_stats:run_task",
            todo,
            num_workers=local_workers if effort.engine.kind == "local" else effort.num_workers,
            on_done=on_done,
            on_progress=lambda samples: effort.on_progress("pack", samples),
            on_retry=log.retried,
            engine=effort.engine,
        )
    except StoppedError as stop:
        raise _stopped(out, stop.failure, done=len(marks), total=len(tasks)) from None
    if failures:
        raise _failed({todo[i].number: f for i, f in failures.items()}, done=len(marks), total=len(tasks))


def refuse_other_options(out: Path, wanted: dict[str, Any], base: Base | None) -> None:
    """Raise UserError with what differs between these options and those that OUT was begun with."""
    stored: dict[str, Any] | None = None
    with contextlib.suppress(OSError, ValueError, KeyError):
        stored = load_options(out / WORK_NAME)
    if stored is None and not base and (out / CATALOG_NAME).exists():
        stored = Catalog.load(out).options
    if stored is None:
        return
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
    wanted: dict[str, Any],
    base: Base | None,
    effort: Effort,
) -> Plan:
    """A plan of the source as it is now; refused when it is not the one that OUT was begun with."""
    work = out / WORK_NAME
    before = _plan_before(out, base)
    if not base and is_unread(source) and _is_finished(out, effort):
        raise NothingNewError  # to compare its tars would take to read them again
    source = bring_source(
        source,
        work,
        seed=options.seed,
        num_workers=effort.num_workers,
        options=effort.fetch,
        on_progress=effort.on_progress,
    )
    fresh = work / "new"
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir()
    plan = make_plan(
        source,
        fresh,
        seed=options.seed,
        sizing=options.sizing,
        options=wanted,
        selection=options.selection,
        memory=effort.memory,
        on_rows=lambda rows: effort.on_progress("list", rows),
    )
    if base:
        plan = base.drop_known(plan, sizing=options.sizing, memory=effort.memory)
    if options.dedup == "bytes":
        if stored := _deduplicated_before(plan, out, base, effort):
            shutil.rmtree(fresh)
            return stored
        listed = plan
        plan, equal = drop_equal_images(
            plan,
            work / "hashes",
            known=base.indexes if base else (),
            sizing=options.sizing,
            num_workers=effort.num_workers,
            engine=effort.engine,
            memory=effort.memory,
            max_bytes=options.max_image_bytes,
            fetch=effort.fetch,
            on_progress=lambda images: effort.on_progress("list", images),
        )
        if base:
            base.note(plan, num_known_bytes=equal.num_known, num_incomparable=equal.num_incomparable)
            if not plan.num_samples:
                raise NothingNewError(listed.num_samples)
    if before is not None and before[0] != plan.plan_id:
        raise UserError(
            f"the source is not the one that OUT {out} was begun with ({before[1]} samples then, "
            f"{plan.num_samples} now, or other names, sizes or options); give that one, or another OUT"
        )
    # The header last: it says that the plan is whole.
    for path in sorted(fresh.iterdir(), key=lambda path: path.name == PLAN_HEADER_NAME):
        if path.is_file():
            path.replace(work / path.name)
    shutil.rmtree(fresh)
    return Plan.load(work)


def _deduplicated_before(plan: Plan, out: Path, base: Base | None, effort: Effort) -> Plan | None:
    """The stored plan, if equal images were dropped from this very one: all would be read again to do so.

    Raises NothingNewError where the shards that it led to are whole.
    """
    work = out / WORK_NAME
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        stored = Plan.load(work)
        whole = all(rows_path(work, shard).exists() for shard in range(0, stored.num_shards, SHARDS_PER_FILE))
        return stored if whole and stored.listed_id == plan.plan_id else None
    if base or effort.upload_to or not _is_finished(out, effort):
        return None
    if Catalog.load(out).listed_id == plan.plan_id:
        raise NothingNewError
    return None


def _is_finished(out: Path, effort: Effort) -> bool:
    """Is there a catalog, no plan, and every tar of the right size?"""
    if not (out / CATALOG_NAME).exists() or (out / WORK_NAME / PLAN_HEADER_NAME).exists():
        return False
    catalog = Catalog.load(out)
    if effort.upload_to:
        sizes = Bucket(effort.upload_to).sizes()
    else:
        sizes = {path.name: path.stat().st_size for path in out.glob("*.tar")}
    return all(
        sizes.get(name) == size
        for name, size in zip(catalog.files, catalog.shard_bytes.tolist(), strict=True)
    )


def _plan_before(out: Path, base: Base | None) -> tuple[str, int | str] | None:
    """(plan id, number of samples) of what lies in OUT already."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        stored = Plan.load(out / WORK_NAME)
        return stored.plan_id, stored.num_samples
    if base:
        return None
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
