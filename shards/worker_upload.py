"""Workers of --worker-index whose OUT is a URL: one plan, by whoever comes first; shards sent one by one."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from linerate.shards.append import NothingNewError, load_base
from linerate.shards.catalog import CATALOG_NAME, Catalog
from linerate.shards.claims import ClaimedError, Role, claim
from linerate.shards.errors import UserError
from linerate.shards.manifest import ManifestSource
from linerate.shards.options import PackOptions
from linerate.shards.out_folder import WORK_NAME
from linerate.shards.pack import Effort, load_marks, pack_missing, plan_tasks, prepare, refuse_other_options
from linerate.shards.plan import HEADER_NAME, Plan
from linerate.shards.remote_tars import is_unread
from linerate.shards.shard_stats import StatsLog
from linerate.shards.sources import Source
from linerate.shards.upload import Staged, bring_plan, open_staging, pack_through, publish_plan
from linerate.shards.worker_index import COUNT_NAME, Part, PartReport, finish_folder, shared_plan

POLL_S = 5.0


def pack_part_there(
    source: Source | ManifestSource,
    url: str,
    part: Part,
    *,
    options: PackOptions,
    append: bool,
    effort: Effort,
    staging: Path | None,
    on_wait: Callable[[str], None],
    wait_limit_s: float,
) -> PartReport:
    """As worker_index.pack_part, into an object store; each worker has a staging folder of its own.

    The plan with its task lists is sent to the bucket by the worker that claims it first. Beside a live
    worker of the same index or of another count, or an ordinary pack, this one is refused, see claims.py.
    """
    if is_unread(source):
        raise UserError(
            f"--worker-index with tars at URLs needs an OUT in a folder that all workers share, where they "
            f"are read once for all, not {url}; or leave --worker-index out"
        )
    role = Role(f"worker-{part.index}-of-{part.count}", part.count)
    with open_staging(url, staging, role=role, with_marks=append) as staged:
        bucket, folder = staged.bucket, staged.folder
        try:
            planned = (folder / WORK_NAME / HEADER_NAME).exists()
            if (folder / CATALOG_NAME).exists() and not append and not planned:
                refuse_other_options(folder, asdict(options), None)
                num_shards = Catalog.load(folder).num_shards
                return PartReport(num_shards=num_shards, mine=0, packed_now=0, finished=True)
            bucket.put_bytes(json.dumps(part.count).encode(), f"{WORK_NAME}/{COUNT_NAME}")
            try:
                plan = _plan_there(source, staged, options, effort, append, on_wait, wait_limit_s)
            except NothingNewError:
                return PartReport(num_shards=0, mine=0, packed_now=0, finished=True)
            return _pack_mine(plan, staged, part, options, dataclasses.replace(effort, upload_to=bucket.url))
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def _pack_mine(plan: Plan, staged: Staged, part: Part, options: PackOptions, effort: Effort) -> PartReport:
    folder = staged.folder
    tasks = plan_tasks(plan, folder, asdict(options), load_base(folder), effort)
    mine = [task for task in tasks if task.shard % part.count == part.index]
    marks = load_marks(mine, plan)
    before = len(marks)
    log = StatsLog(folder / WORK_NAME / f"stats-{part.index}-of-{part.count}.jsonl")
    try:
        pack_missing(folder, plan, mine, marks, options=options, effort=effort, log=log, spill_tars=False)
    finally:
        if log.path.exists():
            with contextlib.suppress(OSError):  # they only tell how fast it was
                staged.bucket.put(log.path, f"{WORK_NAME}/{log.path.name}")
    return PartReport(
        num_shards=plan.num_shards, mine=len(mine), packed_now=len(mine) - before, finished=False
    )


def _plan_there(
    source: Source | ManifestSource,
    staged: Staged,
    options: PackOptions,
    effort: Effort,
    append: bool,
    on_wait: Callable[[str], None],
    wait_limit_s: float,
) -> Plan:
    """The plan that lies there, if it is for the same; else a new one, which is sent there."""
    bucket, folder = staged.bucket, staged.folder
    deadline, told = time.monotonic() + wait_limit_s, False
    while True:
        if bring_plan(bucket, folder):
            return shared_plan(source, folder, options, effort, append=append)
        try:
            with claim(bucket, Role("plan"), wait=False):
                if bring_plan(bucket, folder):  # by who had the claim before
                    continue
                # Also where an ordinary pack has left its plan, which is the same without the task lists.
                plan = prepare(source, folder, options, effort, append=append)[0]
                publish_plan(bucket, folder, with_rows=True)
                return plan
        except ClaimedError as other:
            if not told:
                on_wait(other.whom)
                told = True
            if time.monotonic() >= deadline:
                raise UserError(
                    f"{other.whom} has not finished the plan of {bucket.url} in {wait_limit_s:.0f} s; wait "
                    f"until it has and start this worker again"
                ) from None
        time.sleep(POLL_S)


def finish_there(url: str, staging: Path | None) -> Catalog:
    """As worker_index.finish_parts, in an object store; the catalog's files come into the staging folder.

    The bucket alone is asked for the plan and for the marks of the shards; no tar is read.
    """
    return pack_through(url, staging, lambda folder, there: finish_folder(folder, upload_to=there))
