"""The update of both encoders on a GPU: SGD, weight decay, EMA and the bf16 copies of the weights."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from linerate.bench.contest import Bar, Ceiling, Contest, Count, Setting
from linerate.bench.suites.step_parts import DIM, EMA_MOMENTUM, require_close
from linerate.bench.timing import Side
from linerate.train.encoder import build_encoder
from linerate.train.kernels import sgd_ema

LR, SGD_MOMENTUM, WEIGHT_DECAY = 0.03, 0.9, 1e-4
PEER = "fused SGD, then foreach lerp and copies"


class Weights:
    """Both encoders' weights with gradients, momentum buffers and bf16 copies, as seed 0 draws them."""

    def __init__(self, name: str, device: torch.device) -> None:
        torch.manual_seed(0)
        encoder = build_encoder(name, dim=DIM)
        encoder.to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.query = list(encoder.parameters())
        for weight in self.query:
            weight.grad = torch.randn_like(weight)
        self.key = [torch.randn_like(weight) for weight in self.query]
        self.buffers = [torch.zeros_like(weight) for weight in self.query]
        self.copies: list[list[Tensor]] = [
            [w.detach().bfloat16() for w in self.query],
            [w.bfloat16() for w in self.key],
        ]

    def state(self) -> list[Tensor]:
        """What an update changes, in float32."""
        return [w.detach().float() for w in (*self.query, *self.key, *self.copies[0], *self.copies[1])]


def ours(weights: Weights) -> Callable[[], None]:
    """One update by the kernel."""
    detached = [weight.detach() for weight in weights.query]
    update = sgd_ema.SgdEma(
        detached, weights.buffers, weights.key, copies=(weights.copies[0], weights.copies[1])
    )

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
    """The fastest that torch has: its own fused SGD, one foreach lerp, two foreach copies."""
    sgd = torch.optim.SGD(weights.query, lr=LR, momentum=SGD_MOMENTUM, weight_decay=WEIGHT_DECAY, fused=True)
    detached = [weight.detach() for weight in weights.query]

    def run() -> None:
        sgd.step()
        torch._foreach_lerp_(weights.key, detached, 1.0 - EMA_MOMENTUM)
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
    mine = Weights(name, device)
    run_ours = ours(mine)
    num_bytes = 4 * sum(weight.numel() for weight in mine.query)
    work = f"{name} + {DIM}-D head, {len(mine.query)} tensors of {num_bytes / 1e6:.0f} MB"
    if on_gpu:
        other = Weights(name, device)
        run_theirs = theirs(other)

        def agree() -> str:
            run_ours()
            run_theirs()
            # A copy may round the other way where the weight differs in its last place.
            return require_close(mine.state(), other.state(), what="weights and copies", atol=2e-2)

        # Four reads, three writes and two of half the width: as much as so long a copy moves.
        least = [torch.ones(num_bytes, device=device) for _ in range(2)]
        yield Contest(
            peer=PEER,
            work=f"{work}, GPU",
            unit="updates/s",
            amount=1,
            ours=Side(run=run_ours),
            theirs=Side(run=run_theirs),
            agree=agree,
            bar=Bar(1.1, full_size=setting.size != "tiny"),
            ceiling=Ceiling(name="a copy of as many bytes", side=Side(run=lambda: least[0].copy_(least[1]))),
        )
    yield Count(
        peer=PEER,
        work=work,
        unit="launches",
        ours=count_launches(run_ours),
        bar=Bar(3, of="ours", at_most=True),
        note=None if on_gpu else "the time is not measured: there is no CUDA device",
    )
