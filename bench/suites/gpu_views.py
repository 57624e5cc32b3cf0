"""Two views on a GPU against Pillow in a DataLoader on all cores; and the sweep over what DALI can be told.

A function of the device: at the tiny size it runs on a CPU, which proves all but what CUDA does.
"""

import contextlib
import dataclasses
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from linerate.bench.contest import Bar, Ceiling, Contest, Setting, missing_record, timed_record
from linerate.bench.machine import BAR_GPU, is_bar_gpu, noise, probe
from linerate.bench.record import Record
from linerate.bench.suites.view_backends import require_all_alike
from linerate.bench.suites.view_parts import decoder_of, only_crops, parts_of
from linerate.bench.suites.view_work import (
    SEED,
    Steady,
    Work,
    epochs,
    make_work,
    missing_backend,
    opened_views,
)
from linerate.bench.timing import MIN_ROUNDS, Seconds, Side, interleave, measure
from linerate.pipeline.cores import usable_cores
from linerate.pipeline.loader import open_views
from linerate.pipeline.pillow_recipe import PillowView, decode
from linerate.pipeline.recipe import ViewRecipe, find_recipe
from linerate.pipeline.torch_views import worker_context

HW_DECODER_LOADS = (0.65, 0.8, 0.9, 1.0, 0.5, 0.0)


@dataclass(frozen=True)
class PillowFiles(Dataset[tuple[Tensor, Tensor]]):
    """A file -> its two views (3, S, S) uint8, by torchvision's own random numbers, as lightly's dataset."""

    files: tuple[Path, ...]
    recipe: ViewRecipe

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, place: int) -> tuple[Tensor, Tensor]:
        image = decode(np.fromfile(self.files[place], dtype=np.uint8))
        query, key = (PillowView(self.recipe.view(v), size=self.recipe.size).random(image) for v in (0, 1))
        return query, key


def pillow_batch(work: Work) -> int:
    """Images in a batch of the DataLoader's."""
    return min(32, work.batch)


def pillow_batches(work: Work) -> Iterator[tuple[Tensor, Tensor]]:
    """A round's batches by a DataLoader with a worker on every core, on the device."""
    num = (work.num_warm + work.num_timed) * work.batch
    # Small ones, so that each worker makes several between the first and the last of a round.
    files = tuple(itertools.islice(itertools.cycle(work.images.files), num))
    num_workers = work.num_threads if work.num_threads > 1 else 0
    loader = DataLoader(
        PillowFiles(files, work.recipe),
        batch_size=pillow_batch(work),
        num_workers=num_workers,
        multiprocessing_context=worker_context() if num_workers else None,
        pin_memory=work.device == "cuda",
    )
    for query, key in loader:
        yield query.to(work.device, non_blocking=True), key.to(work.device, non_blocking=True)


def bench_views_on_gpu(setting: Setting) -> Iterator[Record]:
    """DALI with the GPU's decoder against Pillow on all cores, and how its time divides."""
    full_size = setting.size == "full"
    recipe = find_recipe("v2", size=setting.pick(tiny=16, quick=224, full=224))
    work = make_work(setting, recipe, num_threads=usable_cores(), backends=(), num_warm=4, num_timed=24)
    bare = dataclasses.replace(work, recipe=only_crops(recipe))
    lacking = missing_backend("dali")
    pillow_warm = work.num_warm * work.batch // pillow_batch(work)
    sides = {"theirs": Steady(lambda: pillow_batches(work), num_warm=pillow_warm).side}
    with contextlib.ExitStack() as opened:
        equal = None
        if lacking is None:
            loader = opened.enter_context(opened_views(work, "dali"))
            truth = opened.enter_context(opened_views(work, "torch"))
            equal = require_all_alike({"dali": loader, "torch": truth}, work)["dali"]
            cropping = epochs(opened.enter_context(opened_views(bare, "dali")), work)
            sides |= {
                "dali": Steady(epochs(loader, work), num_warm=work.num_warm).side,
                "dali crops": Steady(cropping, num_warm=work.num_warm).side,
                "dali decodes": Steady(decoder_of("dali", work), num_warm=0).side,
            }
        before = probe()
        times = interleave(sides, rounds=setting.rounds, min_round_s=0.0)
        unrest = noise(before, probe())
    about: dict[str, Any] = {"unit": "pairs/s", "amount": work.amount, "work": f"--backend dali: {work}"}
    against = Contest(
        peer="Pillow + torchvision v2, DataLoader on all cores",
        ours=Side(run=lambda: None),
        bar=Bar(5.0, full_size=full_size and setting.device == "cuda"),
        ceiling=Ceiling(name="its decoder alone", side=Side(run=lambda: None)),
        **about,
    )
    if lacking is not None:
        yield missing_record("views", against, missing=lacking)
        pillow = dataclasses.replace(
            against,
            peer=None,
            bar=None,
            ceiling=None,
            no_ceiling="its decoder alone is not timed",
            work=f"Pillow in a DataLoader: {work}",
        )
        yield timed_record("views", pillow, times={"ours": times["theirs"]}, noise=unrest, suite="")
        return
    ours = {"ours": times["dali"], "ceiling": times["dali decodes"]}
    found = timed_record("views", against, times=ours | {"theirs": times["theirs"]}, noise=unrest, suite="")
    yield dataclasses.replace(found, equal=equal)
    bar = Bar(6000, of="ours", full_size=full_size and is_bar_gpu())
    alone = dataclasses.replace(against, peer=None, bar=bar, note=f"the bar is for an {BAR_GPU}")
    yield timed_record("views", alone, times=ours, noise=unrest, suite="")
    yield from parts_of("dali", work, times, unrest)


def bench_views_sweep(setting: Setting) -> Iterator[Record]:
    """A record for each cell of hw_decoder_load x threads x prefetch, most promising first; then the best."""
    if lacking := missing_backend("dali"):
        blank = Contest(peer=None, work="DALI", unit="pairs/s", amount=1, ours=Side(run=lambda: None))
        yield missing_record("views-sweep", blank, missing=lacking)
        return
    cores = usable_cores()
    recipe = find_recipe("v2", size=setting.pick(tiny=16, quick=224, full=224))
    work = make_work(setting, recipe, num_threads=cores, backends=(), num_warm=4, num_timed=12)
    few = setting.size == "tiny"
    threads = sorted({cores, math.ceil(cores / 2), math.ceil(cores / 4)}, reverse=True)
    cells = itertools.product(threads[: 1 if few else 3], (2, 4)[: 1 if few else 2], HW_DECODER_LOADS)
    best: Record | None = None
    for num_threads, prefetch, load in itertools.islice(cells, 2 if few else None):
        before = probe()
        seconds = _time_cell(work, num_threads=num_threads, prefetch=prefetch, hw_decoder_load=load)
        cell = f"--hw-decoder-load {load:g} --loader-threads {num_threads} --prefetch {prefetch}"
        contest = Contest(
            peer=None,
            work=f"{cell}: {work}",
            unit="pairs/s",
            amount=work.amount,
            ours=Side(run=lambda: None),
            no_ceiling="the cells are held against one another",
        )
        record = timed_record(
            "views-sweep", contest, times={"ours": seconds}, noise=noise(before, probe()), suite=""
        )
        yield record
        if best is None or (record.ours or 0) > (best.ours or 0):
            best = record
    if best is not None:
        yield dataclasses.replace(best, work=f"the best cell: {best.work}", note=best.work.partition(": ")[0])


def _time_cell(work: Work, *, num_threads: int, prefetch: int, hw_decoder_load: float) -> Seconds:
    loader = open_views(
        work.catalog,
        recipe=work.recipe,
        device=work.device,
        seed=SEED,
        global_batch=work.batch,
        num_lanes=min(2, work.batch),
        num_threads=num_threads,
        prefetch=prefetch,
        hw_decoder_load=hw_decoder_load,
    )
    try:
        steady = Steady(epochs(loader, work), num_warm=work.num_warm)
        return measure(steady.side, rounds=MIN_ROUNDS, min_round_s=0.0)
    finally:
        loader.close()
