"""The bytes of what was left out, looked up in the source, which is where they still are."""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from linerate.shards.fetch import SampleReader
from linerate.shards.inspect_image import RejectedError
from linerate.shards.manifest import ManifestSource, open_any_source
from linerate.shards.options import ManifestColumns, Selection
from linerate.shards.remote_url import URL_CONTAINER
from linerate.shards.scan import SCAN_SCHEMA, RejectWriter
from linerate.shards.sources import Source, SourceRow

MAX_BYTES = 100_000_000
_MEMORY = "1GB"
Found = tuple[str, bytes | str]
"""A key, and its bytes or why there are none."""


def load_images(
    sources: Sequence[Sequence[Path | str]],
    keys: Collection[str],
    *,
    columns: ManifestColumns,
) -> Iterator[Found]:
    """The files with these keys out of the sources that still have them, each key at most once.

    sources: each as it was given to one `pack`. columns: of manifests. Names that rule a file out are never
    looked up; URLs are not fetched. Raises UserError for a source that cannot be opened.
    """
    left = set(keys)
    for paths in sources:
        if not left:
            return
        source = open_any_source(paths, columns=columns)
        with ExitStack() as stack:
            rows, containers = _find_rows(source, left, stack)
            for key, found in _read(rows, containers):
                left.discard(key)
                yield key, found


def _find_rows(
    source: Source | ManifestSource, keys: Collection[str], stack: ExitStack
) -> tuple[Any, list[str]]:
    """(rows as a plan has them, one a key; what their container counts)."""
    if isinstance(source, ManifestSource):
        return _find_in_manifest(source, keys, stack)
    found: dict[str, SourceRow] = {}
    rows = (row for row in source.rows() if isinstance(row, SourceRow) and row.key in keys)
    for row in rows:
        found.setdefault(row.key, row)
        if len(found) == len(keys):  # a long source is not listed to its end
            break
    names = ("key", "path", "container", "offset", "size")
    columns = {
        name: pa.array([getattr(row, name) for row in found.values()], SCAN_SCHEMA.field(name).type)
        for name in names
    }
    return pa.table(columns), [str(Path(path).absolute()) for path in source.containers]


def _find_in_manifest(
    source: ManifestSource, keys: Collection[str], stack: ExitStack
) -> tuple[Any, list[str]]:
    from linerate.shards.manifest_sql import literal
    from linerate.shards.plan_query import PlanQuery, open_database
    from linerate.shards.plan_rows import with_paths

    folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="linerate-preview-")))
    rejects = stack.enter_context(RejectWriter(folder, Counter()))
    db = stack.enter_context(open_database(folder, memory=_MEMORY))
    listing = source.open_listing(db, folder, rejects)
    wanted = f"{listing.fields['key']} IN ({', '.join(map(literal, sorted(keys)))})"
    batches = list(PlanQuery(db, listing, Selection(where=wanted), seed=0).sorted_batches())
    return with_paths(pa.Table.from_batches(batches)), list(listing.containers)


def _read(rows: Any, containers: list[str]) -> Iterator[Found]:
    if URL_CONTAINER in containers:
        far = pc.equal(rows.column("container"), containers.index(URL_CONTAINER))
        for key in rows.filter(far).column("key").to_pylist():
            yield key, "it lies at a URL, which is not fetched for a page"
        rows = rows.filter(pc.invert(far))
    held = bytearray()

    def room(size: int) -> memoryview:
        nonlocal held
        held = bytearray(size + 1)
        return memoryview(held)

    keys = rows.column("key").to_pylist()
    with SampleReader(rows, containers, max_bytes=MAX_BYTES) as reader:
        for number, key in enumerate(keys):
            try:
                size = reader.read_next(room)
                yield key, bytes(memoryview(held)[:size])
            except RejectedError as error:
                yield key, str(error)
            except OSError as error:
                yield from ((late, f"cannot be read: {error.strerror}") for late in keys[number:])
                return
