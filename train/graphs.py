"""Both passes of a step as a CUDA graph: recorded once, then replayed on buffers that stay where they are.

What changes from step to step goes into the buffers: the images and the places of the shuffle. What a
schedule moves, the learning rate and m, acts in the update, which is not recorded. The first steps run as
they are, on the stream of the recording, so that libraries and the compiler make their choices before.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from linerate.train.shuffle_bn import Route
from linerate.train.step import Gradients, StepInputs

WARM_UP_STEPS = 3


class Recorder(Protocol):
    """What can record a call; a test has one that calls it again instead."""

    def aside(self, run: Callable[[], Gradients]) -> Gradients:
        """Run it where it would be recorded."""
        ...

    def record(self, run: Callable[[], Gradients]) -> Callable[[], Gradients]:
        """What does it all again; its tensors are the same ones each time."""
        ...


class CudaRecorder:
    """Records a CUDA graph on a stream of its own."""

    def __init__(self) -> None:
        self._stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]

    def aside(self, run: Callable[[], Gradients]) -> Gradients:
        main = torch.cuda.current_stream()
        self._stream.wait_stream(main)
        with torch.cuda.stream(self._stream):
            found = run()
        main.wait_stream(self._stream)
        return found

    def record(self, run: Callable[[], Gradients]) -> Callable[[], Gradients]:
        graph = torch.cuda.CUDAGraph()
        # The loader's threads go on calling CUDA meanwhile: of them the recording must know nothing.
        with torch.cuda.graph(graph, stream=self._stream, capture_error_mode="thread_local"):
            found = run()

        def replay() -> Gradients:
            graph.replay()
            return found

        return replay


class RecordedPasses:
    """Runs a step's passes from a recording, for `train_step(recorded=...)`."""

    def __init__(self, recorder: Recorder, params: list[Tensor]) -> None:
        """params: those whose gradients the passes leave; each gets it back after every replay."""
        self._recorder, self._params = recorder, params
        self._num_warm = 0
        self._buffers: StepInputs | None = None
        self._replay: Callable[[], Gradients] | None = None
        self.given_up: str | None = None
        """Why there is no recording after all; the steps run as they are."""

    def __call__(self, compute: Callable[[StepInputs], Gradients], inputs: StepInputs) -> Gradients:
        """The gradients of a step. Raises ValueError where its shapes are not those of the recording."""
        if self.given_up is not None:
            return compute(inputs)
        if self._num_warm < WARM_UP_STEPS:
            self._num_warm += 1
            return self._recorder.aside(lambda: compute(inputs))
        if self._replay is None or self._buffers is None:
            self._buffers = buffers = _clone(inputs)
            try:
                self._replay = self._recorder.record(lambda: compute(buffers))
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:
                reason, _, _ = str(error).partition("\n")
                self.given_up = f"the recording failed: {reason}"
                self._buffers = None
                return compute(inputs)
        else:
            _copy(self._buffers, inputs)
        found = self._replay()
        # Whoever cleared or replaced a gradient meanwhile did not reach the recording's own.
        for param, gradient in zip(self._params, found.of_params, strict=True):
            param.grad = gradient
        return found


def _clone(inputs: StepInputs) -> StepInputs:
    routes = [route and _map_route(route, torch.clone) for route in inputs.routes]
    if inputs.position is not None:
        raise ValueError("a step that looks up positions draws on the host and cannot be recorded")
    return dataclasses.replace(
        inputs,
        query_images=inputs.query_images.clone(),
        key_images=inputs.key_images.clone(),
        routes=routes,
    )


def _map_route(route: Route, make: Callable[[Tensor], Tensor]) -> Route:
    if route.exchange is not None:
        raise ValueError(
            "images that change their rank are sent in other numbers each step: not to be recorded"
        )
    return Route(rows=make(route.rows), place_of=make(route.place_of))


def _copy(buffers: StepInputs, inputs: StepInputs) -> None:
    pairs = list(zip(_tensors(buffers), _tensors(inputs), strict=True))
    for buffer, tensor in pairs:
        if buffer.shape != tensor.shape:
            raise ValueError(
                f"a tensor of {tuple(tensor.shape)} where {tuple(buffer.shape)} was recorded; every step "
                "of a recorded run must have the same batch"
            )
    for buffer, tensor in pairs:
        buffer.copy_(tensor, non_blocking=True)


def _tensors(inputs: StepInputs) -> list[Tensor]:
    places = [place for route in inputs.routes if route for place in (route.rows, route.place_of)]
    return [inputs.query_images, inputs.key_images, *places]
