"""Shards to make views of, loaders over them, and streams that leave nothing half made."""

import contextlib
import importlib.util
import itertools
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from linerate.bench.contest import Setting
from linerate.bench.images import ImageFolder, load_images
from linerate.bench.timing import Side
from linerate.pipeline.loader import ViewLoader, open_views
from linerate.pipeline.recipe import ViewRecipe
from linerate.pipeline.two_views import TwoViews
from linerate.shards.catalog import Catalog
from linerate.shards.pack import pack

SEED = 0
NAME = "views"
_MISSING = {
    "dali": ("nvidia.dali", "pip install nvidia-dali-cuda130"),
    "webdataset": ("webdataset", "pip install webdataset"),
    "ffcv": ("ffcv", "apt-get install libturbojpeg0-dev libopencv-dev pkg-config g++, then make ffcv"),
}


@dataclass(frozen=True, kw_only=True)
class Work:
    """Shards, and how their views are made."""

    catalog: Catalog
    images: ImageFolder
    recipe: ViewRecipe
    batch: int
    """N"""
    num_threads: int
    device: str
    num_warm: int
    """batches before the clock starts: what all workers and queues hold at once, and one"""
    num_timed: int

    @property
    def amount(self) -> int:
        """Pairs that the clock sees in one round."""
        return self.num_timed * self.batch

    def __str__(self) -> str:
        recipe, kb = self.recipe, self.images.mean_kb
        where = "one core" if self.num_threads == 1 else f"{self.num_threads} cores"
        if self.device != "cpu":
            where += " and the GPU"
        return (
            f"JPEGs of {kb} KB in shards -> two {recipe.size} px {recipe.name} views, batches of "
            f"{self.batch}, {where}"
        )


class Steady:
    """A stream whose start and first batches happen outside the clock, which sees the rest of it, to its end.

    So a contestant has nothing half made when another one's turn comes.
    """

    def __init__(self, make: Callable[[], Iterator[Any]], *, num_warm: int) -> None:
        self._make, self._num_warm = make, num_warm
        self._stream: Iterator[Any] = iter(())

    def prepare(self) -> None:
        """Start anew and take the first batches."""
        self._stream = self._make()
        for _ in itertools.islice(self._stream, self._num_warm):
            pass

    def run(self) -> None:
        """Take all that is left."""
        for _ in self._stream:
            pass

    @property
    def side(self) -> Side:
        return Side(run=self.run, prepare=self.prepare)


def missing_backend(name: str) -> str | None:
    """None where the backend can run, else a line that names what is missing and how to bring it."""
    module, remedy = _MISSING.get(name, ("torchvision", "pip install torchvision"))
    with contextlib.suppress(ModuleNotFoundError):
        if importlib.util.find_spec(module) is not None:
            return None
    return f"{module} is not installed; bring it with: {remedy}"


def make_work(
    setting: Setting,
    recipe: ViewRecipe,
    *,
    num_threads: int,
    backends: Sequence[str],
    num_warm: int | None = None,
    num_timed: int | None = None,
) -> Work:
    """Shards in the scratch folder that hold an epoch of warm-up and measurement.

    num_warm, num_timed: None takes what DataLoaders of that many workers need.
    """
    batch = setting.pick(tiny=2, quick=16, full=32 if setting.device == "cpu" else 128)
    if num_warm is None or num_timed is None:
        # Two batches of a DataLoader's worker are on their way at once.
        num_warm = 2 * num_threads + 1
        num_timed = max(4, setting.pick(tiny=2, quick=2, full=4) * num_threads)
    num_images = (num_warm + num_timed + 1) * batch
    images = load_images(
        setting.images,
        num_images=min(num_images, setting.pick(tiny=8, quick=64, full=512)),
        num_bytes=5_000 if setting.size == "tiny" else None,
    )
    source = setting.scratch / "backends-images"
    repeat_images(images, source, num_images=num_images)
    catalog = pack(source, setting.scratch / "backends-shards", num_workers=0)
    shutil.rmtree(source)
    if "ffcv" in backends and missing_backend("ffcv") is None:
        from linerate.pipeline.ffcv_views import beton_path
        from linerate.shards.beton import write_beton

        write_beton(catalog, beton_path(catalog))
    return Work(
        catalog=catalog,
        images=images,
        recipe=recipe,
        batch=batch,
        num_threads=num_threads,
        device=setting.device,
        num_warm=num_warm,
        num_timed=num_timed,
    )


def repeat_images(images: ImageFolder, folder: Path, *, num_images: int) -> None:
    """num_images files made of the images at hand, each as often as it takes."""
    folder.mkdir()
    for nth, path in zip(range(num_images), itertools.cycle(images.files), strict=False):
        shutil.copyfile(path, folder / f"{nth:06d}.jpg")


@contextlib.contextmanager
def opened_views(work: Work, name: str) -> Iterator[ViewLoader]:
    in_processes = name in ("torch", "webdataset") and work.num_threads > 1
    loader = open_views(
        work.catalog,
        recipe=work.recipe,
        backend=name,
        device=work.device,
        seed=SEED,
        global_batch=work.batch,
        num_lanes=min(2, work.batch),
        num_threads=work.num_threads,
        prefetch=2 * work.num_threads if in_processes else 2,
    )
    try:
        yield loader
    finally:
        loader.close()


def epochs(loader: ViewLoader, work: Work) -> Callable[[], Iterator[TwoViews]]:
    """A function that starts the next epoch, cut to what a round takes."""
    numbers = itertools.count()
    return lambda: itertools.islice(loader.epoch(next(numbers)), work.num_warm + work.num_timed)
