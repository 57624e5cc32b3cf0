import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.train.small import SMALL

from linerate.pipeline.two_views import TwoViews
from linerate.train.launch import open_accelerator
from linerate.train.learner import Learner


def batch(seed: int) -> TwoViews:
    generator = torch.Generator().manual_seed(seed)
    query, key = (torch.randint(256, (16, 3, 16, 16), dtype=torch.uint8, generator=generator) for _ in "qk")
    place = torch.arange(16)
    return TwoViews(query=query, key=key, sample_id=place, position=place, label=place)


def curve(tmp_path: Path, *, compile: str, steps: int) -> list[float]:
    config = dataclasses.replace(SMALL, speed=dataclasses.replace(SMALL.speed, compile=compile))
    losses = []
    with open_accelerator(config, run_dir=tmp_path) as accelerator:
        learner = Learner(config, accelerator)
        for step in range(steps):
            # Another rate each time, as a schedule has it.
            learner.step(batch(step), step=step, lr=0.1 / (1 + step))
            losses.append(learner.read_metrics()["loss"])
    return losses


@pytest.mark.filterwarnings("ignore")  # the compiler's advice
def test_what_the_compiler_traced_gives_the_eager_curve_and_is_traced_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a compiler gets to see is the whole step's; its kernels are left to test_gpu_step.py."""
    graphs: list[Any] = []

    def backend(graph: Any, _: Any) -> Any:
        graphs.append(graph)
        return graph

    def traced(what: Any, compile: Any = torch.compile) -> Any:
        # torch breaks the graph of its optimizers by itself.
        return compile(what, backend=backend, fullgraph=getattr(what, "__name__", "") != "step")

    monkeypatch.setattr(torch, "compile", traced)
    eager = curve(tmp_path, compile="off", steps=4)
    torch._dynamo.reset()
    assert curve(tmp_path, compile="step", steps=4) == pytest.approx(eager, rel=1e-5)
    # Two encoders, the loss, and the optimizer's first step, which has no momentum yet, and its others.
    assert len(graphs) == 5, graphs
