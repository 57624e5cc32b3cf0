"""`verify --repair`: indexes, Parquet and catalog anew from what is left; no byte of a tar is changed."""

from __future__ import annotations

import dataclasses
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from linerate.shards.catalog import CATALOG_NAME, REJECTED_NAME, Catalog, plan_id_of, write_catalog
from linerate.shards.engines import default_num_workers, run_tasks
from linerate.shards.errors import UserError
from linerate.shards.out_folder import WORK_NAME, lock_folder, tidy_folder
from linerate.shards.pack_shard import ShardMark
from linerate.shards.plan import HEADER_NAME, REJECT_SCHEMA
from linerate.shards.repair_shard import Reject, Repaired, RepairTask
from linerate.shards.verify import verify_shards
from linerate.shards.verify_shard import Decode, load_mark_fields

_TAR_NAME = re.compile(r"([A-Za-z0-9_-]+)-(\d{6,})\.tar")


@dataclass(frozen=True)
class RepairReport:
    """What repair_shards did."""

    shards: list[str]
    """Tars whose .idx and .parquet were written anew."""
    left_out: list[tuple[str, int, str]]
    """(tar, sample_id, why) of what is no longer in any index; rejected.parquet lists it too."""
    catalog: bool
    """Were catalog.json, shards.parquet and rejected.parquet written anew?"""

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def repair_shards(
    root: Path | str,
    *,
    decode: Decode = "header",
    num_workers: int | None = None,
    on_progress: Callable[[float], None] = lambda samples: None,
) -> RepairReport:
    """Find what is wrong, write those shards' indexes anew, then the catalog; sound shards are not touched.

    Images that no longer agree with their checksum (or, where the checksums are lost, with their header) are
    left out of every index and stay in the tar. Raises UserError when there is nothing to repair from.
    """
    root = Path(root)
    if (root / WORK_NAME / HEADER_NAME).exists():
        raise UserError(f"the shards in {root} are not finished; the same `linerate shard pack` continues")
    header = _old_header(root)
    broken, files = _find_broken(root, header, decode=decode, num_workers=num_workers)
    if broken is None:
        return RepairReport([], [], catalog=False)
    if not files:
        raise UserError(f"{root} holds no tar of shards; repair works on what `linerate shard pack` wrote")
    marks = {file: mark for file in files if (mark := _load_mark(root / file))}
    seen = Counter(mark.plan_id for mark in marks.values()).most_common(1)
    plan_id = str(header.get("plan_id") or (seen[0][0] if seen else "repaired"))
    marks = {file: mark for file, mark in marks.items() if file not in broken}
    known = {reject[0] for mark in marks.values() for reject in mark.rejects}
    orphans = tuple(reject for reject in _placed(_old_rejects(root)).values() if reject[0] not in known)
    tasks = [
        RepairTask(
            tar=str(root / file),
            shard=_number(file),
            plan_id=plan_id_of(header | {"plan_id": plan_id}, _number(file)),
            decode=decode,
            rejects=orphans,
        )
        for file in files
        if file not in marks
    ]
    done: dict[int, Repaired] = {}
    with lock_folder(root):
        try:
            failures = run_tasks(
                "linerate.shards.repair_shard:run_task",
                tasks,
                num_workers=default_num_workers() if num_workers is None else num_workers,
                on_done=done.__setitem__,
                on_progress=on_progress,
            )
            if failures:
                failure = next(iter(failures.values()))
                raise UserError(f"{len(failures)} shards cannot be repaired: {failure.kind}: {failure.text}")
            marks |= {Path(task.tar).name: done[index].mark for index, task in enumerate(tasks)}
            _write_catalog(root, header, {file: marks[file] for file in files}, plan_id=plan_id)
        finally:
            tidy_folder(root, made=False)
    left_out = [
        (Path(tasks[index].tar).name, reject[0], reject[4])
        for index in sorted(done)
        for reject in done[index].left_out
    ]
    return RepairReport([Path(task.tar).name for task in tasks], left_out, catalog=True)


def _find_broken(
    root: Path, header: dict[str, Any], *, decode: Decode, num_workers: int | None
) -> tuple[set[str] | None, list[str]]:
    """(tars to repair, all tars); None where nothing is wrong that a repair could mend."""
    try:
        catalog = Catalog.load(root)
    except UserError:
        names = {match[1] for path in root.glob("*.tar") if (match := _TAR_NAME.fullmatch(path.name))}
        name = str(header.get("name") or "".join(sorted(names)[:1]))
        if len(names) > 1 and "name" not in header:
            raise UserError(
                f"{root} holds tars of several names ({', '.join(sorted(names))}) and no catalog says which "
                f"belong together; move those of one name to a folder of their own"
            ) from None
        tars = sorted(path.name for path in root.glob(f"{name}-*.tar") if _TAR_NAME.fullmatch(path.name))
        return set(tars), tars
    problems = verify_shards(catalog, decode=decode, num_workers=num_workers).problems
    files = set(catalog.files)
    wrong = {problem.file for problem in problems} & files
    if wrong or any(problem.file == REJECTED_NAME for problem in problems):
        return wrong, catalog.files
    return None, catalog.files


def _old_header(root: Path) -> dict[str, Any]:
    try:
        return dict(json.loads((root / CATALOG_NAME).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return {}


def _load_mark(tar: Path) -> ShardMark | None:
    try:
        schema_only = pq.read_schema(tar.with_suffix(".parquet")).empty_table()
        return ShardMark(**load_mark_fields(schema_only))
    except (OSError, TypeError, pa.ArrowException):
        return None


def _number(file: str) -> int:
    match = _TAR_NAME.fullmatch(file)
    return int(match[2]) if match else 0


def _write_catalog(root: Path, header: dict[str, Any], marks: dict[str, ShardMark], *, plan_id: str) -> None:
    kept = {file: mark for file, mark in marks.items() if mark.samples}
    if not kept:
        raise UserError(f"nothing in the tars of {root} is sound; pack the source again")
    highest = _require_order(root, list(kept))
    rejects = _merge_rejects(_old_rejects(root), marks.values())
    temp = root / f".{REJECTED_NAME}.tmp"
    pq.write_table(rejects, temp, compression="zstd")
    temp.replace(root / REJECTED_NAME)
    names = list(header.get("class_names") or [])
    names += [str(label) for label in range(len(names), highest + 1)]
    num_samples = sum(mark.samples for mark in kept.values())
    placed = pc.count_distinct(rejects.column("sample_id"), mode="only_valid").as_py()
    write_catalog(
        root,
        header={
            "name": next(iter(kept)).rpartition("-")[0],
            "seed": int(header.get("seed", 0)),
            "plan_id": plan_id,
            "num_samples": num_samples,
            "num_planned": num_samples + placed,
            "num_rejected": rejects.num_rows,
            "max_height": max(mark.max_height for mark in kept.values()),
            "max_width": max(mark.max_width for mark in kept.values()),
            "max_sample_bytes": max(mark.max_sample_bytes for mark in kept.values()),
            "options": dict(header.get("options") or {}),
            "filtered": dict(header.get("filtered") or {}),
            "listed_id": str(header.get("listed_id") or ""),
            "class_names": names,
            **{key: header[key] for key in ("appends",) if key in header},
        },
        shards=pa.table(
            {
                "file": pa.array(kept, pa.string()),
                "samples": pa.array([mark.samples for mark in kept.values()], pa.int64()),
                "bytes": pa.array([mark.tar_bytes for mark in kept.values()], pa.int64()),
                "xxh3": pa.array([mark.tar_xxh3 for mark in kept.values()], pa.uint64()),
            }
        ),
    )


def _require_order(root: Path, files: list[str]) -> int:
    """The highest label. Raises UserError where a sample lies in two shards."""
    last, highest = -1, -1
    for before, file in zip(["", *files], files, strict=False):
        table = pq.read_table((root / file).with_suffix(".parquet"), columns=["sample_id", "label"])
        ends = pc.min_max(table.column("sample_id")).as_py()
        if ends["min"] <= last:
            raise UserError(f"{file} holds samples that {before} holds too; move one of the two away")
        last = ends["max"]
        highest = max(highest, pc.max(table.column("label")).as_py())
    return highest


def _old_rejects(root: Path) -> Any:
    try:
        return pq.read_table(root / REJECTED_NAME).select(REJECT_SCHEMA.names).cast(REJECT_SCHEMA)
    except (OSError, KeyError, ValueError, pa.ArrowException):
        return REJECT_SCHEMA.empty_table()


def _placed(rejects: Any) -> dict[int, Reject]:
    rows = rejects.filter(pc.is_valid(rejects.column("sample_id"))).to_pylist()
    return {row["sample_id"]: tuple(row.values()) for row in rows}


def _merge_rejects(old: Any, marks: Iterable[ShardMark]) -> Any:
    """The old list, and what the marks say of the same places or more."""
    rows = _placed(old) | {reject[0]: tuple(reject) for mark in marks for reject in mark.rejects}
    columns = list(zip(*rows.values(), strict=True)) or [()] * len(REJECT_SCHEMA)
    arrays = [pa.array(column, field.type) for column, field in zip(columns, REJECT_SCHEMA, strict=True)]
    unplaced = old.filter(pc.is_null(old.column("sample_id")))
    return pa.concat_tables([pa.Table.from_arrays(arrays, schema=REJECT_SCHEMA), unplaced]).combine_chunks()
