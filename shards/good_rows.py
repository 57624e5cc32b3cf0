"""Which rows of a manifest can be samples, found while they stream, so that no path is decoded twice."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from linerate.shards.manifest_sql import MAX_PATH_BYTES
from linerate.shards.sources import MAX_SAMPLE_BYTES


class GoodRows:
    """Batches of a listing's fields, less the rows that `good`, SQL over the fields, is not true of.

    DuckDB is asked only about batches that a look at their bytes, of 0.01 us a row, does not clear: it takes
    ten times as long.
    """

    def __init__(self, db: Any, good: str) -> None:
        # Of its own: a query on the connection that gives the batches would end them.
        self._db, self._good = db.cursor(), good
        self.num_bad = 0
        self.any_elsewhere = False
        """Perhaps: may a row name a URL or an absolute path?"""

    def of(self, batch: Any) -> Any:
        """The good rows of a batch."""
        if self._clears(batch):
            return batch
        table = pa.Table.from_batches([batch])
        self._db.register("listed", table)
        found = self._db.execute(f"SELECT {self._good} AS good FROM listed").fetchnumpy()["good"]
        self._db.unregister("listed")
        good = np.asarray(found, bool)
        if good.all():
            return batch
        self.num_bad += int(np.count_nonzero(~good))
        return batch.filter(pa.array(good))

    def _clears(self, batch: Any) -> bool:
        """Are all rows good for certain?"""
        names = batch.schema.names
        path = batch.column("path" if "path" in names else "key")
        return (
            self._clears_paths(path)
            and _lengths_fit(batch.column("key"))
            and (
                "size" not in names or int(batch.column("size").to_numpy().max(initial=0)) <= MAX_SAMPLE_BYTES
            )
        )

    def _clears_paths(self, paths: Any) -> bool:
        """Has each 1 to MAX_PATH_BYTES bytes, and none a zero byte or a colon, as URLs have?"""
        joined, ends = _joined(paths)
        colon = b":" in joined
        firsts = np.frombuffer(joined, np.uint8)[ends[:-1][np.diff(ends) > 0]]
        self.any_elsewhere |= colon or bool((firsts == ord("/")).any())
        return not colon and b"\0" not in joined and _lengths_fit(paths)


def _joined(texts: Any) -> tuple[bytes, Any]:
    """The bytes of an Arrow array of texts, one after the other, and n + 1 int32: where each begins."""
    _, offsets, data = texts.buffers()
    ends = np.frombuffer(offsets, np.int32)[texts.offset : texts.offset + len(texts) + 1]
    return bytes(memoryview(data)[ends[0] : ends[-1]]) if data is not None else b"", ends - ends[0]


def _lengths_fit(texts: Any) -> bool:
    if texts.null_count or not len(texts):
        return not len(texts)
    least, most = pc.min_max(pc.binary_length(texts)).values()
    return bool(0 < least.as_py() <= most.as_py() <= MAX_PATH_BYTES)
