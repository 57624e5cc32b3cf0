"""The end of packing: from the marks of all shards to rejected.parquet, shards.parquet and catalog.json."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from linerate.shards.append import Base
from linerate.shards.catalog import REJECTED_NAME, Catalog, write_catalog
from linerate.shards.errors import UserError
from linerate.shards.out_folder import WORK_NAME, remove_marks, remove_work
from linerate.shards.pack_shard import ShardMark, ShardTask
from linerate.shards.plan import REJECT_SCHEMA, REJECTS_NAME, Plan
from linerate.shards.shard_stats import write_stats


def finish(
    out: Path,
    plan: Plan,
    tasks: list[ShardTask],
    marks: dict[int, ShardMark],
    options: dict[str, Any],
    base: Base | None = None,
) -> Catalog:
    """Write rejected.parquet, shards.parquet and, last, catalog.json from the marks of all shards.

    Raises UserError when no shard holds a sample; then nothing of this plan remains.
    """
    kept = [marks[task.number] for task in tasks if marks[task.number].samples]
    rejects = _collect_rejects(plan, [marks[task.number] for task in tasks])
    if not kept:
        remove_marks([task.stem for task in tasks], out)
        raise UserError(_all_rejected(rejects))
    shards = pa.table(
        {
            "file": pa.array([f"{options['name']}-{mark.shard:06d}.tar" for mark in kept], pa.string()),
            "samples": pa.array([mark.samples for mark in kept], pa.int64()),
            "bytes": pa.array([mark.tar_bytes for mark in kept], pa.int64()),
            "xxh3": pa.array([mark.tar_xxh3 for mark in kept], pa.uint64()),
        }
    )
    header = {
        "name": options["name"],
        "seed": options["seed"],
        "plan_id": plan.plan_id,
        "num_samples": sum(mark.samples for mark in kept),
        "num_planned": plan.num_samples,
        "num_rejected": rejects.num_rows,
        "max_height": max(mark.max_height for mark in kept),
        "max_width": max(mark.max_width for mark in kept),
        "max_sample_bytes": max(mark.max_sample_bytes for mark in kept),
        "options": options,
        "filtered": plan.filtered,
        "listed_id": plan.listed_id,
        "class_names": plan.class_names,
    }
    if base:
        header, shards, rejects = base.extend(header, shards, rejects, plan)
    temp = out / f".{REJECTED_NAME}.tmp"
    pq.write_table(rejects, temp, compression="zstd")
    temp.replace(out / REJECTED_NAME)
    write_stats(out, out / WORK_NAME)
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
