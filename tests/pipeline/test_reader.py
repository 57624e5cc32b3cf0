import contextlib
import dataclasses
import errno
import os
import pickle
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest

from linerate.pipeline.bad_samples import BadSamples
from linerate.pipeline.order import EpochOrder
from linerate.pipeline.reader import EpochFetch, ShardReader
from linerate.shards.catalog import Catalog


def members(catalog: Catalog) -> list[bytes]:
    """Every JPEG in packed order, by the tar library."""
    found = []
    for shard in range(catalog.num_shards):
        with tarfile.open(catalog.shard_path(shard)) as tar:
            found += [tar.extractfile(member).read() for member in tar]
    return found


def fetch_of(catalog: Catalog, **options) -> EpochFetch:
    settings = {"seed": 5, "epoch": 0, "global_batch": 8, "num_lanes": 4, "window_shards": 2}
    return EpochFetch(catalog.root, **settings | options)


def open_tars(catalog: Catalog) -> list[str]:
    """The tars of this catalog that this process holds open."""
    targets = []
    for entry in Path("/proc/self/fd").iterdir():
        # Other threads of the process, and the listing itself, close descriptors meanwhile.
        with contextlib.suppress(FileNotFoundError):
            targets.append(str(entry.readlink()))
    return [target for target in targets if target.startswith(str(catalog.root)) and target.endswith(".tar")]


def test_read_gives_the_tars_bytes_and_the_index_in_the_order_asked(catalog):
    expected = members(catalog)
    positions = np.array([40, 0, 13, 12, 11, 33, 7, 34])
    batch = ShardReader(catalog).read(positions)
    assert [jpeg.tobytes() for jpeg in batch.jpegs] == [expected[p] for p in positions]
    assert batch.position.tolist() == positions.tolist()
    assert batch.sample_id.tolist() == positions.tolist()
    assert batch.height.tolist() == (40 + positions).tolist()
    assert batch.width.tolist() == (70 - positions).tolist()
    assert batch.label.tolist() == (positions % 3).tolist()


def test_an_index_at_hand_is_44_bytes_a_sample(catalog):
    """Of a rank at a billion samples this is most of the memory: a column more fails here."""
    index = catalog.shard_index(0)
    columns = [getattr(index, field.name) for field in dataclasses.fields(index)]
    assert sum(column.nbytes for column in columns) == 44 * len(index)
    assert all(column.base is None or column.base.nbytes == column.nbytes for column in columns)


def test_the_batch_owns_its_bytes_in_one_writable_buffer(catalog):
    batch = ShardReader(catalog).read(np.arange(5))
    assert all(jpeg.flags.writeable and jpeg.base is batch.jpegs[0].base for jpeg in batch.jpegs)


def test_few_shards_at_hand_read_the_same(catalog):
    positions = np.random.default_rng(0).permutation(41)
    full = ShardReader(catalog).read(positions)
    tight = ShardReader(catalog, num_shards_at_hand=1)
    assert [j.tobytes() for j in tight.read(positions).jpegs] == [j.tobytes() for j in full.jpegs]
    assert len(open_tars(catalog)) == 1
    tight.close()
    assert open_tars(catalog) == []


def test_advice_changes_nothing_that_is_read(catalog):
    reader = ShardReader(catalog)
    reader.advise(np.arange(41))
    assert [j.tobytes() for j in reader.read(np.arange(41)).jpegs] == members(catalog)


def test_a_fetch_gives_the_orders_positions_whatever_the_step_before(catalog):
    order = EpochOrder(catalog.shard_sizes, seed=5, epoch=3, global_batch=8, num_lanes=4, window_shards=2)
    fetch = fetch_of(catalog, epoch=3)
    for step in (4, 0, 2, 1, 3):
        np.testing.assert_array_equal(fetch(step).position, order.positions(step))


def test_a_fetch_survives_pickling_and_another_epoch(catalog):
    fetch = fetch_of(catalog, rank=1, world_size=2)
    first = fetch(1)
    copy = pickle.loads(pickle.dumps(fetch))
    np.testing.assert_array_equal(copy(1).position, first.position)
    later = fetch.for_epoch(1)
    assert set(later(1).position) != set(first.position)
    np.testing.assert_array_equal(later.for_epoch(0)(1).position, first.position)
    assert len(pickle.dumps(fetch)) < 1000


def test_ranks_fetch_the_shares_of_one_global_batch(catalog):
    alone = fetch_of(catalog)(2)
    shares = [fetch_of(catalog, rank=r, world_size=4)(2) for r in range(4)]
    assert np.concatenate([s.sample_id for s in shares]).tolist() == alone.sample_id.tolist()


def test_a_missing_shard_is_named(tmp_path, catalog):
    broken = copy_of(catalog, tmp_path)
    broken.shard_path(1).unlink()
    with pytest.raises(BadSamples, match=r"test-000001\.tar: No such file.*`linerate shard verify`") as error:
        ShardReader(broken).read(np.arange(41))
    assert error.value.shard == 1


def test_a_missing_index_loses_its_shard(tmp_path, catalog):
    broken = copy_of(catalog, tmp_path)
    broken.shard_path(1).with_suffix(".parquet").unlink()
    with pytest.raises(BadSamples, match=r"test-000001\.parquet is missing") as error:
        ShardReader(broken).read(np.arange(10, 15))
    assert (error.value.shard, error.value.position) == (1, [12, 13, 14])


def test_what_a_short_shard_still_holds_is_read(tmp_path, catalog):
    broken = copy_of(catalog, tmp_path)
    os.truncate(broken.shard_path(2), 3000)
    reader = ShardReader(broken)
    with pytest.raises(BadSamples, match=r"test-000002\.tar: it ends after 3,000 bytes, before its") as error:
        reader.read(np.arange(41))
    assert error.value.position == error.value.sample_id
    assert set(range(30, 34)) <= set(error.value.position) < set(range(22, 34))
    whole = [p for p in range(41) if p not in error.value.position]
    assert len(reader.read(np.array(whole)).jpegs) == len(whole)


def test_a_flipped_bit_is_found_by_the_checksum_alone(tmp_path, catalog):
    broken = copy_of(catalog, tmp_path)
    index = broken.shard_index(1)
    flip_bit(broken.shard_path(1), int(index.offset[3] + index.size[3] // 2))
    reader = ShardReader(broken)
    assert len(reader.read(np.arange(41)).jpegs) == 41
    with pytest.raises(BadSamples, match=r"000000000015: .*test-000001\.tar: its bytes fail their") as error:
        reader.read(np.arange(41), verify=True)
    assert error.value.position == [15]


def test_a_disk_that_fails_for_one_sample_loses_that_one(catalog, monkeypatch):
    real = os.preadv

    def fail_at_start(file, buffers, offset):
        if offset == 512:
            raise OSError(errno.EIO, "Input/output error")
        return real(file, buffers, offset)

    monkeypatch.setattr("os.preadv", fail_at_start)
    with pytest.raises(BadSamples, match="Input/output error") as error:
        ShardReader(catalog).read(np.arange(14))
    assert error.value.position == [0, 12]


@pytest.mark.parametrize("call", ["os.open", "os.preadv"])
def test_errors_of_more_than_one_file_come_through(catalog, monkeypatch, call):
    def fail(*_):
        raise OSError(errno.ENOMEM, "Cannot allocate memory")

    monkeypatch.setattr(call, fail)
    with pytest.raises(OSError, match="Cannot allocate"):
        ShardReader(catalog).read(np.arange(4))


def flip_bit(path: Path, offset: int) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 1]))


def copy_of(catalog: Catalog, tmp_path: Path) -> Catalog:
    return Catalog.load(shutil.copytree(catalog.root, tmp_path / "copy"))
