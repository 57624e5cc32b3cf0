import dataclasses
import functools
from pathlib import Path

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


@pytest.mark.filterwarnings("ignore")  # the compiler's advice
def test_encoders_that_the_compiler_traced_give_the_eager_curve(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a compiler gets to see is the whole step's; its kernels are left to test_gpu_step.py."""
    traced = functools.partial(torch.compile, backend="eager", fullgraph=True)
    monkeypatch.setattr(torch, "compile", traced)
    losses = []
    for compiled in (False, True):
        config = dataclasses.replace(SMALL, speed=dataclasses.replace(SMALL.speed, compile=compiled))
        with open_accelerator(config, run_dir=tmp_path) as accelerator:
            learner = Learner(config, accelerator)
            for step in range(2):
                learner.step(batch(step), step=step, lr=0.1)
            losses.append(learner.read_metrics(stop=False)[0]["loss"])
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)
