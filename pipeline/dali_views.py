# DALI exports by tricks that mypy does not follow.
# mypy: disable-error-code="attr-defined,call-overload,untyped-decorator,no-untyped-call"
"""Views by DALI, two or one: CPU operators and numba kernels, or the GPU's decoder and DALI's arithmetic."""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from linerate.pipeline.dali_damage import diagnose, rows_with_broken_header, undecodable
from linerate.pipeline.dali_graph import Form, decode_graph, graph_inputs, views_graph
from linerate.pipeline.draws import Draws, draw_views
from linerate.pipeline.encoded import EncodedBatch
from linerate.pipeline.evaluation_views import LabelledImages
from linerate.pipeline.recipe import CentreCrop, ImageRecipe, ViewRecipe
from linerate.pipeline.two_views import Origin, TwoViews
from linerate.pipeline.undecodable import UndecodableImages
from linerate.pipeline.view_memory import Pixels, ViewMemory, as_tensor, places

Fetch = Callable[[int], EncodedBatch]
Inputs = tuple[Any, ...]
"""N JPEGs and, for each view, what the graph wants of its draws; of kernels also where the views go."""


@dataclass(frozen=True)
class _Fed:
    """A batch on its way through the pipeline, with all that DALI reads or writes in place."""

    batch: EncodedBatch
    inputs: Inputs
    views: list[Pixels]
    """Where the kernels write; of another form none."""


_Way = deque[_Fed | UndecodableImages]
"""What was fed and has not come out; behind the last batch, why there are no more."""


class DaliPixels:
    """Views for any number of epochs from one DALI pipeline, which is built at the first.

    A batch is yours for as long as you hold it. On the CPU it is memory that is used again when you have let
    it go; on a GPU a copy on torch's current stream (two of 38 MB for 256 views: 0.05 ms), since memory
    given back to DALI while torch's kernels still wait would be overwritten under them.
    """

    own_order = False

    def __init__(
        self,
        *,
        recipe: ViewRecipe | ImageRecipe | CentreCrop,
        seed: int,
        batch: int,
        device: str,
        num_threads: int,
        prefetch: int,
        form: Form | None = None,
        hw_decoder_load: float = 0.65,
    ) -> None:
        """batch: the most samples that fetch returns. prefetch: batches in the making while one is used.

        form: None takes the kernels on the CPU and the operators on a GPU.
        """
        self._recipe, self._seed, self._batch = recipe, seed, batch
        self._device = torch.device(device)
        self._num_threads, self._prefetch = num_threads, max(1, prefetch)
        self._form: Form = form or default_form(self._device)
        self._hw_decoder_load = hw_decoder_load
        self._memory = ViewMemory(
            batch=batch, size=recipe.size, num_kept=recipe.num_views * (self._prefetch + 2)
        )
        self._idle: _Pipeline | None = None
        self._in_use: deque[tuple[Any, torch.cuda.Event]] = deque()

    def pixels(
        self, fetch: Fetch, steps: range, *, epoch: int
    ) -> Generator[tuple[list[Tensor], Origin], None, None]:
        """The views of fetch(step), each (N, 3, S, S) uint8, and their samples, for every step, in order.

        fetch is called from one background thread, up to 2 * prefetch steps ahead.
        Raises UndecodableImages; this object can be run again after that and after any other error.
        """
        if not steps:
            return
        fed: _Way = deque()
        pool = ThreadPoolExecutor(1, thread_name_prefix="fetch")
        # While it runs the pipeline belongs to this generator: another run builds one of its own.
        pipeline, self._idle = self._idle or self._new_pipeline(), None
        pipeline.start(self._feed(fetch, steps, epoch, pool, fed))
        try:
            for _ in steps:
                try:
                    made = pipeline.run(**self._stream())
                except RuntimeError as error:
                    batches = [one.batch for one in fed if isinstance(one, _Fed)]
                    raise diagnose(batches, error) from error
                except StopIteration:  # the feed ended early, and left the reason behind its last batch
                    refusal = fed.popleft()
                    assert isinstance(refusal, UndecodableImages)
                    raise refusal from None
                one = fed.popleft()
                assert isinstance(one, _Fed)
                yield self.to_device(one.views or made), origin_of(one.batch)
            self._idle = pipeline
        except GeneratorExit:
            if pipeline.drain():
                self._idle = pipeline
            raise
        except BaseException:
            # After an error it is not used again.
            pipeline.drain()
            raise
        finally:
            pool.shutdown(cancel_futures=True)

    def close(self) -> None:
        self._idle = None
        self._in_use.clear()
        self._memory.clear()

    def _new_pipeline(self) -> _Pipeline:
        return _Pipeline(
            num_views=self._recipe.num_views,
            size=self._recipe.size,
            device=self._device,
            form=self._form,
            hw_decoder_load=self._hw_decoder_load,
            batch=self._batch,
            num_threads=self._num_threads,
            prefetch=self._prefetch,
        )

    def _feed(
        self,
        fetch: Fetch,
        steps: range,
        epoch: int,
        pool: ThreadPoolExecutor,
        fed: _Way,
    ) -> Iterator[Inputs]:
        def prepare(step: int) -> tuple[EncodedBatch, Inputs | None]:
            batch = fetch(step)
            if rows_with_broken_header(batch):
                return batch, None
            return batch, (batch.jpegs, *self._view_inputs(batch, epoch=epoch))

        to_do = iter(steps)
        ahead = deque(pool.submit(prepare, step) for step in islice(to_do, self._prefetch))
        while ahead:
            batch, inputs = ahead.popleft().result()
            if inputs is None:
                rows = rows_with_broken_header(batch)
                fed.append(undecodable(batch, rows, "its header is not the one that was packed"))
                return
            ahead.extend(pool.submit(prepare, step) for step in islice(to_do, 1))
            views = self._lend_views(len(batch.jpegs))
            inputs = (*inputs, *map(places, views))
            fed.append(_Fed(batch, inputs, views))
            yield inputs

    def _lend_views(self, num: int) -> list[Pixels]:
        if self._form != "kernels":
            return []
        return [self._memory.lend(num) for _ in range(self._recipe.num_views)]

    def _view_inputs(self, batch: EncodedBatch, *, epoch: int) -> list[npt.NDArray[np.float32]]:
        """(N, columns) for each view: what the graph wants besides the JPEGs."""
        assert not isinstance(self._recipe, CentreCrop), "its windows are not drawn"
        return [
            graph_inputs(
                draw_views(
                    self._recipe,
                    seed=self._seed,
                    epoch=epoch,
                    sample_id=batch.sample_id,
                    height=batch.height,
                    width=batch.width,
                    view=view,
                ),
                form=self._form,
            )
            for view in range(self._recipe.num_views)
        ]

    def _stream(self) -> dict[str, Any]:
        if self._device.type == "cpu":
            return {}
        return {"cuda_stream": torch.cuda.current_stream(self._device)}

    def to_device(self, views: Any) -> list[Tensor]:
        """What the pipeline gave or wrote, as (N, 3, S, S) that torch may keep; on the CPU without a copy."""
        views = tuple(views)
        if self._form == "kernels":
            return [as_tensor(one) for one in views]
        pixels = [torch.from_dlpack(one.as_tensor()).permute(0, 3, 1, 2) for one in views]
        return self._copied(pixels, owners=views) if self._device.type == "cuda" else pixels

    def _copied(self, pixels: list[Tensor], *, owners: Any) -> list[Tensor]:
        """Copies in torch's memory; DALI's stays taken until the copying is over, without waiting for it."""
        copies = [one.clone(memory_format=torch.channels_last) for one in pixels]
        done = torch.cuda.Event()
        done.record(torch.cuda.current_stream(self._device))
        self._in_use.append((owners, done))
        while self._in_use and (self._in_use[0][1].query() or len(self._in_use) > self._prefetch):
            self._in_use.popleft()[1].synchronize()
        return copies


class DaliViews(DaliPixels):
    """The two views of an image. recipe: a ViewRecipe."""

    def run(self, fetch: Fetch, steps: range, *, epoch: int) -> Generator[TwoViews, None, None]:
        """As `pixels`, as TwoViews."""
        with contextlib.closing(self.pixels(fetch, steps, epoch=epoch)) as batches:
            for pixels, origin in batches:
                yield TwoViews.of(pixels, origin)


class DaliImages(DaliPixels):
    """The one view of an image, with its label. recipe: an ImageRecipe."""

    def run(self, fetch: Fetch, steps: range, *, epoch: int) -> Generator[LabelledImages, None, None]:
        """As `pixels`, as LabelledImages."""
        with contextlib.closing(self.pixels(fetch, steps, epoch=epoch)) as batches:
            for pixels, origin in batches:
                yield LabelledImages.of(pixels, origin)


def origin_of(batch: EncodedBatch) -> Origin:
    """Which samples a batch is of."""
    sample_id, position, label = (
        torch.from_numpy(np.ascontiguousarray(column))
        for column in (batch.sample_id, batch.position, batch.label)
    )
    return sample_id, position, label


class _Pipeline:
    """The built graph, and what feeds it at present."""

    def __init__(
        self,
        *,
        num_views: int = 2,
        size: int,
        device: torch.device,
        form: Form,
        hw_decoder_load: float,
        batch: int,
        num_threads: int,
        prefetch: int,
    ) -> None:
        if form == "kernels":
            from linerate.pipeline.dali_kernels import make_room

            make_room()
        feed = self._feed = _Feed()
        self._prefetch = prefetch
        self._graph = views_graph(
            lambda: next(feed.at_hand),
            num_views=num_views,
            size=size,
            form=form,
            hw_decoder_load=hw_decoder_load,
            batch_size=batch,
            num_threads=num_threads,
            prefetch_queue_depth=prefetch,
            **_place(device),
        )
        self._graph.build()

    def start(self, inputs: Iterator[Inputs]) -> None:
        self._feed.at_hand = inputs
        self._graph.reset()

    def run(self, **stream: Any) -> Any:
        return self._graph.run(**stream)

    def drain(self) -> bool:
        """Come back when nothing that was fed is read or written any more; whether it can be started anew."""
        if self._graph._pipe is None:  # DALI ends its pipelines before the interpreter ends its generators
            return False
        self._feed.at_hand = iter(())
        whole = True
        for _ in range(1 + self._prefetch):
            try:
                self._graph.run()
            except StopIteration:
                return whole
            except RuntimeError:  # the batch that the caller has heard of, or one behind it
                whole = False
        return False


class _Feed:
    at_hand: Iterator[Inputs] = iter(())


def _place(device: torch.device) -> dict[str, Any]:
    """The device in DALI's words."""
    if device.type == "cpu":
        return {"device": "cpu", "device_id": None}
    return {
        "device": "gpu",
        "device_id": torch.cuda.current_device() if device.index is None else device.index,
    }


def decoded(
    batches: Iterable[list[npt.NDArray[np.uint8]]],
    *,
    batch: int,
    device: str = "cpu",
    num_threads: int = 1,
    prefetch: int = 2,
    hw_decoder_load: float = 0.65,
) -> Iterator[Any]:
    """DALI's list of images (H, W, 3) of each batch of JPEGs, by the decoder that makes the views.

    For comparisons and measurements. batch: the most JPEGs in one. Raises RuntimeError where one does not
    decode.
    """
    feed = iter(batches)
    graph = decode_graph(
        lambda: next(feed),
        hw_decoder_load=hw_decoder_load,
        batch_size=batch,
        num_threads=num_threads,
        prefetch_queue_depth=prefetch,
        **_place(torch.device(device)),
    )
    graph.build()
    with contextlib.suppress(StopIteration):
        while True:
            (images,) = graph.run()
            yield images


def default_form(device: torch.device) -> Form:
    """numba's kernels on the CPU, DALI's operators on a GPU."""
    return "kernels" if device.type == "cpu" else "operators"


def views_of_draws(
    jpegs: list[npt.NDArray[np.uint8]],
    draws: tuple[Draws, Draws],
    *,
    size: int,
    device: str = "cpu",
    form: Form | None = None,
    num_threads: int = 1,
) -> tuple[Tensor, Tensor]:
    """(N, S, S, 3) uint8 on the CPU, twice: one view of each image by draws that need not be random.

    For comparisons and for looking at single views; builds a pipeline for one batch.
    """
    where = torch.device(device)
    form = form or default_form(where)
    query, key = (graph_inputs(one, form=form) for one in draws)
    pipeline = _Pipeline(
        size=size,
        device=where,
        form=form,
        hw_decoder_load=0.65,
        batch=len(jpegs),
        num_threads=num_threads,
        prefetch=1,
    )
    shape = (len(jpegs), size, size, 3)
    views = [np.empty(shape, dtype=np.uint8) for _ in draws] if form == "kernels" else []
    pipeline.start(iter([(jpegs, query, key, *map(places, views))]))
    made = pipeline.run()
    first, second = views or (views.as_cpu().as_tensor() for views in made)
    return torch.from_dlpack(first), torch.from_dlpack(second)
