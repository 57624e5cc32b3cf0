from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tests.train.rank_server import RankServer, rank_server

from linerate.shards.catalog import Catalog
from linerate.shards.pack import pack

# Two threads on these sizes are slower than one, and would make sums differ between machines.
torch.set_num_threads(1)

CLASSES = ("flat", "lines", "noise")


def draw_images(root: Path, *, per_class: int, seed: int = 0, labelled: bool = True) -> Path:
    """JPEGs of 24x24 in three classes that pixels alone tell apart: flat, striped, noisy."""
    generator = np.random.default_rng(seed)
    for name in CLASSES:
        folder = root / name if labelled else root
        folder.mkdir(parents=True, exist_ok=True)
        for nth in range(per_class):
            pixels = np.full((24, 24, 3), generator.integers(60, 190, 3), dtype=np.uint8)
            if name == "lines":
                pixels[:, nth % 4 :: 4] = 255
            if name == "noise":
                pixels = generator.integers(0, 256, (24, 24, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"{name}{nth:03}.jpg", quality=90)
    return root


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Catalog:
    """72 labelled images."""
    root = tmp_path_factory.mktemp("labelled")
    return pack(draw_images(root / "images", per_class=24), root / "shards", num_workers=0)


@pytest.fixture(scope="session")
def test_shards(tmp_path_factory: pytest.TempPathFactory) -> Catalog:
    """30 other images of the same classes."""
    root = tmp_path_factory.mktemp("test")
    return pack(draw_images(root / "images", per_class=10, seed=1), root / "shards", num_workers=0)


@pytest.fixture(scope="session")
def unlabelled_shards(tmp_path_factory: pytest.TempPathFactory) -> Catalog:
    """24 images without classes."""
    root = tmp_path_factory.mktemp("unlabelled")
    images = draw_images(root / "images", per_class=8, labelled=False)
    return pack(images, root / "shards", num_workers=0)


@pytest.fixture(scope="session")
def ranks() -> Iterator[RankServer]:
    """Starts runs on many ranks."""
    with rank_server() as server:
        yield server
