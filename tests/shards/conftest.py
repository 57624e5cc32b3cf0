"""Small image folders, made on the spot."""

import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tests.shards.servers import s3_environment, serve_s3

from linerate.shards import bucket as bucket_module
from linerate.shards.catalog import Catalog
from linerate.shards.options import PackOptions
from linerate.shards.pack import pack


def _jpeg(seed: int, height: int = 20, width: int = 30, mode: str = "RGB", **save: object) -> bytes:
    channels = {"RGB": 3, "CMYK": 4, "L": 1}[mode]
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 5, channels), dtype=np.uint8)
    image = Image.fromarray(coarse.squeeze(), mode) if mode == "CMYK" else Image.fromarray(coarse.squeeze())
    out = io.BytesIO()
    image.resize((width, height)).save(out, "JPEG", **save)
    return out.getvalue()


@pytest.fixture(scope="session")
def make_jpeg() -> Callable[..., bytes]:
    """(seed, height, width, mode, **Pillow's options) -> a JPEG with smooth random content."""
    return _jpeg


@pytest.fixture(scope="session")
def photo_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 JPEGs in 4 class folders; the same stems occur in every class."""
    root = tmp_path_factory.mktemp("photos")
    for number, name in enumerate(("ant", "bee", "cat", "dog")):
        (root / name).mkdir()
        for i in range(10):
            (root / name / f"{i:04d}.jpg").write_bytes(_jpeg(100 * number + i, 16 + i, 40 - i))
    return root


@pytest.fixture(scope="session")
def packed(photo_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Catalog:
    """photo_folder in 5 shards; read only."""
    out = tmp_path_factory.mktemp("packed") / "out"
    return pack(photo_folder, out, options=PackOptions(seed=7, shard_samples=8), num_workers=0)


@pytest.fixture(scope="session")
def read_all() -> Callable[[Path], dict[str, bytes]]:
    """Every file of a folder by name, to compare two folders; but not how long packing took."""

    def read(folder: Path) -> dict[str, bytes]:
        files = (path for path in sorted(folder.rglob("*")) if path.is_file())
        return {path.name: path.read_bytes() for path in files if path.name != "pack_stats.parquet"}

    return read


@pytest.fixture(scope="session")
def s3_endpoint() -> Iterator[str]:
    """Of one S3 server for all tests."""
    pytest.importorskip("s3fs")
    pytest.importorskip("moto.server")
    with serve_s3() as running:
        yield running


@pytest.fixture
def store(s3_endpoint: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The bucket `shards` of a real S3 server on loopback, empty."""
    s3fs = pytest.importorskip("s3fs")
    for name, value in s3_environment(s3_endpoint).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(bucket_module, "BACKOFF_S", 0.01)
    s3fs.S3FileSystem.clear_instance_cache()
    made = s3fs.S3FileSystem(use_listings_cache=False)
    if not made.exists("shards"):
        made.mkdir("shards")
    yield made
    if left := made.find("shards"):
        made.rm(left)
    s3fs.S3FileSystem.clear_instance_cache()


@pytest.fixture(scope="session")
def data_folder() -> Path:
    """The real images beside the repository; skips where they are absent."""
    path = Path(__file__).parents[3] / "shared" / "data"
    if not path.is_dir():
        pytest.skip("the real images of ../shared/data are absent")
    return path
