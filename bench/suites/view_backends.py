"""Two views by every backend from the same shards, round by round: per core, for the machine, and by part.

`dali` and `torch` get the same draws and must make the same views; `webdataset` and `ffcv` keep their order
and random numbers, so of them only what a batch holds is compared. Legend: N images in a batch.
"""

import contextlib
import dataclasses
import importlib.util
import itertools
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from linerate.bench.contest import Bar, Contest, Disagreement, Setting, missing_record, timed_record
from linerate.bench.images import ImageFolder, load_images
from linerate.bench.machine import noise, probe
from linerate.bench.record import Record
from linerate.bench.timing import Seconds, Side, interleave, one_core
from linerate.pipeline.cores import usable_cores
from linerate.pipeline.encoded import EncodedBatch
from linerate.pipeline.loader import ViewLoader, open_views
from linerate.pipeline.recipe import ViewRecipe, find_recipe
from linerate.pipeline.two_views import TwoViews
from linerate.shards.catalog import Catalog
from linerate.shards.pack import pack

SEED = 0
NAME = "views"
REFERENCE = "torch"
# How far views by the same draws may lie apart, grey levels in the mean; see pipeline/parity.py.
MAX_MEAN_DIFFERENCE = 0.5
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


def bench_backends(setting: Setting, backends: Sequence[str]) -> Iterator[Record]:
    """Each backend against `torch`, with one core pinned and with all of them."""
    size = setting.pick(tiny=16, quick=224, full=224)
    recipe = find_recipe(setting.recipe or "v2", size=size)
    names = list(dict.fromkeys([REFERENCE, *backends]))
    machine_work = make_work(setting, recipe, num_threads=usable_cores(), backends=names)
    alone = dataclasses.replace(machine_work, num_threads=1, num_warm=3, num_timed=4, device="cpu")
    if setting.device == "cpu":
        with one_core():
            yield from _compare(alone, names, setting, by_part=True)
    # ffcv keeps the number of its threads for the life of a process.
    yield from _compare(machine_work, names, setting, by_part=setting.device != "cpu")


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


def repeat_images(images: ImageFolder, folder: Any, *, num_images: int) -> None:
    """num_images files made of the images at hand, each as often as it takes."""
    folder.mkdir()
    for nth, path in zip(range(num_images), itertools.cycle(images.files), strict=False):
        shutil.copyfile(path, folder / f"{nth:06d}.jpg")


def _compare(work: Work, names: list[str], setting: Setting, *, by_part: bool) -> Iterator[Record]:
    """A record for each backend, and with by_part how its time divides."""
    lacking = {name: line for name in names if (line := missing_backend(name))}
    present = [name for name in names if name not in lacking]
    with contextlib.ExitStack() as opened:
        loaders = {name: opened.enter_context(opened_views(work, name)) for name in present}
        same = require_all_alike(loaders, work)
        sides = {
            name: Steady(epochs(loader, work), num_warm=work.num_warm) for name, loader in loaders.items()
        }
        if by_part:
            bare = dataclasses.replace(work, recipe=only_crops(work.recipe))
            for name in present:
                cropping = epochs(opened.enter_context(opened_views(bare, name)), work)
                sides[f"{name} crops"] = Steady(cropping, num_warm=work.num_warm)
                sides[f"{name} decodes"] = Steady(decoder_of(name, work), num_warm=0)
        before = probe()
        times = interleave(
            {name: steady.side for name, steady in sides.items()},
            rounds=setting.rounds,
            warmup=1,
            min_round_s=0.0,
        )
        unrest = noise(before, probe())
    full_size = setting.size == "full"
    for name in names:
        contest = _contest(name, work, sides.get(name), full_size=full_size)
        if name in lacking:
            yield missing_record(NAME, contest, missing=lacking[name])
            continue
        shared = {"ours": times[name]} | ({"theirs": times[REFERENCE]} if name != REFERENCE else {})
        record = timed_record(NAME, contest, times=shared, noise=unrest, suite="")
        yield dataclasses.replace(record, equal=same.get(name))
        if by_part:
            yield from parts_of(name, work, times, unrest)


def _contest(name: str, work: Work, steady: Steady | None, *, full_size: bool) -> Contest:
    bar = Bar(1.3, full_size=full_size) if name == "dali" and work.device == "cpu" else None
    return Contest(
        peer=None if name == REFERENCE else f"{name}, against {REFERENCE}",
        work=f"--backend {name}: {work}",
        unit="pairs/s",
        amount=work.amount,
        ours=steady.side if steady else Side(run=lambda: None),
        bar=bar,
    )


def parts_of(name: str, work: Work, times: dict[str, Seconds], unrest: dict[str, Any]) -> Iterator[Record]:
    """The backend's decoding, its crops and the rest of its time as records; shares of the whole."""
    whole, cropping, decoding = times[name], times[f"{name} crops"], times[f"{name} decodes"]
    # A part that the noise leaves nothing of is given a thousandth of the whole.
    least = 1e-3 * whole
    parts = {
        ("decode", "decode alone"): decoding,
        ("crops", "crops alone (decode and crops, less decode)"): np.maximum(cropping - decoding, least),
        ("colours", "flip, colours and blur (all, less decode and crops)"): np.maximum(
            whole - cropping, least
        ),
    }
    for (short, part), seconds in parts.items():
        contest = Contest(
            peer=f"{name}'s {short}, against all of it",
            work=f"{part}, --backend {name}: {work}",
            unit="pairs/s",
            amount=work.amount,
            ours=Side(run=lambda: None),
            note=f"{100 * float(np.median(seconds / whole)):.0f} % of the time of the views",
        )
        yield timed_record(NAME, contest, times={"ours": seconds, "theirs": whole}, noise=unrest, suite="")


def only_crops(recipe: ViewRecipe) -> ViewRecipe:
    """The recipe with nothing after the crop."""

    def bare(one: Any) -> Any:
        return dataclasses.replace(
            one,
            jitter_probability=0.0,
            gray_probability=0.0,
            blur_probability=0.0,
            solarize_probability=0.0,
            flip_probability=0.0,
        )

    return dataclasses.replace(recipe, query=bare(recipe.query), key=bare(recipe.key))


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


def decoder_of(name: str, work: Work) -> Callable[[], Iterator[Any]]:
    """A function that decodes as many images as a round times, by the backend's own decoder."""
    from linerate.bench.suites.views import encoded_batches

    files = tuple(itertools.islice(itertools.cycle(work.images.files), work.amount))
    labels = tuple(itertools.islice(itertools.cycle(work.images.labels), work.amount))
    batches = encoded_batches(dataclasses.replace(work.images, files=files, labels=labels), work.batch)
    if name == "dali":
        from linerate.pipeline.dali_views import decoded

        return lambda: decoded(
            (batch.jpegs for batch in batches),
            batch=work.batch,
            device=work.device,
            num_threads=work.num_threads,
        )
    decode = {"torch": _decode_by_torch, "webdataset": _decode_by_pillow, "ffcv": _decode_by_ffcv}[name]
    return lambda: map(decode, batches)


def _decode_by_torch(batch: EncodedBatch) -> None:
    from linerate.pipeline.torch_views import decode_all

    decode_all(batch)


def _decode_by_pillow(batch: EncodedBatch) -> None:
    from linerate.pipeline.pillow_recipe import decode

    for jpeg in batch.jpegs:
        decode(jpeg)


def _decode_by_ffcv(batch: EncodedBatch) -> None:
    """Twice: its loader decodes an image for each of the two views."""
    from linerate.pipeline.ffcv_views import decode_by_ffcv

    for jpeg, height, width in zip(batch.jpegs, batch.height, batch.width, strict=True):
        for _ in range(2):
            decode_by_ffcv(jpeg, height=int(height), width=int(width))


def require_all_alike(loaders: dict[str, ViewLoader], work: Work) -> dict[str, str]:
    """What was found equal to `torch`'s first batches, for each backend. Raises Disagreement."""
    first = {}
    for name, loader in loaders.items():
        with contextlib.closing(loader.epoch(0)) as views:
            first[name] = list(itertools.islice(views, 2))
    return {
        name: require_alike(name, found, first[REFERENCE], work)
        for name, found in first.items()
        if name != REFERENCE
    }


def require_alike(name: str, ours: list[TwoViews], truth: list[TwoViews], work: Work) -> str:
    """What was found equal. Raises Disagreement where a batch holds something else than the reference's."""
    shape = (work.batch, 3, work.recipe.size, work.recipe.size)
    largest = 0.0
    for mine, theirs in zip(ours, truth, strict=True):
        for pixels in (mine.query, mine.key):
            if (tuple(pixels.shape), pixels.dtype) != (shape, torch.uint8):
                raise Disagreement(
                    f"{name}: views are {tuple(pixels.shape)} {pixels.dtype}, not {shape} uint8"
                )
        if len(set(mine.sample_id.tolist())) != work.batch:
            raise Disagreement(f"{name}: a batch holds a sample twice")
        if name != "dali":
            continue
        if not torch.equal(mine.sample_id, theirs.sample_id):
            raise Disagreement(f"{name}: other samples than {REFERENCE}'s")
        for one, other in ((mine.query, theirs.query), (mine.key, theirs.key)):
            apart = (one.cpu().float() - other.cpu().float()).abs().mean().item()
            largest = max(largest, apart)
            if apart > MAX_MEAN_DIFFERENCE:
                raise Disagreement(
                    f"{name}: views by the same draws lie {apart:.2f} grey levels from {REFERENCE}'s in the "
                    f"mean, {MAX_MEAN_DIFFERENCE:g} are allowed"
                )
    if name != "dali":
        return "shape, type and number of the views; order and random numbers are its own"
    return f"samples, and views by the same draws, to {largest:.2f} grey levels in the mean"
