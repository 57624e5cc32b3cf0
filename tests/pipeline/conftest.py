import io
import tarfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import xxhash
from PIL import Image

from linerate.shards.catalog import Catalog, write_catalog

torch.set_num_threads(1)


@dataclass(frozen=True)
class Sample:
    jpeg: bytes
    height: int
    width: int
    label: int = -1


def draw_sample(
    seed: int, *, height: int = 48, width: int = 64, label: int = -1, mode: str = "RGB"
) -> Sample:
    """A photo-like JPEG: coarse random colours blown up."""
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    image = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC).convert(mode)
    out = io.BytesIO()
    image.save(out, "JPEG", quality=90)
    return Sample(out.getvalue(), height, width, label)


def write_shards(
    root: Path,
    shards: Sequence[Sequence[Sample]],
    *,
    class_names: Sequence[str] = (),
    sample_ids: Sequence[int] | None = None,
) -> Catalog:
    """Shards of exactly these samples by tarfile, so that what reads them is tested apart from packing."""
    root.mkdir(parents=True, exist_ok=True)
    ids = iter(range(10**6) if sample_ids is None else sample_ids)
    rows = []
    for nth, samples in enumerate(shards):
        path = root / f"test-{nth:06d}.tar"
        taken = [(next(ids), sample) for sample in samples]
        with tarfile.open(path, "w") as tar:
            for sample_id, sample in taken:
                info = tarfile.TarInfo(f"{sample_id:012d}.jpg")
                info.size = len(sample.jpeg)
                tar.addfile(info, io.BytesIO(sample.jpeg))
        with tarfile.open(path) as tar:
            offsets = [member.offset_data for member in tar]
        columns = {
            "sample_id": pa.array([sample_id for sample_id, _ in taken], pa.int64()),
            "offset": pa.array(offsets, pa.int64()),
            "size": pa.array([len(s.jpeg) for s in samples], pa.int64()),
            "height": pa.array([s.height for s in samples], pa.int32()),
            "width": pa.array([s.width for s in samples], pa.int32()),
            "label": pa.array([s.label for s in samples], pa.int32()),
            "key": pa.array([f"in/{sample_id}.jpg" for sample_id, _ in taken]),
            "xxh3_64": pa.array([xxhash.xxh3_64_intdigest(s.jpeg) for s in samples], pa.uint64()),
        }
        pq.write_table(pa.table(columns), path.with_suffix(".parquet"))
        whole = path.read_bytes()
        digest = np.uint64(xxhash.xxh3_64_intdigest(whole))
        rows.append({"file": path.name, "samples": len(samples), "bytes": len(whole), "xxh3": digest})
    every = [sample for shard in shards for sample in shard]
    header = {
        "name": "test",
        "seed": 0,
        "options": {},
        "plan_id": "test",
        "class_names": list(class_names),
        "num_samples": len(every),
        "num_planned": len(every) if sample_ids is None else max(sample_ids) + 1,
        "num_rejected": 0,
        "max_height": max(s.height for s in every),
        "max_width": max(s.width for s in every),
        "max_sample_bytes": max(len(s.jpeg) for s in every),
    }
    write_catalog(root, header=header, shards=pa.Table.from_pylist(rows))
    return Catalog.load(root)


@pytest.fixture(scope="session")
def catalog(tmp_path_factory: pytest.TempPathFactory) -> Catalog:
    """41 samples in shards of 12, 10, 12 and 7, sizes of their own, three classes."""
    samples = [draw_sample(i, height=40 + i, width=70 - i, label=i % 3) for i in range(41)]
    shards = [samples[:12], samples[12:22], samples[22:34], samples[34:]]
    return write_shards(tmp_path_factory.mktemp("shards"), shards, class_names=("ant", "bee", "cat"))


@pytest.fixture
def make_shards(tmp_path: Path) -> Callable[..., Catalog]:
    return lambda shards, **options: write_shards(tmp_path / "shards", shards, **options)


@pytest.fixture(scope="session")
def make_sample() -> Callable[..., Sample]:
    return draw_sample
