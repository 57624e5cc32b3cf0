"""A transfer of one weight and one BatchNorm, to count and compare every step of the loop."""

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from linerate.train.evaluate.detect.job import Job
from linerate.train.evaluate.detect.loop import LoopOptions
from linerate.train.evaluate.detect.schedules import StepSchedule


class Line(nn.Module):
    """A filter, a BatchNorm and a weight learn y = 2 x: small enough to count every step."""

    def __init__(self, noise: float) -> None:
        super().__init__()
        self.noise = noise
        self.mix = nn.Conv2d(1, 2, 3, padding=1)
        self.norm = nn.BatchNorm2d(2)
        self.fit = nn.Conv2d(2, 1, 1)
        self.double()  # so that the order of a sum is no difference to speak of

    def forward(self, images: list[Tensor], targets: Any = None) -> Any:
        out = self.fit(self.norm(self.mix(torch.stack(images))))
        if not self.training:
            return list(out)
        noise = self.noise * torch.rand(())  # a draw that a resumed run has to repeat
        return {"loss_fit": ((out - torch.stack([t["y"] for t in targets])) ** 2).mean() + noise * out.mean()}


class Points:
    """24 images of one channel; `die_at` and `broken` make trouble."""

    def __init__(self) -> None:
        self.loaded = 0
        self.die_at: int | None = None
        self.broken: set[int] = set()
        self.scale = 1.0

    def __len__(self) -> int:
        return 24

    def load(self, index: int, draws: np.random.Generator | None) -> tuple[Tensor, dict[str, Tensor]]:
        self.loaded += 1
        if self.loaded == self.die_at:
            raise KeyboardInterrupt
        if index in self.broken:
            raise OSError(f"image {index} is cut short")
        image = torch.arange(4, dtype=torch.float64).view(1, 2, 2) * (index % 3) + index
        image += draws.random() if draws else 0.0
        return image * self.scale, {"y": 2 * image}


def toy_job(source: Points, *, noise: float = 1e-3) -> Job:
    """The transfer; noise: how much of a draw by torch's generator is in the loss."""

    def build(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        return Line(noise)

    return Job(
        build=build,
        train=source,
        test=source,
        record=lambda prediction, item: float((prediction - item.target["y"]).abs().mean()),
        judge=lambda errors: {"error": float(np.mean(list(errors.values()))), "of_nothing": float("nan")},
        norm_decay=0.0,
    )


def toy_options(**more: Any) -> LoopOptions:
    """Twelve iterations of four images, a checkpoint after every third."""
    schedule = StepSchedule(iterations=12, steps=(8,), warmup=2, lr=0.02)
    given = {"schedule": schedule, "batch": 4, "seed": 5, "precise_bn": 3, "log_iterations": 2, "workers": 0}
    return LoopOptions(**{**given, "checkpoint_iterations": 3, **more})
