"""Which sample goes where: the source's list, shuffled by a keyed hash and cut into one task per shard."""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

from linerate.shards.errors import UserError
from linerate.shards.manifest import MANIFEST_NAME, ManifestSource
from linerate.shards.options import ManifestColumns, Selection, Sizing
from linerate.shards.plan_rows import (
    DUPLICATE_KEY,
    PLACE,
    SHARDS_PER_FILE,
    Counts,
    first_rows,
    load_plan_rows,
    rows_path,
    settle,
    shard_bounds,
    with_paths,
    write_plan_rows,
)
from linerate.shards.scan import (
    REJECT_SCHEMA,
    REJECTS_NAME,
    SCAN_NAME,
    Listing,
    RejectWriter,
    scan_rows,
    with_final_labels,
)
from linerate.shards.sources import Source, container_name

__all__ = ["REJECTS_NAME", "REJECT_SCHEMA", "Plan", "load_options", "make_plan", "shard_bounds"]

HEADER_NAME = "plan.json"
DEFAULT_MEMORY = "4GB"
# Up to so many samples Python sorts them before DuckDB has started, into the same order.
SORTED_HERE = 100_000
# Options that plans made before they existed had not; without a value they leave the plan's id as it was.
_LATER_OPTIONS = frozenset([*Selection.__dataclass_fields__, *ManifestColumns.__dataclass_fields__])


@dataclass(frozen=True)
class Plan:
    """A stored plan: a row group for each shard, its task list in order of sample_id."""

    folder: Path
    plan_id: str
    num_samples: int
    total_bytes: int
    """Of all images; where some sizes are not known yet, an estimate."""
    num_shards: int
    num_source_rejects: int
    class_names: list[str]
    containers: list[str]
    filtered: dict[str, int] = field(default_factory=dict)
    """Rows that each filter left out."""
    own_keys: bool = False
    """Are keys something else than the paths?"""
    numbered: bool = False
    """Does the source state classes by their numbers?"""
    known_bytes: int = 0
    """Of the images whose sizes are known."""
    listed_id: str = ""
    """Before equal images were dropped: what plan_id was then; empty where they were not."""
    sources: list[str] = field(default_factory=list)
    """What was listed: absolute paths of the folder, the tars or the manifests."""

    @classmethod
    def load(cls, folder: Path) -> Plan:
        document = json.loads((folder / HEADER_NAME).read_text(encoding="utf-8"))
        return cls(folder=folder, **document["plan"])

    def first_sample_id(self, shard: int) -> int:
        return shard * self.num_samples // self.num_shards

    def load_rows(self, shard: int) -> Any:
        """Arrow table of this shard's rows (the scan's columns, then metadata), in order of sample_id."""
        with pq.ParquetFile(rows_path(self.folder, shard)) as file:
            return with_paths(file.read_row_group(shard % SHARDS_PER_FILE))


def absolute_paths(source: Source | ManifestSource) -> list[str]:
    """What is read to list a source, as Plan.sources has it."""
    return [container_name(path) for path in source.containers]


def load_options(folder: Path) -> dict[str, Any]:
    """The options of the plan stored in this folder."""
    return dict(json.loads((folder / HEADER_NAME).read_text(encoding="utf-8"))["options"])


def make_plan(
    source: Source | ManifestSource,
    folder: Path,
    *,
    seed: int,
    sizing: Sizing,
    options: dict[str, Any],
    selection: Selection | None = None,
    memory: str = DEFAULT_MEMORY,
    on_rows: Callable[[float], None] = lambda rows: None,
) -> Plan:
    """List the source, select, shuffle globally, cut into shards and store that in `folder`.

    The order is that of md5(seed, key), which is the same on any machine for all time. Memory stays below
    `memory`: the list goes through Parquet, and DuckDB's sort of a long one spills into the folder.
    A key that occurs twice is a reject, or with --dedup counted as one left out. Raises UserError when
    nothing is left that could be an image.
    """
    selection = selection or Selection()
    duplicates = dropped = 0
    with contextlib.ExitStack() as stack:
        rejects = stack.enter_context(RejectWriter(folder, Counter()))
        listing, counts, batches = _open_sorted(
            source,
            folder,
            stack,
            seed=seed,
            selection=selection,
            memory=memory,
            rejects=rejects,
            on_rows=on_rows,
        )
        if not counts.num_rows:
            raise UserError(_nothing_found(listing, counts.filtered))

        def drop(rows: list[tuple[str, int, str, str]]) -> None:
            nonlocal duplicates, dropped
            dropped += len(rows)
            if selection.dedup is None or rows[0][2] != DUPLICATE_KEY:
                rejects.add(rows)
            else:
                duplicates += len(rows)

        expected = counts.first(selection.limit)
        facts = _Facts(
            class_names=listing.class_names,
            containers=listing.containers,
            filtered=dict(counts.filtered),
            own_keys=listing.own_keys,
            numbered=listing.numbered,
            sources=absolute_paths(source),
        )
        tables = first_rows(settle(batches, drop=drop), selection.limit)
        written = _write_cut(tables, folder, expected=expected, facts=facts, sizing=sizing, options=options)
    if not written.counts.num_rows:
        raise UserError(_nothing_found(listing, counts.filtered))
    if selection.dedup is not None:
        facts.filtered["dedup"] = duplicates
    if selection.limit is not None:
        facts.filtered["limit"] = counts.num_rows - dropped - written.counts.num_rows
    facts.num_source_rejects = sum(listing.reasons.values())
    for name in (SCAN_NAME, MANIFEST_NAME):
        (folder / name).unlink(missing_ok=True)
    return _write_header(folder, written, facts, options)


def make_plan_without(
    plan: Plan,
    sample_ids: Iterator[Any],
    *,
    rejects: Iterator[Any],
    sizing: Sizing,
    class_names: Sequence[str] = (),
    listed_id: str = "",
) -> Plan:
    """The same plan less some of its rows, in the plan's folder. It may be left without any.

    sample_ids: ascending, as int64 arrays; rejects: tables of REJECT_SCHEMA that say why. class_names:
    classes that have their numbers already; those of the plan that are new come after them.
    """
    folder, options = plan.folder, load_options(plan.folder)
    all_names = _joined(class_names, plan.class_names, numbered=plan.numbered)
    facts = _Facts(
        class_names=all_names,
        containers=plan.containers,
        filtered=dict(plan.filtered),
        own_keys=plan.own_keys,
        numbered=plan.numbered,
        listed_id=listed_id,
        sources=plan.sources,
        num_source_rejects=plan.num_source_rejects,
    )
    kept = _without(load_plan_rows(folder), sample_ids)
    if all_names != plan.class_names and not plan.numbered:
        number_of = {name: number for number, name in enumerate(all_names)}
        kept = _renumbered(kept, [number_of[name] for name in plan.class_names])
    expected = Counts({}, plan.num_samples, plan.num_samples, plan.total_bytes)
    written = _write_cut(kept, folder, expected=expected, facts=facts, sizing=sizing, options=options)
    temp = folder / f".{REJECTS_NAME}.tmp"
    with (
        pq.ParquetFile(folder / REJECTS_NAME) as before,
        pq.ParquetWriter(temp, REJECT_SCHEMA, compression="zstd") as writer,
    ):
        for batch in before.iter_batches():
            writer.write_batch(batch)
        for table in rejects:
            writer.write_table(table)
            facts.num_source_rejects += len(table)
    temp.replace(folder / REJECTS_NAME)
    return _write_header(folder, written, facts, options)


@dataclass(kw_only=True)
class _Facts:
    """What a plan's header says of its source."""

    class_names: list[str]
    containers: list[str]
    filtered: dict[str, int]
    own_keys: bool
    numbered: bool
    sources: list[str]
    listed_id: str = ""
    num_source_rejects: int = 0


@dataclass(frozen=True)
class _Written:
    counts: Counts
    num_shards: int
    plan_id: str


def _open_sorted(
    source: Source | ManifestSource,
    folder: Path,
    stack: contextlib.ExitStack,
    *,
    seed: int,
    selection: Selection,
    memory: str,
    rejects: RejectWriter,
    on_rows: Callable[[float], None],
) -> tuple[Listing, Counts, Iterator[Any]]:
    """The source's list, how much of it the selection leaves, and that in order of PLACE."""
    classes: Any = None
    if not isinstance(source, ManifestSource):
        listing, classes = scan_rows(source, folder, rejects, on_rows=on_rows)
        counts = Counts({}, listing.num_rows or 0, listing.num_known, listing.known_bytes)
        if counts.num_rows <= SORTED_HERE and not selection.filters:
            return listing, counts, _sorted_here(folder, classes, seed=seed)
    # Here, because every packing process loads plans and none but the first makes one.
    from linerate.shards.plan_query import PlanQuery, open_database, open_scan

    db = stack.enter_context(open_database(folder, memory=memory))
    if isinstance(source, ManifestSource):
        listing = source.open_listing(db, folder, rejects)
    else:
        open_scan(db, folder, listing, classes)
    query = PlanQuery(db, listing, selection, seed=seed)
    if isinstance(source, ManifestSource) or selection.filters:
        counts = query.count()
        on_rows(counts.num_rows)
    return listing, counts, query.sorted_batches()


def _sorted_here(folder: Path, classes: Any, *, seed: int) -> Iterator[Any]:
    table = with_final_labels(pq.read_table(folder / SCAN_NAME), classes)
    prefix = f"{seed}:".encode()
    # What md5_number_lower means in DuckDB: the last 8 bytes, the least significant one first.
    places = np.array(
        [
            int.from_bytes(hashlib.md5(prefix + key.encode()).digest()[8:], "little")
            for key in table.column("key").to_pylist()
        ],
        np.uint64,
    )
    order = np.argsort(places, kind="stable")
    yield from table.append_column(PLACE, pa.array(places)).take(pa.array(order)).to_batches()


def _write_cut(
    tables: Iterator[Any],
    folder: Path,
    *,
    expected: Counts,
    facts: _Facts,
    sizing: Sizing,
    options: dict[str, Any],
) -> _Written:
    """Write the rows as shards of equal counts. Where fewer come than expected, they are cut once more."""
    while True:
        num_bytes = expected.estimated_bytes
        num_shards = sizing.num_shards(samples=expected.num_rows, total_bytes=num_bytes)
        digest = xxhash.xxh3_128(json.dumps([_digested(options), facts.class_names, num_shards]).encode())
        temp = folder / "cut"
        shutil.rmtree(temp, ignore_errors=True)
        temp.mkdir()
        found = write_plan_rows(
            tables,
            temp,
            bounds=shard_bounds(expected.num_rows, num_shards),
            digest=digest,
            digest_paths=facts.own_keys,
        )
        for old in folder.glob("plan*.parquet"):
            old.unlink()
        for path in temp.iterdir():
            path.replace(folder / path.name)
        temp.rmdir()
        counts = Counts(expected.filtered, *found)
        right = sizing.num_shards(samples=counts.num_rows, total_bytes=counts.estimated_bytes)
        if not counts.num_rows or (counts.num_rows, right) == (expected.num_rows, num_shards):
            return _Written(counts, num_shards, digest.hexdigest())
        tables, expected = load_plan_rows(folder), counts


def _digested(options: dict[str, Any]) -> dict[str, Any]:
    return {n: value for n, value in options.items() if value is not None or n not in _LATER_OPTIONS}


def _write_header(folder: Path, written: _Written, facts: _Facts, options: dict[str, Any]) -> Plan:
    plan = Plan(
        folder=folder,
        plan_id=written.plan_id,
        num_samples=written.counts.num_rows,
        total_bytes=written.counts.estimated_bytes,
        known_bytes=written.counts.num_bytes,
        num_shards=written.num_shards,
        **vars(facts),
    )
    document = {"options": options, "plan": {k: v for k, v in vars(plan).items() if k != "folder"}}
    temp = folder / f".{HEADER_NAME}.tmp"
    temp.write_text(json.dumps(document), encoding="utf-8")
    temp.replace(folder / HEADER_NAME)
    return plan


def _without(tables: Iterator[Any], sample_ids: Iterator[Any]) -> Iterator[Any]:
    """The tables' rows less those with these places in their sequence."""
    first = 0
    ids = np.empty(0, np.int64)
    for table in tables:
        end = first + len(table)
        while (not len(ids) or ids[-1] < end) and (more := next(sample_ids, None)) is not None:
            ids = np.concatenate([ids, more])
        here, ids = np.split(ids, [np.searchsorted(ids, end)])
        keep = np.ones(len(table), bool)
        keep[here - first] = False
        yield table.filter(pa.array(keep))
        first = end


def _joined(known: Sequence[str], found: Sequence[str], *, numbered: bool) -> list[str]:
    """Names of the known classes, then of those found that are new; a class without a name is its number."""
    if numbered:
        return [*known, *found[len(known) :]]
    there = set(known)
    return [*known, *(name for name in found if name not in there)]


def _renumbered(tables: Iterator[Any], label_of: list[int]) -> Iterator[Any]:
    """The rows with label_of[label] in the place of each label; -1, which is none, stays."""
    lookup = np.array([*label_of, -1], np.int32)
    for table in tables:
        labels = pa.array(lookup[table.column("label").to_numpy()], pa.int32())
        place = table.schema.get_field_index("label")
        yield table.set_column(place, table.schema.field("label"), labels)


def _nothing_found(listing: Listing, filtered: dict[str, int]) -> str:
    where = listing.where_from
    left_out = [f"{count} left out by --{name}" for name, count in filtered.items() if count]
    seen = [f"{count} {reason}" for reason, count in listing.reasons.most_common(4)] + left_out
    if not seen:
        return f"the source {where} holds no files; give a folder of images, a tar of one, or a manifest"
    return f"the source {where} holds no images{' that are wanted' if left_out else ''}: {'; '.join(seen)}"
