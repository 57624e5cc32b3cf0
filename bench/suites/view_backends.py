"""Two views by every backend from the same shards, round by round: per core, for the machine, and by part.

`dali` and `torch` get the same draws and must make the same views; `webdataset` and `ffcv` keep their order
and random numbers, so of them only what a batch holds is compared. Legend: N images in a batch.
"""

import contextlib
import dataclasses
import itertools
from collections.abc import Iterator, Sequence

import torch

from linerate.bench.contest import Bar, Ceiling, Contest, Disagreement, Setting, missing_record, timed_record
from linerate.bench.machine import noise, probe
from linerate.bench.record import Record
from linerate.bench.suites.view_parts import decoder_of, only_crops, parts_of
from linerate.bench.suites.view_work import (
    NAME,
    Steady,
    Work,
    epochs,
    make_work,
    missing_backend,
    opened_views,
)
from linerate.bench.timing import Side, interleave, one_core
from linerate.pipeline.cores import usable_cores
from linerate.pipeline.loader import ViewLoader
from linerate.pipeline.recipe import find_recipe
from linerate.pipeline.two_views import TwoViews

REFERENCE = "torch"
# How far views by the same draws may lie apart, grey levels in the mean; see pipeline/parity.py.
MAX_MEAN_DIFFERENCE = 0.5


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
        contest = _contest(name, work, sides.get(name), full_size=full_size, decodes=by_part)
        if name in lacking:
            yield missing_record(NAME, contest, missing=lacking[name])
            continue
        shared = {"ours": times[name]} | ({"theirs": times[REFERENCE]} if name != REFERENCE else {})
        if by_part:
            shared |= {"ceiling": times[f"{name} decodes"]}
        record = timed_record(NAME, contest, times=shared, noise=unrest, suite="")
        yield dataclasses.replace(record, equal=same.get(name))
        if by_part:
            yield from parts_of(name, work, times, unrest)


def _contest(name: str, work: Work, steady: Steady | None, *, full_size: bool, decodes: bool) -> Contest:
    """decodes: its decoder was timed alone."""
    side = steady.side if steady else Side(run=lambda: None)
    bar = Bar(1.3, full_size=full_size) if name == "dali" and work.device == "cpu" else None
    return Contest(
        peer=None if name == REFERENCE else REFERENCE,
        work=f"--backend {name}: {work}",
        unit="pairs/s",
        amount=work.amount,
        ours=side,
        bar=bar,
        ceiling=Ceiling(name="its decoder alone", side=side) if decodes else None,
        no_ceiling=None if decodes else "its decoder alone is timed on one core",
    )


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
