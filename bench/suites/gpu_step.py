"""The whole MoCo step on a GPU against plain torch, eager and compiled, and lightly.

A function of the device: at the tiny size it runs on a CPU, which proves all but what CUDA does.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from linerate.bench.ceilings import Form, step_ceiling
from linerate.bench.contest import Bar, Ceiling, Contest, Count, Setting
from linerate.bench.floors import StepWork
from linerate.bench.machine import BAR_GPU, is_bar_gpu
from linerate.bench.suites import step as steps
from linerate.bench.suites import train_peers as peers
from linerate.bench.suites.step_start import EMA_MOMENTUM, LR, TEMPERATURE, random_views, start
from linerate.bench.timing import Side

GROUPS = 8
MAX_SMALL_STEP_MS = 6.5


@dataclass(frozen=True)
class Shape:
    """What a step works on."""

    encoder: str
    size: int
    batch: int
    num_keys: int
    device: str

    def __str__(self) -> str:
        return f"{self.encoder}, {self.size} px, b{self.batch}, K={self.num_keys}, bf16"

    def views(self) -> list[Tensor]:
        return [random_views(self.batch, self.size, seed=view, device=self.device) for view in (0, 1)]


class Forms:
    """Every form of the step, made when it is first asked for, on the same two batches."""

    def __init__(self, shape: Shape) -> None:
        self.shape = shape
        self._views = shape.views()
        self._made: dict[Any, Callable[[Tensor, Tensor], Tensor]] = {}

    def ours(self, *, groups: int = 1, compiled: bool = False) -> Side:
        """train_step under bf16 autocast."""

        def make() -> Callable[[Tensor, Tensor], Tensor]:
            bn_group = None if groups == 1 else self.shape.batch // groups
            return steps.our_step(*self._start(), autocast=True, bn_group=bn_group, compiled=compiled).run

        return self._side(("ours", groups, compiled), make)

    def plain(self, *, compiled: bool = False) -> Side:
        """Plain torch under bf16 autocast."""

        def make() -> Callable[[Tensor, Tensor], Tensor]:
            encoder, queue = self._start()
            return partial(
                peers.PlainMoCo(
                    encoder,
                    queue.keys,
                    temperature=TEMPERATURE,
                    ema_momentum=EMA_MOMENTUM,
                    lr=LR,
                    compiled=compiled,
                ).step,
                autocast=True,
            )

        return self._side(("plain", compiled), make)

    def _start(self) -> Any:
        return start(self.shape.encoder, num_keys=self.shape.num_keys, device=self.shape.device)

    def _side(self, key: Any, make: Callable[[], Callable[[Tensor, Tensor], Tensor]]) -> Side:
        def run() -> Tensor:
            if key not in self._made:
                self._made[key] = make()
            return self._made[key](*self._views)

        return Side(run=run)


def bench_step_on_gpu(setting: Setting) -> Iterator[Contest | Count]:
    """What needs no compiler comes first, so that a time limit leaves it standing."""
    full_size = setting.size == "full"
    shape = shape_of(setting, batch=256)
    forms = Forms(shape)
    agree = cache(partial(_same_curve, shape))
    eager, compiled = forms.ours(), forms.ours(compiled=True)
    about: dict[str, Any] = {"unit": "pairs/s", "amount": shape.batch, "ceiling": ceiling_of(shape, "eager")}
    yield Contest(
        peer="plain torch eager",
        work=f"eager: {shape}, groups=1",
        ours=eager,
        theirs=forms.plain(),
        agree=agree,
        **about,
    )
    yield from steps.against_lightly(
        eager,
        {"encoder": shape.encoder, "size": shape.size, "batch": shape.batch, "num_keys": shape.num_keys},
        work=f"eager: {shape}, groups=1",
        autocast=True,
        device=shape.device,
        curve=_small_curve(shape),
        bar=Bar(2.0, full_size=full_size),
        ceiling=about["ceiling"],
    )
    yield from _groups(forms, compiled=False, about=about, full_size=full_size)
    about["ceiling"] = ceiling_of(shape, "compiled")
    yield Contest(
        peer="plain torch compiled",
        work=f"compiled: {shape}, groups=1",
        ours=compiled,
        theirs=forms.plain(compiled=True),
        agree=agree,
        bar=Bar(1.05, full_size=full_size),
        **about,
    )
    yield Contest(
        peer="plain torch eager",
        work=f"compiled: {shape}, groups=1",
        ours=compiled,
        theirs=forms.plain(),
        agree=agree,
        bar=Bar(1.3, full_size=full_size),
        **about,
    )
    yield Contest(
        peer=None,
        work=f"compiled: {shape}, groups=1, alone",
        ours=compiled,
        bar=Bar(4700, of="ours", full_size=full_size and is_bar_gpu()),
        note=f"the bar is for an {BAR_GPU}",
        **about,
    )
    yield from _groups(forms, compiled=True, about=about, full_size=full_size)


def bench_step_small(setting: Setting) -> Iterator[Contest]:
    """Batch 32, where launches count: eager, and compiled."""
    shape = shape_of(setting, batch=32)
    forms, agree = Forms(shape), cache(partial(_same_curve, shape))
    for compiled in (False, True):
        yield Contest(
            peer="plain torch eager",
            work=f"{'compiled' if compiled else 'eager'}: {shape}, groups=1",
            unit="pairs/s",
            amount=shape.batch,
            ours=forms.ours(compiled=compiled),
            theirs=forms.plain(),
            agree=agree,
            bar=Bar(1.8, full_size=setting.size == "full"),
            ceiling=ceiling_of(shape, "compiled" if compiled else "eager"),
        )
    yield Contest(
        peer=None,
        work=f"compiled: {shape}, groups=1, alone",
        unit="pairs/s",
        amount=shape.batch,
        ours=forms.ours(compiled=True),
        bar=Bar(
            round(1e3 * 32 / MAX_SMALL_STEP_MS), of="ours", full_size=setting.size == "full" and is_bar_gpu()
        ),
        ceiling=ceiling_of(shape, "compiled"),
        note=f"the bar is {MAX_SMALL_STEP_MS} ms a step on an {BAR_GPU}",
    )


def _groups(forms: Forms, *, compiled: bool, about: dict[str, Any], full_size: bool) -> Iterator[Contest]:
    yield Contest(
        peer="ours with groups=1",
        work=f"{'compiled' if compiled else 'eager'}: {forms.shape}, groups={GROUPS}",
        ours=forms.ours(groups=GROUPS, compiled=compiled),
        theirs=forms.ours(compiled=compiled),
        bar=Bar(0.95, full_size=full_size),
        note="other statistics, so nothing to be equal; tests/train/test_shuffle_bn.py compares forms",
        **about,
    )


def shape_of(setting: Setting, *, batch: int) -> Shape:
    """ResNet-50 at 224 pixels, or what a test has time for."""
    name, size, num_keys = setting.pick(
        tiny=("tiny-resnet-w4", 32, 64), quick=("resnet50", 224, 65536), full=("resnet50", 224, 65536)
    )
    return Shape(name, size, setting.pick(tiny=8, quick=batch, full=batch), num_keys, setting.device)


def _same_curve(shape: Shape) -> str:
    """Equality in float64, on a batch that float64 has memory for."""
    return steps.require_same_losses(
        shape.encoder, size=shape.size, steps=3, device=shape.device, **_small_curve(shape)
    )


def ceiling_of(shape: Shape, form: Form) -> Ceiling:
    """The slower of the step's floors on this machine."""
    dtype, small = torch.bfloat16, shape.device == "cpu"
    return step_ceiling(_work_of(shape), device=shape.device, dtype=dtype, form=form, small=small)


@cache
def _work_of(shape: Shape) -> StepWork:
    sizes = {"size": shape.size, "batch": shape.batch, "num_keys": shape.num_keys}
    return steps.floor_work(shape.encoder, autocast=True, **sizes)


def _small_curve(shape: Shape) -> dict[str, int]:
    return {"num_keys": min(shape.num_keys, 4096), "batch": min(shape.batch, 16)}
