"""The update of both encoders on a GPU: SGD, weight decay and EMA, with and without bf16 copies.

The trainer's update makes no copies: nothing of ours reads them, autocast casts the weights itself.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from linerate.bench.contest import Bar, Ceiling, Contest, Count, Setting
from linerate.bench.suites.step_parts import require_close
from linerate.bench.suites.step_start import DIM, EMA_MOMENTUM
from linerate.bench.timing import Side
from linerate.train.encoder import build_encoder
from linerate.train.kernels import sgd_ema

LR, SGD_MOMENTUM, WEIGHT_DECAY = 0.03, 0.9, 1e-4
PEER = "fused SGD, then foreach lerp"


class Weights:
    """Both encoders' weights with gradients, momentum buffers and, if wanted, bf16 copies, by seed 0."""

    def __init__(self, name: str, device: torch.device, *, copied: bool) -> None:
        torch.manual_seed(0)
        encoder = build_encoder(name, dim=DIM)
        encoder.to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.query = list(encoder.parameters())
        for weight in self.query:
            weight.grad = torch.randn_like(weight)
        self.key = [torch.randn_like(weight) for weight in self.query]
        self.buffers = [torch.zeros_like(weight) for weight in self.query]
        self.copies: tuple[list[Tensor], list[Tensor]] | None = None
        if copied:
            self.copies = [w.detach().bfloat16() for w in self.query], [w.bfloat16() for w in self.key]

    def state(self) -> list[Tensor]:
        """What an update changes, in float32."""
        twins, key_twins = self.copies or ([], [])
        return [w.detach().float() for w in (*self.query, *self.key, *twins, *key_twins)]


def ours(weights: Weights) -> Callable[[], None]:
    """One update by the kernel."""
    detached = [weight.detach() for weight in weights.query]
    update = sgd_ema.SgdEma(detached, weights.buffers, weights.key, copies=weights.copies)

    def run() -> None:
        gradients = [weight.grad for weight in weights.query]
        update.step(
            [gradient for gradient in gradients if gradient is not None],
            lr=LR,
            sgd_momentum=SGD_MOMENTUM,
            weight_decay=WEIGHT_DECAY,
            ema_momentum=EMA_MOMENTUM,
        )

    return run


def theirs(weights: Weights) -> Callable[[], None]:
    """The fastest that torch has: its own fused SGD, one foreach lerp, and a foreach copy of each encoder."""
    sgd = torch.optim.SGD(weights.query, lr=LR, momentum=SGD_MOMENTUM, weight_decay=WEIGHT_DECAY, fused=True)
    detached = [weight.detach() for weight in weights.query]

    def run() -> None:
        sgd.step()
        torch._foreach_lerp_(weights.key, detached, 1.0 - EMA_MOMENTUM)
        if weights.copies is not None:
            torch._foreach_copy_(weights.copies[0], detached)
            torch._foreach_copy_(weights.copies[1], weights.key)

    return run


def count_launches(run: Callable[[], None]) -> int:
    """Kernels that one call starts; none is run."""
    launches = 0
    kernel = sgd_ema._update

    class Counting:
        def __getitem__(self, grid: object) -> Callable[..., None]:
            def launch(*args: object, **kwargs: object) -> None:
                nonlocal launches
                launches += 1

            return launch

    sgd_ema._update = Counting()
    try:
        run()
    finally:
        sgd_ema._update = kernel
    return launches


def bench_sgd_ema(setting: Setting) -> Iterator[Contest | Count]:
    """ResNet-50 with its head; the time on a GPU only, the launches anywhere."""
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda" if on_gpu else "cpu")
    name = setting.pick(tiny="tiny-resnet-w4", quick="resnet50", full="resnet50")
    if on_gpu:
        full_size = setting.size != "tiny"
        yield _contest(name, device, copied=False, full_size=full_size)
        yield _contest(name, device, copied=True, full_size=full_size)
    mine = Weights(name, device, copied=True)
    yield Count(
        peer=PEER,
        work=f"{_work(name, mine)}, with bf16 copies",
        unit="launches",
        ours=count_launches(ours(mine)),
        bar=Bar(3, of="ours", at_most=True),
        note=None if on_gpu else "the time is not measured: there is no CUDA device",
    )


def _work(name: str, weights: Weights) -> str:
    num_bytes = 4 * sum(weight.numel() for weight in weights.query)
    return f"{name} + {DIM}-D head, {len(weights.query)} tensors of {num_bytes / 1e6:.0f} MB"


def _contest(name: str, device: torch.device, *, copied: bool, full_size: bool) -> Contest:
    mine, other = (Weights(name, device, copied=copied) for _ in range(2))
    run_ours, run_theirs = ours(mine), theirs(other)

    def agree() -> str:
        run_ours()
        run_theirs()
        # A copy may round the other way where the weight differs in its last place: 2^-5 from 4 to 8.
        return require_close(mine.state(), other.state(), what="weights", atol=4e-2 if copied else 1e-5)

    # Four reads, three writes, with copies two more of half the width: half of it read, half written.
    moved = sum(weight.numel() for weight in mine.query) * (32 if copied else 28)
    least = [torch.ones(moved // 2, dtype=torch.uint8, device=device) for _ in range(2)]
    return Contest(
        peer=f"{PEER} and copies" if copied else PEER,
        work=f"{_work(name, mine)}, GPU, {'with bf16 copies' if copied else 'as the trainer runs it'}",
        unit="updates/s",
        amount=1,
        ours=Side(run=run_ours),
        theirs=Side(run=run_theirs),
        agree=agree,
        bar=Bar(1.1, full_size=full_size),
        ceiling=Ceiling(name="a copy of as many bytes", side=Side(run=lambda: least[0].copy_(least[1]))),
    )
