"""The whole MoCo step against plain torch: time on this CPU, counts of any device. On a GPU: gpu_step.py."""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import linerate.train.step as train
from linerate.bench.ceilings import step_ceiling
from linerate.bench.contest import Bar, Ceiling, Contest, Count, Setting
from linerate.bench.counting import OpCounter
from linerate.bench.floors import StepWork, count_step
from linerate.bench.peers import Ask, missing_peer, open_peer
from linerate.bench.suites import train_peers as peers
from linerate.bench.suites.step_parts import count_side, name_threads, require_close
from linerate.bench.suites.step_start import (
    EMA_MOMENTUM,
    LR,
    TEMPERATURE,
    curve_views,
    random_views,
    start,
)
from linerate.bench.timing import Side
from linerate.train.encoder import Encoder
from linerate.train.key_queue import KeyQueue

NUM_CURVE_STEPS = 5


def bench_step(setting: Setting) -> Iterator[Contest | Count]:
    """The whole step against plain eager torch: time on this CPU, counts for ResNet-50 on any device."""
    if setting.for_gpu:
        # That module imports this one.
        from linerate.bench.suites.gpu_step import bench_step_on_gpu

        yield from bench_step_on_gpu(setting)
        return
    small = ("tiny-resnet-w4", 32, 8, 64)
    name, size, batch, num_keys = setting.pick(
        tiny=small, quick=("tiny-resnet", 32, 64, 4096), full=("resnet18", 64, 64, 65536)
    )
    ours, theirs = build_sides(name, num_keys=num_keys)
    work = floor_work(name, size=size, batch=batch, num_keys=num_keys)
    views = [random_views(batch, size, seed=seed) for seed in (0, 1)]
    ceiling = step_ceiling(work, device="cpu", dtype=torch.float32, small=setting.size == "tiny")
    yield Contest(
        peer="plain torch eager",
        work=f"{name}, {size} px, b{batch}, K={num_keys}, fp32, groups=1, {name_threads()}",
        unit="pairs/s",
        amount=batch,
        ours=Side(run=lambda: ours(*views)),
        theirs=Side(run=lambda: theirs.step(*views)),
        agree=lambda: require_same_losses(name, num_keys=num_keys, size=size, batch=batch),
        ceiling=ceiling,
    )
    yield from against_lightly(
        Side(run=lambda: ours(*views)),
        {"encoder": name, "num_keys": num_keys, "size": size, "batch": batch},
        autocast=False,
        work=f"{name}, {size} px, b{batch}, K={num_keys}, fp32, groups=1, {name_threads()}",
        ceiling=ceiling,
    )
    shape = setting.pick(tiny=small, quick=("resnet50", 224, 256, 65536), full=("resnet50", 224, 256, 65536))
    yield from _count_step(*shape, full_size=setting.size != "tiny")


def against_lightly(
    ours: Side,
    shape: Mapping[str, Any],
    *,
    work: str,
    autocast: bool,
    device: str = "cpu",
    curve: Mapping[str, Any] | None = None,
    bar: Bar | None = None,
    ceiling: Ceiling | None = None,
) -> Iterator[Contest]:
    """One contest against lightly's parts, which work in a process of their own.

    shape: `encoder`, `size`, `batch`, `num_keys` of both sides. curve: what to take instead of those where
    the losses are compared, since that is done in float64.
    """
    missing = missing_peer("lightly")
    how = {"device": device, "num_threads": torch.get_num_threads()}
    with contextlib.ExitStack() as opened:
        ask = None if missing else opened.enter_context(open_peer("lightly"))

        def agree() -> str:
            assert ask is not None
            return require_lightlys_losses(ask, {**shape, **(curve or {}), **how})

        yield Contest(
            peer="lightly",
            work=work,
            unit="pairs/s",
            amount=shape["batch"],
            ours=ours,
            theirs=Side(run=lambda: ask("lightly_step", **shape, **how, autocast=autocast)) if ask else None,
            missing=missing,
            agree=agree,
            bar=bar,
            ceiling=ceiling,
            note="lightly's own loss and shuffle, in a process of its own; NCHW and no scheduler",
        )


def require_lightlys_losses(ask: Ask, shape: Mapping[str, Any]) -> str:
    """What was found equal. Raises Disagreement where our losses and lightly's part, from the same start.

    shape: what `against_lightly` names, with `device` and `num_threads`.
    """
    theirs = ask("lightly_losses", **shape, autocast=False, steps=NUM_CURVE_STEPS)
    device, encoder, num_keys = shape["device"], shape["encoder"], shape["num_keys"]
    run = our_step(*start(encoder, num_keys=num_keys, dtype=torch.float64, device=device)).run
    return require_close(
        [
            run(*pair).cpu()
            for pair in curve_views(NUM_CURVE_STEPS, shape["batch"], shape["size"], device=device)
        ],
        [torch.tensor(loss, dtype=torch.float64) for loss in theirs],
        what=f"the losses of {NUM_CURVE_STEPS} steps in float64",
        atol=1e-3,
    )


def _count_step(
    name: str, size: int, batch: int, num_keys: int, *, full_size: bool
) -> Iterator[Contest | Count]:
    """Operations, bytes and host syncs of a step, traced without arithmetic."""
    sides = build_sides(name, num_keys=num_keys, autocast=True)
    mine = _trace(sides[0], batch, size)
    inside = _trace(sides[0], batch, size, open_operators=True)
    other = _trace(partial(sides[1].step, autocast=True), batch, size)
    peer = "plain torch eager"
    work = f"one step, {name}, {size} px, b{batch}, K={num_keys}, bf16 autocast, groups=1"
    note = "without prim.*, detach, views and empty; FakeTensorMode; an operator of our own is one"
    bar = Bar(900, of="ours", at_most=True, full_size=full_size)
    no_sync = Bar(0, of="ours", at_most=True)
    yield Count(
        peer=peer, work=work, unit="aten ops", ours=mine.num_ops, theirs=other.num_ops, bar=bar, note=note
    )
    yield Count(
        peer=peer,
        work=work,
        unit="ops, ours opened",
        ours=inside.num_ops,
        theirs=other.num_ops,
        note="as aten ops, but of our own operators every operation inside counts",
    )
    yield Count(
        peer=peer,
        work=work,
        unit="GB moved",
        ours=inside.num_bytes / 1e9,
        theirs=other.num_bytes / 1e9,
        note=note,
    )
    yield Count(
        peer=peer,
        work=work,
        unit="host syncs",
        ours=mine.num_syncs,
        theirs=other.num_syncs,
        bar=no_sync,
        note=note,
    )


def _trace(
    step: Callable[[Tensor, Tensor], Tensor], batch: int, size: int, *, open_operators: bool = False
) -> OpCounter:
    """Counts of the second step: in the first one the optimizer makes its state."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        pixels = torch.empty(batch, size, size, 3, dtype=torch.uint8).permute(0, 3, 1, 2)
        count_side(lambda: step(pixels, pixels))
        return count_side(lambda: step(pixels, pixels), open_operators=open_operators)


def build_sides(
    name: str,
    *,
    num_keys: int,
    autocast: bool = False,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
) -> tuple[Callable[[Tensor, Tensor], Tensor], peers.PlainMoCo]:
    """Our step as a function of the views, and the peer with the same weights and the same queue."""
    encoder, queue = start(name, num_keys=num_keys, dtype=dtype, device=device)
    theirs = peers.PlainMoCo(encoder, queue.keys, temperature=TEMPERATURE, ema_momentum=EMA_MOMENTUM, lr=LR)
    return our_step(encoder, queue, autocast=autocast).run, theirs


@dataclass(frozen=True)
class OurStep:
    """train_step with what it needs."""

    moco: train.MoCo
    optimizer: torch.optim.Optimizer
    run: Callable[[Tensor, Tensor], Tensor]
    """(query views, key views) -> loss"""


def floor_work(name: str, *, size: int, batch: int, num_keys: int, autocast: bool = False) -> StepWork:
    """What our step must compute and move, counted on shapes alone."""
    ours = our_step(*start(name, num_keys=num_keys))
    narrow = torch.bfloat16 if autocast else None
    return count_step(ours.moco, ours.optimizer, batch=batch, size=size, narrow=narrow)


def our_step(
    encoder: Encoder,
    queue: KeyQueue,
    *,
    autocast: bool = False,
    bn_group: int | None = None,
    compiled: bool = False,
) -> OurStep:
    """The run's own step on the device of the queue. compiled: both encoders run through torch.compile."""
    device = queue.keys.device
    moco = train.MoCo(encoder, queue, temperature=TEMPERATURE, ema_momentum=EMA_MOMENTUM, bn_group=bn_group)
    moco.to(device)
    if compiled:
        moco.query_forward, moco.key_forward = map(torch.compile, (moco.query_encoder, moco.key_encoder))
    optimizer = torch.optim.SGD(
        moco.query_encoder.parameters(), lr=LR, momentum=0.9, weight_decay=1e-4, foreach=True
    )
    done = 0

    def run(query_images: Tensor, key_images: Tensor) -> Tensor:
        nonlocal done
        metrics = train.train_step(
            moco,
            query_images,
            key_images,
            optimizer,
            step=done,
            autocast=lambda: torch.autocast(device.type, torch.bfloat16, enabled=autocast),
        )
        done += 1
        return metrics.loss

    return OurStep(moco, optimizer, run)


def require_same_losses(
    name: str, *, num_keys: int, size: int, batch: int, steps: int = NUM_CURVE_STEPS, device: str = "cpu"
) -> str:
    """What was found equal. Raises Disagreement where the loss curves part, from the same start.

    In float64, where sums in another order do not count: in float32 their rounding alone grew to 5e-3 in a
    loss after five steps on some CPUs. What is left is the normalisation of pixels, which the sides write
    in two forms 6e-8 apart: resnet18 at this learning rate makes 2e-4 of it; with one form it is 2e-15.
    """
    ours, theirs = build_sides(name, num_keys=num_keys, dtype=torch.float64, device=device)
    curves: tuple[list[Tensor], list[Tensor]] = ([], [])
    for views in curve_views(steps, batch, size, device=device):
        curves[0].append(ours(*views))
        curves[1].append(theirs.step(*views))
    return require_close(*curves, what=f"the losses of {steps} steps in float64", atol=1e-3)
