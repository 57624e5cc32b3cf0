"""Loading a catalog, and what a damaged one says."""

import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from linerate.shards.catalog import FORMAT_VERSION, Catalog
from linerate.shards.errors import UserError


@pytest.fixture
def root(packed: Catalog, tmp_path: Path) -> Path:
    return Path(shutil.copytree(packed.root, tmp_path / "copy"))


def rewrite(root: Path, **changes: Any) -> None:
    document = json.loads((root / "catalog.json").read_text())
    (root / "catalog.json").write_text(json.dumps(document | changes))


def test_totals_and_shards_agree_with_the_indices(packed: Catalog) -> None:
    indices = [packed.shard_index(shard) for shard in range(packed.num_shards)]
    assert [len(index) for index in indices] == list(packed.shard_sizes)
    assert packed.starts.tolist() == [0, 8, 16, 24, 32, 40]
    assert packed.max_height == max(int(index.height.max()) for index in indices) == 25
    assert packed.max_width == max(int(index.width.max()) for index in indices) == 40
    assert packed.max_sample_bytes == max(int(index.size.max()) for index in indices)
    assert [packed.shard_path(s).stat().st_size for s in range(5)] == packed.shard_bytes.tolist()
    assert packed.class_names == ("ant", "bee", "cat", "dog")
    assert (packed.name, packed.seed, packed.num_planned, packed.num_rejected) == ("shard", 7, 40, 0)


def test_columns_have_the_promised_types(packed: Catalog) -> None:
    index = packed.shard_index(0)
    assert {name: column.dtype for name, column in vars(index).items()} == {
        "sample_id": np.int64,
        "offset": np.int64,
        "size": np.int64,
        "height": np.int32,
        "width": np.int32,
        "label": np.int32,
        "xxh3_64": np.uint64,
    }
    assert (np.diff(index.sample_id) > 0).all()
    assert packed.shard_xxh3.dtype == np.uint64


def test_a_catalog_goes_to_other_processes(packed: Catalog) -> None:
    again = pickle.loads(pickle.dumps(packed))
    assert again.files == packed.files
    assert again.starts.tolist() == packed.starts.tolist()


def test_a_folder_without_a_catalog_is_refused(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "missing"):
        with pytest.raises(UserError, match=r"there is no catalog\.json in"):
            Catalog.load(path)
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"there is no catalog\.json"):
        Catalog.load(tmp_path / "file")


def test_a_newer_version_is_refused(root: Path) -> None:
    rewrite(root, format_version=FORMAT_VERSION + 1)
    with pytest.raises(UserError, match=r"has format version 2, this linerate reads up to 1; upgrade"):
        Catalog.load(root)


@pytest.mark.parametrize(
    "text", ["", '{"format_version": 1, "na', "[]", '{"name": "x"}', '{"format_version": "?"}']
)
def test_a_catalog_cut_short_is_refused(root: Path, text: str) -> None:
    (root / "catalog.json").write_text(text)
    with pytest.raises(UserError, match=r"catalog\.json is damaged"):
        Catalog.load(root)


def test_a_missing_entry_or_table_is_refused(root: Path) -> None:
    document = json.loads((root / "catalog.json").read_text())
    del document["class_names"]
    (root / "catalog.json").write_text(json.dumps(document))
    with pytest.raises(UserError, match=r"is damaged.*class_names"):
        Catalog.load(root)


@pytest.mark.parametrize("damage", ["missing", "cut", "other columns"])
def test_a_damaged_table_of_shards_is_refused(root: Path, damage: str) -> None:
    path = root / "shards.parquet"
    if damage == "missing":
        path.unlink()
    elif damage == "cut":
        path.write_bytes(path.read_bytes()[:-9])
    else:
        pq.write_table(pa.table({"x": [1]}), path)
    with pytest.raises(UserError, match=r"shards\.parquet or catalog\.json beside it is damaged"):
        Catalog.load(root)


def test_a_table_of_another_run_is_refused(root: Path) -> None:
    pq.write_table(pq.read_table(root / "shards.parquet").slice(1), root / "shards.parquet")
    with pytest.raises(UserError, match=r"lists 4 shards with 32 samples, but catalog\.json says 5 with 40"):
        Catalog.load(root)


def test_damaged_indices_are_refused(root: Path) -> None:
    catalog = Catalog.load(root)
    path = root / "shard-000000.parquet"
    pq.write_table(pq.read_table(path).slice(1), path)
    with pytest.raises(UserError, match=r"has 7 rows, shards\.parquet says 8"):
        catalog.shard_index(0)
    path.write_bytes(b"PAR1 and no more")
    with pytest.raises(UserError, match=r"shard-000000\.parquet is damaged"):
        catalog.shard_index(0)
    path.unlink()
    with pytest.raises(UserError, match=r"shard-000000\.parquet is missing"):
        catalog.keys(0)
