"""The rows of a source that a selection leaves, counted and shuffled."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow.parquet as pq

from linerate.shards.manifest import ManifestSource
from linerate.shards.options import Selection
from linerate.shards.plan_rows import Counts
from linerate.shards.scan import SCAN_NAME, SCAN_SCHEMA, Listing, RejectWriter, scan_rows, with_final_labels
from linerate.shards.shuffle import Shuffle, run_bytes
from linerate.shards.sources import Source

if TYPE_CHECKING:
    from linerate.shards.plan_query import PlanQuery


@dataclass(frozen=True)
class Selected:
    """What a selection leaves of a source, shuffled."""

    listing: Listing
    counts: Counts
    tables: Iterator[Any]
    """In order of PLACE."""


def select_rows(
    source: Source | ManifestSource,
    folder: Path,
    stack: contextlib.ExitStack,
    *,
    seed: int,
    selection: Selection,
    memory: str,
    rejects: RejectWriter,
    on_rows: Callable[[float], None],
) -> Selected:
    """List the source and shuffle what the selection leaves of it. `stack` holds what that needs open."""
    sample = selection.sample
    shuffle = stack.enter_context(Shuffle(folder, seed=seed, run_bytes=run_bytes(memory), sample=sample))
    sizes = _Sizes()
    if isinstance(source, ManifestSource) or selection.asks_sql:
        query = _open_query(source, folder, stack, selection, memory, rejects, on_rows)
        listing, filtered = query.listing, query.count_filtered()
        for batch in query.batches():
            sizes.add(shuffle.add(batch))
            if isinstance(source, ManifestSource):
                on_rows(len(batch))
        tables = query.finish(shuffle.sorted_tables())
    else:
        listing, classes = scan_rows(
            source, rejects, write=lambda table: sizes.add(shuffle.add(table)), on_rows=on_rows
        )
        filtered = {}
        tables = (with_final_labels(table, classes) for table in shuffle.sorted_tables())
    if sample is not None and sample < 1:
        filtered["sample"] = shuffle.num_left_out
    return Selected(listing, Counts(filtered, shuffle.num_rows, sizes.num_known, sizes.num_bytes), tables)


@dataclass
class _Sizes:
    """Of rows whose bytes are known."""

    num_known: int = 0
    num_bytes: int = 0

    def add(self, table: Any) -> None:
        if "size" not in table.column_names:
            return
        sizes = table.column("size").to_numpy()
        self.num_known += int(np.count_nonzero(sizes >= 0))
        self.num_bytes += int(sizes[sizes >= 0].sum())


def _open_query(
    source: Source | ManifestSource,
    folder: Path,
    stack: contextlib.ExitStack,
    selection: Selection,
    memory: str,
    rejects: RejectWriter,
    on_rows: Callable[[float], None],
) -> PlanQuery:
    """The selection of the source as SQL; what has no SQL of its own goes through scan.parquet."""
    # Here, because every packing process loads plans and none but the first makes one.
    from linerate.shards.plan_query import PlanQuery, open_database, open_scan

    if isinstance(source, ManifestSource):
        db = stack.enter_context(open_database(folder, memory=memory))
        return PlanQuery(db, source.open_listing(db, folder, rejects), selection)
    with pq.ParquetWriter(folder / SCAN_NAME, SCAN_SCHEMA, compression="zstd", compression_level=1) as writer:
        listing, classes = scan_rows(source, rejects, write=writer.write_table, on_rows=on_rows)
    db = stack.enter_context(open_database(folder, memory=memory))
    open_scan(db, folder, listing, classes)
    return PlanQuery(db, listing, selection)
