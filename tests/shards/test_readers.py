"""Other people's readers on our shards: webdataset, DALI's own reader, GNU tar."""

import gc
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from linerate.shards.catalog import Catalog


def ours(catalog: Catalog, shard: int) -> list[tuple[str, bytes, int]]:
    """(sample id, JPEG, label) by our own index."""
    index, stored = catalog.shard_index(shard), catalog.shard_path(shard).read_bytes()
    return [
        (
            f"{index.sample_id[i]:012d}",
            stored[index.offset[i] : index.offset[i] + index.size[i]],
            int(index.label[i]),
        )
        for i in range(len(index))
    ]


@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")  # webdataset closes none of its tars
def test_webdataset_reads_every_sample(packed: Catalog) -> None:
    import webdataset

    for shard in range(packed.num_shards):
        dataset = webdataset.WebDataset(str(packed.shard_path(shard)), shardshuffle=False, empty_check=False)
        read = [(sample["__key__"], sample["jpg"], int(sample["cls"])) for sample in dataset]
        assert read == ours(packed, shard)
    gc.collect()


def test_dali_reads_every_sample_by_our_index(packed: Catalog) -> None:
    from nvidia import dali as untyped

    dali: Any = untyped
    paths = [packed.shard_path(shard) for shard in range(packed.num_shards)]
    pipeline = dali.Pipeline(batch_size=packed.num_samples, num_threads=1, device_id=None)
    with pipeline:
        jpegs, labels = dali.fn.readers.webdataset(
            paths=[str(path) for path in paths],
            index_paths=[str(path.with_suffix(".idx")) for path in paths],
            ext=["jpg", "cls"],
            missing_component_behavior="error",
        )
        pipeline.set_outputs(jpegs, labels)
    pipeline.build()
    jpegs, labels = pipeline.run()
    read = [
        (np.asarray(jpegs.at(i)).tobytes(), int(np.asarray(labels.at(i)).tobytes()))
        for i in range(len(jpegs))
    ]
    expected = [sample[1:] for shard in range(packed.num_shards) for sample in ours(packed, shard)]
    assert read == expected


def test_the_index_is_that_of_dalis_own_tool(packed: Catalog, tmp_path: Path) -> None:
    import wds2idx

    path = packed.shard_path(1)
    creator = wds2idx.IndexCreator(str(path), str(tmp_path / "theirs.idx"), verbose=False)
    creator.create_index()
    creator.close()
    assert (tmp_path / "theirs.idx").read_text() == path.with_suffix(".idx").read_text()


def test_gnu_tar_extracts_every_sample(packed: Catalog, tmp_path: Path) -> None:
    if not shutil.which("tar"):
        pytest.skip("there is no tar, so its reading of our shards stays untested")
    for shard in range(packed.num_shards):
        done = subprocess.run(
            ["tar", "-xf", packed.shard_path(shard), "-C", tmp_path], capture_output=True, check=True
        )
        assert done.stderr == b""
        for sample_id, jpeg, label in ours(packed, shard):
            assert (tmp_path / f"{sample_id}.jpg").read_bytes() == jpeg
            assert (tmp_path / f"{sample_id}.cls").read_text() == str(label)
