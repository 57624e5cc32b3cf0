import os
import pickle
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest

from linerate.pipeline.order import EpochOrder
from linerate.pipeline.reader import EpochFetch, ShardReader
from linerate.shards.catalog import Catalog
from linerate.shards.errors import UserError


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
    links = [link for link in Path("/proc/self/fd").iterdir() if link.is_symlink()]
    targets = [str(link.readlink()) for link in links]
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
    with pytest.raises(FileNotFoundError, match=r"test-000001\.tar"):
        ShardReader(broken).read(np.arange(41))


def test_a_shard_cut_short_is_named_with_the_way_out(tmp_path, catalog):
    broken = copy_of(catalog, tmp_path)
    os.truncate(broken.shard_path(2), 3000)
    reader = ShardReader(broken)
    with pytest.raises(UserError, match=r"test-000002\.tar holds 3,000 bytes, .* `linerate shard verify"):
        reader.read(np.arange(41))
    assert len(reader.read(np.arange(20)).jpegs) == 20


def copy_of(catalog: Catalog, tmp_path: Path) -> Catalog:
    return Catalog.load(shutil.copytree(catalog.root, tmp_path / "copy"))
