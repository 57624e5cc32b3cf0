"""Rows in the order of a keyed hash, within bounded memory: runs on disk, all cut at the same places.

A row's place is xxh3_64 of its key under the seed: a published hash, the same on any machine for all time,
and with the xxhash library 0.09 us a row in batches where md5 in DuckDB took 0.85. Places are uniform, so
cutting every run into equal ranges of them makes the n-th pieces of all runs one small table: the shuffle
reads and writes each row once more than it must, whatever their number.
"""

from __future__ import annotations

import contextlib
import itertools
import re
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import xxhash

from linerate.shards.errors import UserError

PLACE = "place"
# A run on disk has 256 pieces: 84 GB, a billion rows, come back in pieces of 330 MB.
PIECE_BITS = 8
STREAM_ROWS = 65_536


_LEAST_BYTES = 256_000_000


def parse_memory(text: str) -> int:
    """Bytes of `4GB`, `512MB`, `1.5GiB`. Raises UserError for anything else and for too little."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(I?)B?\s*", text.upper())
    if not found:
        raise UserError(f"--memory is {text!r}; give a number with a unit, such as 4GB or 512MB")
    size = int(float(found[1]) * (1024 if found[3] else 1000) ** " KMGT".index(found[2] or " "))
    if size < _LEAST_BYTES:
        raise UserError(f"--memory is {text}, a plan needs at least {_LEAST_BYTES // 10**6}MB")
    return size


def run_bytes(memory: str) -> int:
    """Of the rows that a shuffle holds at once, which takes about three times as much."""
    return min(parse_memory(memory) // 16, 1 << 30)


def place_of(key: bytes, *, seed: int) -> int:
    """Where a key stands in the order of a seed, 0 to 2^64 - 1."""
    return int(xxhash.xxh3_64_intdigest(key, seed % 2**64))


def places_of(keys: Any, *, seed: int) -> npt.NDArray[np.uint64]:
    """place_of for each of an Arrow array of texts."""
    values: list[bytes] = keys.cast(pa.binary()).to_pylist()
    hashed = map(xxhash.xxh3_64_intdigest, values, itertools.repeat(seed % 2**64))
    return np.fromiter(hashed, np.uint64, len(values))


class Shuffle:
    """Takes tables with a column `key`, gives their rows with PLACE and in its order.

    run_bytes: rows of more are put into `folder`; about twice as much memory is used at most. sample: keep
    the rows in this share of the places. Use it as a context: it holds files.
    """

    def __init__(self, folder: Path, *, seed: int, run_bytes: int, sample: float | None = None) -> None:
        self._folder, self._seed, self._run_bytes = folder, seed, run_bytes
        self._end = None if sample is None or sample >= 1 else int(sample * 2**64)
        self._pieces: list[list[Any]] = [[] for _ in range(1 << PIECE_BITS)]
        self._held_bytes = 0
        self._num_bytes = 0
        self._runs: list[Any] = []
        self._files = contextlib.ExitStack()
        self.num_rows = 0
        self.num_left_out = 0
        """By `sample`."""

    def __enter__(self) -> Shuffle:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None
    ) -> None:
        self._pieces.clear()
        self._files.close()

    def add(self, table: Any) -> Any:
        """Take a table or batch; what `sample` leaves of it comes back, with PLACE, in another order."""
        table = pa.Table.from_batches([table]) if isinstance(table, pa.RecordBatch) else table
        places = places_of(table.column("key").combine_chunks(), seed=self._seed)
        table = table.append_column(PLACE, pa.array(places))
        pieces = (places >> np.uint64(64 - PIECE_BITS)).astype(np.uint8)
        # Numpy sorts single bytes by counting; and rows are taken while the batch lies in the cache.
        order = np.argsort(pieces, kind="stable")
        if self._end is not None:
            order = order[places[order] < self._end]
            self.num_left_out += len(table) - len(order)
        table = table.take(pa.array(order))
        ends = np.cumsum(np.bincount(pieces[order], minlength=1 << PIECE_BITS)).tolist()
        for piece, (start, end) in enumerate(itertools.pairwise([0, *ends])):
            if end > start:
                self._pieces[piece].append(table.slice(start, end - start))
        self.num_rows += len(table)
        self._held_bytes += table.nbytes
        self._num_bytes += table.nbytes
        if self._held_bytes > self._run_bytes:
            self._write_run(table.schema)
        return table

    def sorted_tables(self) -> Iterator[Any]:
        """All rows, in tables of at most STREAM_ROWS; once. The order of equal places is left open."""
        # Where a piece of all runs is more than may be held, it is read in rounds, a range of places in each.
        most = 2 * max(self._run_bytes, 1) * len(self._pieces)
        num_rounds = max(1, -(-self._num_bytes // most)) if self._runs else 1
        parts: list[Any] = []
        for step in range(num_rounds * len(self._pieces)):
            piece, turn = divmod(step, num_rounds)
            parts += self._load(piece, turn, num_rounds)
            # Pieces of a short list are sorted together: each table costs its readers 0.2 ms.
            if sum(map(len, parts)) >= STREAM_ROWS or step == num_rounds * len(self._pieces) - 1:
                yield from _in_order(parts)
                parts = []

    def _load(self, piece: int, turn: int, num_rounds: int) -> Iterator[Any]:
        """The rows of a piece, of all runs; of several rounds those in this one's range of places."""
        held = self._pieces[piece]
        span = 1 << 64 - PIECE_BITS
        low, high = (piece * span + span * end // num_rounds for end in (turn, turn + 1))
        for table in itertools.chain(
            (pa.Table.from_batches([run.get_batch(piece)]) for run in self._runs), held
        ):
            yield table if num_rounds == 1 else _between(table, low, high)
        if turn == num_rounds - 1:
            held.clear()

    def _write_run(self, schema: Any) -> None:
        path = self._folder / f"run-{len(self._runs)}.arrow"
        self._files.callback(path.unlink, missing_ok=True)
        with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, schema) as writer:
            for held in self._pieces:
                table = pa.concat_tables([schema.empty_table(), *held]).combine_chunks()
                held.clear()
                columns = [column.combine_chunks() for column in table.columns]
                writer.write_batch(pa.record_batch(columns, schema=schema))
        self._held_bytes = 0
        file = self._files.enter_context(pa.OSFile(str(path), "rb"))
        self._runs.append(pa.ipc.open_file(file))


def _between(table: Any, low: int, high: int) -> Any:
    """The rows whose places are from `low` up to, but without, `high`."""
    places = table.column(PLACE).to_numpy()
    return table.filter(pa.array((places >= low) & (places <= high - 1)))


def _in_order(parts: list[Any]) -> Iterator[Any]:
    if not parts:
        return
    table = pa.concat_tables(parts).combine_chunks()  # taking from many chunks is slow
    order = np.argsort(table.column(PLACE).to_numpy())
    for start in range(0, len(table), STREAM_ROWS):
        yield table.take(pa.array(order[start : start + STREAM_ROWS]))
