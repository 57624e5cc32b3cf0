"""The shuffle: every row once, in order of its place, whatever fits into memory."""

from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pytest

from linerate.shards import shuffle as module
from linerate.shards.shuffle import PLACE, Shuffle, place_of


def table_of(keys: list[str], first: int = 0) -> pa.Table:
    return pa.table({"key": keys, "n": pa.array(range(first, first + len(keys)), pa.int64())})


@pytest.mark.parametrize("run_bytes", [300, 3000, 1 << 30])
@pytest.mark.parametrize("stream_rows", [1, 7, 1000])
def test_rows_come_in_order_of_their_places(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run_bytes: int, stream_rows: int
) -> None:
    monkeypatch.setattr(module, "STREAM_ROWS", stream_rows)
    monkeypatch.setattr(module, "PIECE_BITS", 2)
    keys = [f"images/\u00e9{number}.jpg" for number in range(150)]
    with Shuffle(tmp_path, seed=5, run_bytes=run_bytes) as shuffle:
        for start in range(0, 150, 50):
            shuffle.add(table_of(keys[start : start + 50], start))
        found = pa.concat_tables(shuffle.sorted_tables())
        assert len(list(tmp_path.iterdir())) == {300: 3, 3000: 1, 1 << 30: 0}[run_bytes]
    order = sorted(range(150), key=lambda row: place_of(keys[row].encode(), seed=5))
    assert found.column("n").to_pylist() == order
    assert found.column("key").to_pylist() == [keys[row] for row in order]
    assert found.column(PLACE).to_pylist() == [place_of(keys[row].encode(), seed=5) for row in order]
    assert not list(tmp_path.iterdir())


def test_a_sample_is_those_rows_whose_places_come_first(tmp_path: Path) -> None:
    keys = [str(number) for number in range(100)]
    with Shuffle(tmp_path, seed=0, run_bytes=1 << 20, sample=0.3) as shuffle:
        left = shuffle.add(table_of(keys))
        found = pa.concat_tables(shuffle.sorted_tables()).column("key").to_pylist()
    wanted = {key for key in keys if place_of(key.encode(), seed=0) < int(0.3 * 2**64)}
    assert set(found) == set(left.column("key").to_pylist()) == wanted
    assert (shuffle.num_rows, shuffle.num_left_out) == (len(wanted), 100 - len(wanted))


def test_nothing_comes_of_nothing(tmp_path: Path) -> None:
    with Shuffle(tmp_path, seed=-1, run_bytes=1 << 20) as shuffle:
        shuffle.add(table_of([]))
        assert sum(map(len, shuffle.sorted_tables())) == 0


@pytest.mark.parametrize(("run_bytes", "most"), [(1 << 14, 1 << 16), (1 << 12, 1 << 14)])
def test_what_is_sorted_at_once_is_bounded_however_long_the_rows_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run_bytes: int, most: int
) -> None:
    monkeypatch.setattr(module, "PIECE_BITS", 2)
    monkeypatch.setattr(module, "STREAM_ROWS", 1)
    sorted_bytes: list[int] = []
    in_order = module._in_order

    def count(parts: list[pa.Table]) -> Iterator[pa.Table]:
        sorted_bytes.append(sum(part.nbytes for part in parts))
        return in_order(parts)

    monkeypatch.setattr(module, "_in_order", count)
    keys = [f"{number:0500}" for number in range(1000)]
    with Shuffle(tmp_path, seed=5, run_bytes=run_bytes) as shuffle:
        for start in range(0, 1000, 10):
            shuffle.add(table_of(keys[start : start + 10]))
        found = [key for table in shuffle.sorted_tables() for key in table.column("key").to_pylist()]
    assert found == sorted(keys, key=lambda key: place_of(key.encode(), seed=5))
    assert max(sorted_bytes) < most
