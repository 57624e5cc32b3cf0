"""Two augmented views per image on one core, from JPEG bytes in memory, against Pillow + torchvision v2."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch

from linerate.bench.contest import Bar, Ceiling, Contest, Disagreement, Setting
from linerate.bench.images import ImageFolder, load_images
from linerate.bench.record import Record
from linerate.bench.suites.gpu_views import bench_views_on_gpu
from linerate.bench.suites.pillow_views import PillowViews
from linerate.bench.suites.view_backends import bench_backends
from linerate.bench.timing import Side, one_core
from linerate.pipeline.draws import draw_views
from linerate.pipeline.encoded import EncodedBatch
from linerate.pipeline.loader import open_backend
from linerate.pipeline.recipe import ViewRecipe, find_recipe
from linerate.pipeline.two_views import TwoViews

SEED = 0
# Mean grey levels between our views and Pillow's by the same draws. Pillow rounds hue to 8 bits and blurs by
# repeated boxes; leaving out any one operation moves views by more than this (see the tests).
MAX_MEAN_DIFFERENCE = 1.5


@dataclass(frozen=True)
class Work:
    """Encoded images in batches, and how large the views are."""

    recipe: ViewRecipe
    batches: list[EncodedBatch]
    mean_kb: int

    @property
    def num_images(self) -> int:
        return sum(len(batch.jpegs) for batch in self.batches)

    def __str__(self) -> str:
        recipe, batch = self.recipe, len(self.batches[0].jpegs)
        return (
            f"{self.num_images} JPEGs of {self.mean_kb} KB in memory -> two {recipe.size} px {recipe.name} "
            f"views, batches of {batch}, one core"
        )


def bench_views(setting: Setting) -> Iterator[Contest | Record]:
    """Recipes v2 and v1 against what lightly does with them; or the backends that were asked for."""
    if setting.backends:
        yield from bench_backends(setting, setting.backends)
        return
    if setting.for_gpu:
        yield from bench_views_on_gpu(setting)
        return
    full_size = setting.size == "full"
    for name in setting.pick(tiny=("v2",), quick=("v2",), full=("v2", "v1")):
        with one_core():
            work = load_work(setting, recipe=name)
            ours = OurViews(work)
            yield Contest(
                peer="Pillow + torchvision v2",
                work=str(work),
                unit="pairs/s",
                amount=work.num_images,
                ours=Side(run=ours.run_epoch),
                theirs=Side(run=PillowViews(work.recipe, work.batches).run_epoch),
                agree=partial(require_same_views, ours, work),
                bar=Bar(1.3, full_size=full_size),
                ceiling=Ceiling(name="decode once", side=Side(run=partial(decode_only, work))),
            )
            ours.close()


def bench_draws(setting: Setting) -> Iterator[Contest]:
    """Drawing the parameters of both views, as a share of the time that the views take."""
    with one_core():
        work = load_work(setting, recipe="v2")
        ours = OurViews(work)
        yield Contest(
            peer="the whole of `views`",
            work=f"draws of {work}",
            unit="pairs/s",
            amount=work.num_images,
            ours=Side(run=lambda: draw_only(work)),
            theirs=Side(run=ours.run_epoch),
            # A share of 5 % is a twentieth of the time.
            bar=Bar(20.0, full_size=setting.size == "full"),
            no_ceiling="what counts is its share of `views`",
            note="the ratio is the time of `views` over that of its draws: 20 is a share of 5 %",
        )
        ours.close()


class OurViews:
    """The DALI backend over batches in memory, epoch by epoch."""

    def __init__(self, work: Work, *, backend: str = "dali", num_threads: int = 1) -> None:
        self._work = work
        self._backend = open_backend(
            backend,
            recipe=work.recipe,
            seed=SEED,
            batch=len(work.batches[0].jpegs),
            num_threads=num_threads,
        )

    def epoch(self) -> Iterator[TwoViews]:
        """The views of every batch. A whole epoch leaves nothing half made for the next clock to find."""
        batches = self._work.batches
        yield from self._backend.run(batches.__getitem__, range(len(batches)), epoch=0)

    def run_epoch(self) -> None:
        for _ in self.epoch():
            pass

    def close(self) -> None:
        self._backend.close()


def require_same_views(ours: OurViews, work: Work) -> str:
    """What was found equal. Raises Disagreement where ours, by the same draws, are not the peer's views."""
    peer = PillowViews(work.recipe, work.batches)
    largest = 0.0
    for batch, views in zip(work.batches, ours.epoch(), strict=True):
        for view, pixels in enumerate((views.query, views.key)):
            draws = draw_batch(work.recipe, batch, view=view)
            theirs = peer.given(batch, draws)
            if pixels.shape != theirs.shape or pixels.dtype != torch.uint8:
                raise Disagreement(
                    f"ours are {tuple(pixels.shape)} {pixels.dtype}, theirs {tuple(theirs.shape)}"
                )
            apart = (pixels.float() - theirs.float()).abs().mean().item()
            largest = max(largest, apart)
            if apart > MAX_MEAN_DIFFERENCE:
                raise Disagreement(
                    f"view {view} by the same draws is {apart:.2f} grey levels from the peer's in the mean, "
                    f"{MAX_MEAN_DIFFERENCE:g} are allowed"
                )
    return f"views by the same draws, to {largest:.2f} grey levels in the mean"


def load_work(setting: Setting, *, recipe: str) -> Work:
    """Batches of the benchmark images in memory."""
    num_images, batch, size = setting.pick(tiny=(4, 2, 32), quick=(32, 16, 224), full=(128, 32, 224))
    images = load_images(setting.images, num_images=num_images)
    return Work(find_recipe(recipe, size=size), encoded_batches(images, batch), images.mean_kb)


def encoded_batches(images: ImageFolder, size: int) -> list[EncodedBatch]:
    """The files' bytes as a reader would hand them over; whole batches only, unless there is just a part."""
    import simplejpeg

    def one(start: int, paths: tuple[Path, ...]) -> EncodedBatch:
        jpegs = [np.frombuffer(path.read_bytes(), dtype=np.uint8) for path in paths]
        sides = [simplejpeg.decode_jpeg_header(jpeg, strict=False)[:2] for jpeg in jpegs]
        place = np.arange(start, start + len(paths), dtype=np.int64)
        return EncodedBatch(
            jpegs=jpegs,
            sample_id=place,
            position=place,
            label=np.asarray(images.labels[start : start + len(paths)], dtype=np.int64),
            height=np.array([height for height, _ in sides], dtype=np.int64),
            width=np.array([width for _, width in sides], dtype=np.int64),
        )

    files = images.files[: max(len(images.files) // size, 1) * size]
    return [one(start, files[start : start + size]) for start in range(0, len(files), size)]


def draw_batch(recipe: ViewRecipe, batch: EncodedBatch, *, view: int) -> np.ndarray:
    """(N, P) float32: our draws for one view of a batch in epoch 0."""
    return draw_views(
        recipe,
        seed=SEED,
        epoch=0,
        sample_id=batch.sample_id,
        height=batch.height,
        width=batch.width,
        view=view,
    ).array


def draw_only(work: Work) -> None:
    """Draw both views of every batch."""
    for batch in work.batches:
        for view in (0, 1):
            draw_batch(work.recipe, batch, view=view)


def decode_only(work: Work) -> None:
    """Decode every image once, by libjpeg-turbo."""
    import simplejpeg

    for batch in work.batches:
        for jpeg in batch.jpegs:
            simplejpeg.decode_jpeg(jpeg)
