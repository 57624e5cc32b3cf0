"""Packing by independent commands over one OUT, without an engine: worker i of n packs every n-th shard."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any, Literal

from linerate.shards.append import NothingNewError, load_base
from linerate.shards.catalog import CATALOG_NAME, Catalog
from linerate.shards.errors import UserError
from linerate.shards.finish import finish
from linerate.shards.manifest import ManifestSource
from linerate.shards.options import PackOptions
from linerate.shards.out_folder import NO_LOCKS, WORK_NAME, claim_folder, lock_folder, tidy_folder
from linerate.shards.pack import (
    Effort,
    load_marks,
    pack_missing,
    plan_tasks,
    prepare,
    refuse_other_options,
)
from linerate.shards.pack_shard import ShardTask
from linerate.shards.plan import HEADER_NAME, Plan, absolute_paths, load_options
from linerate.shards.shard_stats import StatsLog
from linerate.shards.sources import Source
from linerate.shards.upload import is_remote

POLL_S = 0.5
STALE_S = 3600.0
COUNT_NAME = "worker_count.json"


@dataclass(frozen=True, kw_only=True)
class Part:
    """Which of the shards one command packs: those whose number in the plan is `index` modulo `count`."""

    index: int
    count: int

    def __post_init__(self) -> None:
        if self.count < 1 or not 0 <= self.index < self.count:
            raise UserError(
                f"--worker-index {self.index} --worker-count {self.count}: indices run from 0 to the count "
                f"less 1"
            )

    def __str__(self) -> str:
        return f"worker {self.index} of {self.count}"


@dataclass(frozen=True, kw_only=True)
class PartReport:
    """What pack_part leaves behind it."""

    num_shards: int
    """Of the whole plan."""
    mine: int
    """Of them this worker's; all of them are whole."""
    packed_now: int
    finished: bool
    """Was OUT finished already, or has the append nothing new? Then there was nothing to do."""


Word = int | Literal["auto"] | None


def choose_part(index: Word, count: Word, environment: Mapping[str, str] = os.environ) -> Part | None:
    """The part that --worker-index and --worker-count mean, `auto` by Slurm or Kubernetes; None for all.

    Slurm: SLURM_ARRAY_TASK_ID, _MIN, _STEP and _COUNT. Kubernetes: JOB_COMPLETION_INDEX, which comes without
    a count. Raises UserError when one of the two is missing or cannot be told.
    """
    if index is None and count is None:
        return None
    if index is None or (count is None and index != "auto"):
        raise UserError("--worker-index and --worker-count go together; give both, such as 3 and 16")
    start = "SLURM_ARRAY_TASK_"
    slurm = {name[len(start) :]: text for name, text in environment.items() if name.startswith(start)}
    if index == "auto" and "ID" in slurm:
        index = (int(slurm["ID"]) - int(slurm.get("MIN", 0))) // int(slurm.get("STEP", 1))
        count = int(slurm.get("COUNT", 0)) if count in (None, "auto") else count
    elif index == "auto" and "JOB_COMPLETION_INDEX" in environment:
        index = int(environment["JOB_COMPLETION_INDEX"])
    if index == "auto":
        raise UserError(
            "--worker-index auto finds neither SLURM_ARRAY_TASK_ID nor JOB_COMPLETION_INDEX; start it as a "
            "Slurm array or an indexed Job, or give a number"
        )
    if count in (None, "auto", 0):
        raise UserError(
            "nothing here says how many workers there are; give --worker-count N (in a Kubernetes Job its "
            "spec.completions)"
        )
    return Part(index=index, count=int(count or 0))


def pack_part(
    source: Source | ManifestSource,
    out: Path | str,
    part: Part,
    *,
    options: PackOptions | None = None,
    append: bool = False,
    effort: Effort | None = None,
    staging: Path | None = None,
    on_wait: Callable[[str], None] = lambda whom: None,
    wait_limit_s: float = 24 * 3600.0,
) -> PartReport:
    """Pack this worker's shards into `out`, a folder or URL for all workers; finish_parts ends the whole.

    The first worker plans, the others wait for the plan, at most wait_limit_s, and tell by on_wait for whom.
    Any number of workers of the same count may run at the same time, on any hosts.
    Raises UserError for other options, another source or count than those of the workers before.
    """
    options, effort = options or PackOptions(), effort or Effort()
    if effort.engine.kind != "local":
        raise UserError(
            f"--worker-index needs no engine: leave --engine {effort.engine.kind} out, or the index"
        )
    if is_remote(out):
        from linerate.shards.worker_upload import pack_part_there

        return pack_part_there(
            source,
            str(out),
            part,
            options=options,
            append=append,
            effort=effort,
            staging=staging,
            on_wait=on_wait,
            wait_limit_s=wait_limit_s,
        )
    out = Path(out)
    claim_folder(out, sources=source.containers)
    with _lock_part(out, part):
        if (out / CATALOG_NAME).exists() and not append and not (out / WORK_NAME / HEADER_NAME).exists():
            refuse_other_options(out, asdict(options), None)
            return PartReport(num_shards=Catalog.load(out).num_shards, mine=0, packed_now=0, finished=True)
        try:
            with _lock_plan(out, on_wait, wait_limit_s):
                plan = shared_plan(source, out, options, effort, append=append)
        except NothingNewError:
            return PartReport(num_shards=0, mine=0, packed_now=0, finished=True)
        tasks = plan_tasks(plan, out, asdict(options), load_base(out), effort)
        mine = [task for task in tasks if task.shard % part.count == part.index]
        _remove_stale(mine)
        marks = load_marks(mine, plan)
        before = len(marks)
        log = StatsLog(out / WORK_NAME / f"stats-{part.index}-of-{part.count}.jsonl")
        # Each worker would read all of the tars for its share of them.
        pack_missing(out, plan, mine, marks, options=options, effort=effort, log=log, spill_tars=False)
    return PartReport(
        num_shards=plan.num_shards, mine=len(mine), packed_now=len(mine) - before, finished=False
    )


def finish_parts(out: Path | str, *, staging: Path | None = None) -> Catalog:
    """Write the catalog once all workers' shards are whole; needs no source. Again it changes nothing.

    staging: as of `pack`, where `out` is a URL.
    Raises UserError that names the shards that are missing, and the workers that they belong to.
    """
    if is_remote(out):
        from linerate.shards.worker_upload import finish_there

        return finish_there(str(out), staging)
    out = Path(out)
    work = out / WORK_NAME
    if not work.exists():
        return finish_folder(out)
    with lock_folder(out):
        try:
            return finish_folder(out)
        finally:
            tidy_folder(out, made=False)


def finish_folder(out: Path, *, upload_to: str = "") -> Catalog:
    """As finish_parts, for who holds the lock of this folder."""
    work = out / WORK_NAME
    if not (work / HEADER_NAME).exists():
        if not (out / CATALOG_NAME).exists():
            raise UserError(
                f"there is no plan in {out}; `linerate shard pack SOURCE... OUT --worker-index I "
                f"--worker-count N` makes one"
            )
        return Catalog.load(out)
    plan, options = Plan.load(work), load_options(work)
    base = load_base(out)
    tasks = plan_tasks(plan, out, options, base, Effort(upload_to=upload_to))
    marks = load_marks(tasks, plan)
    missing = [task for task in tasks if task.number not in marks]
    if missing:
        raise UserError(_say_missing(out, missing, len(tasks)))
    options.pop("append", None)
    return finish(out, plan, tasks, marks, options, base)


def _say_missing(out: Path, missing: list[ShardTask], total: int) -> str:
    text = f"{len(missing)} of {total} shards of {out} are missing"
    count = _load_count(out)
    if count is None:
        return f"{text} (first {missing[0].stem.name}); the same `linerate shard pack` again packs them"
    workers = sorted({task.shard % count for task in missing})
    listed = ", ".join(str(worker) for worker in workers[:20]) + (", ..." if len(workers) > 20 else "")
    shards = ", ".join(task.stem.name for task in missing[:5]) + (", ..." if len(missing) > 5 else "")
    return (
        f"{text} ({shards}); run the workers they belong to again, of {count} those with --worker-index "
        f"{listed}"
    )


def shared_plan(
    source: Source | ManifestSource, out: Path, options: PackOptions, effort: Effort, *, append: bool
) -> Plan:
    """The plan that lies there, if it is for the same; else a new one. Call it with the plan's lock held."""
    work = out / WORK_NAME
    if not (work / HEADER_NAME).exists():
        return prepare(source, out, options, effort, append=append)[0]
    base = load_base(out)
    if append != (base is not None):
        kind = "is an append" if base else "is none"
        raise UserError(f"what is under way in {out} {kind}; repeat the command of the other workers")
    refuse_other_options(out, asdict(options) | (base.options if base else {}), base)
    plan = Plan.load(work)
    given = absolute_paths(source)
    if given != plan.sources:
        raise UserError(
            f"the plan in {out} is of {', '.join(plan.sources[:3])}, not of {', '.join(given[:3])}; give "
            f"every worker the same source, at the same place"
        )
    return plan


@contextlib.contextmanager
def _lock_part(out: Path, part: Part) -> Iterator[None]:
    """Shared with workers of the same count, not with an ordinary pack; each worker only once a host."""
    path, own_path = (out / WORK_NAME / name for name in ("lock", f"lock-{part.index}-of-{part.count}"))
    with path.open("a+") as shared, own_path.open("a+") as own:
        if not _try_lock(own, fcntl.LOCK_EX):
            raise UserError(f"{part} is running already ({_read(own)}); wait until it ends")
        _write(own)
        _join(shared, out, part)
        if not path.exists() or not os.path.samestat(os.fstat(shared.fileno()), path.stat()):
            raise UserError(f"{out} was finished at this moment; start {part} again to see if work is left")
        yield


def _join(shared: IO[str], out: Path, part: Part) -> None:
    """Take the shared lock. Whoever is alone says how many workers there are."""
    for _ in range(20):
        if _try_lock(shared, fcntl.LOCK_EX):  # nobody else is here
            (out / WORK_NAME / COUNT_NAME).write_text(json.dumps(part.count), encoding="utf-8")
            _write(shared)
        # Not one step: an ordinary pack may come in between.
        if _try_lock(shared, fcntl.LOCK_SH):
            count = _load_count(out)
            if count not in (None, part.count):
                raise UserError(
                    f"workers of --worker-count {count} are writing to {out}, this one says {part.count}; "
                    f"give all the same"
                )
            return
        time.sleep(POLL_S / 5)  # another worker may hold it for this moment
    raise UserError(
        f"another `linerate shard pack` ({_read(shared)}) writes to {out}; wait until it ends, or give "
        f"another OUT"
    )


@contextlib.contextmanager
def _lock_plan(out: Path, on_wait: Callable[[str], None], limit_s: float) -> Iterator[None]:
    """One worker at a time. The system frees the lock when its holder dies, then the next one plans."""
    with (out / WORK_NAME / "plan.lock").open("a+") as file:
        deadline = time.monotonic() + limit_s
        told = False
        while not _try_lock(file, fcntl.LOCK_EX):
            if not told:
                on_wait(_read(file))
                told = True
            if time.monotonic() >= deadline:
                raise UserError(
                    f"{_read(file)} has not finished the plan of {out} in {limit_s:.0f} s; wait until it "
                    f"has and start this worker again"
                )
            time.sleep(POLL_S)
        _write(file)
        yield


def _try_lock(file: IO[str], kind: int) -> bool:
    """True where the folder knows no locks, too; see lock_folder."""
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
    return True


def _read(file: IO[str]) -> str:
    file.seek(0)
    return file.read().strip() or "just started"


def _write(file: IO[str]) -> None:
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}")
    file.flush()


def _load_count(out: Path) -> int | None:
    try:
        count: Any = json.loads((out / WORK_NAME / COUNT_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return count if isinstance(count, int) and count > 0 else None


def _remove_stale(tasks: list[ShardTask]) -> None:
    """Temporary files of this worker's shards, unless somebody wrote to them lately: on another host."""
    for task in tasks:
        for path in task.stem.parent.glob(f".{task.stem.name}.*.tmp"):
            with contextlib.suppress(FileNotFoundError):
                if time.time() - path.stat().st_mtime > STALE_S:
                    path.unlink()
