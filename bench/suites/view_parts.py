"""How the time of a backend's views divides: decoding, crops, and what comes after."""

import dataclasses
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from linerate.bench.contest import Contest, timed_record
from linerate.bench.record import Record
from linerate.bench.suites.view_work import NAME, Work
from linerate.bench.timing import Seconds, Side
from linerate.pipeline.encoded import EncodedBatch
from linerate.pipeline.recipe import ViewRecipe


def parts_of(name: str, work: Work, times: dict[str, Seconds], unrest: dict[str, Any]) -> Iterator[Record]:
    """The backend's decoding, its crops and the rest of its time as records; shares of the whole."""
    whole, cropping, decoding = times[name], times[f"{name} crops"], times[f"{name} decodes"]
    # A part that the noise leaves nothing of is given a thousandth of the whole.
    least = 1e-3 * whole
    parts = {
        "decode alone": decoding,
        "crops alone (decode and crops, less decode)": np.maximum(cropping - decoding, least),
        "flip, colours and blur (all, less decode and crops)": np.maximum(whole - cropping, least),
    }
    for part, seconds in parts.items():
        contest = Contest(
            peer=f"all of {name}'s time",
            work=f"{part}, --backend {name}: {work}",
            unit="pairs/s",
            amount=work.amount,
            ours=Side(run=lambda: None),
            no_ceiling="a part of the views' time",
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
