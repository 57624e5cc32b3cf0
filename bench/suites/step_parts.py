"""The parts of the MoCo step on one device, held against the reference's forms; counts are of any device.

Legend: N queries, K keys, C dimensions.
"""

import contextlib
import copy
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn.functional import normalize

from linerate.bench.contest import Bar, Ceiling, Contest, Count, Disagreement, Setting
from linerate.bench.counting import OpCounter
from linerate.bench.heap import heap_without_holes
from linerate.bench.suites import train_peers as peers
from linerate.bench.suites.step_start import DIM, EMA_MOMENTUM, TEMPERATURE
from linerate.bench.timing import Side, one_core
from linerate.train.ema import FlatEma
from linerate.train.encoder import build_encoder
from linerate.train.infonce import chunk_size, infonce
from linerate.train.key_queue import KeyQueue

MAX_ENQUEUE_US = 10
NUM_CAPTURED = 20
INFONCE_PEER = "cat + cross_entropy"


def bench_ema(setting: Setting) -> Iterator[Contest]:
    """The key encoder's update of ResNet-50 with its head, 161 tensors."""
    device = setting.device
    name = setting.pick(tiny="tiny-resnet-w4", quick="resnet50", full="resnet50")
    torch.manual_seed(0)
    query = [p.detach().to(device) for p in build_encoder(name, dim=DIM).parameters()]
    start = [torch.randn_like(p) for p in query]
    num_bytes = 4 * sum(p.numel() for p in query)
    # Two reads and one write of as many bytes, in one run: what any update must do.
    source, target = (fill(num_bytes // 4, device=device) for fill in (torch.ones, torch.zeros))
    forms: dict[str, tuple[Callable[..., None], float]] = {
        "the reference's per-tensor loop": (peers.ema_loop, 3.3),
        "lightly's foreach mul-add": (peers.ema_foreach, 1.5),
    }
    for peer, (update, bar) in forms.items():
        ours, theirs = copy.deepcopy(start), copy.deepcopy(start)

        # As MoCo.to lays its encoders; the peer's stay as torch made them.
        ema = FlatEma(ours, [p.clone() for p in query])

        def run_ours(ema: FlatEma = ema) -> None:
            ema.update(ema_momentum=EMA_MOMENTUM)

        def run_theirs(theirs: list[Tensor] = theirs, update: Callable[..., None] = update) -> None:
            update(theirs, query, EMA_MOMENTUM)

        def agree(
            ours: list[Tensor] = ours,
            theirs: list[Tensor] = theirs,
            sides: tuple[Callable[[], None], ...] = (run_ours, run_theirs),
        ) -> str:
            for side in sides:
                side()
            return require_close(ours, theirs, what="the parameters after an update", atol=1e-6)

        yield Contest(
            peer=peer,
            work=f"{name} + {DIM}-D head, {len(query)} tensors of {num_bytes / 1e6:.0f} MB, "
            f"{name_place(device)}",
            unit="updates/s",
            amount=1,
            ours=Side(run=run_ours),
            theirs=Side(run=run_theirs),
            agree=agree,
            bar=Bar(bar, full_size=setting.size != "tiny"),
            ceiling=Ceiling(name="one flat add", side=Side(run=lambda: target.add_(source))),
        )


def bench_enqueue(setting: Setting) -> Iterator[Contest | Count]:
    """One step's keys into the queue; the reference copies the queue for the logits and reads its pointer."""
    device = setting.device
    num_keys, num_new = setting.pick(tiny=(64, 8), quick=(65536, 256), full=(65536, 256))
    generator = torch.Generator().manual_seed(0)
    new_keys = normalize(torch.randn(num_new, DIM, generator=generator)).to(device)
    queue = KeyQueue(num_keys, DIM, generator=generator).to(device)
    reference = peers.ReferenceQueue(queue.keys)

    rows = torch.empty_like(new_keys)
    copy = Ceiling(name="one copy of the keys", side=Side(run=lambda: rows.copy_(new_keys)))

    def run_ours() -> None:
        queue.enqueue(new_keys)

    def run_theirs() -> None:
        reference.for_logits()
        reference.enqueue(new_keys)

    def agree() -> str:
        for turn in range(num_keys // num_new + 3):
            keys = new_keys.roll(turn, dims=0)
            queue.enqueue(keys)
            reference.enqueue(keys)
        require_close([queue.keys.T], [reference.queue], what="the queues", atol=0)
        if int(queue.pointer) != int(reference.pointer):
            raise Disagreement(f"pointers: {int(queue.pointer)} ours, {int(reference.pointer)} theirs")
        return "queue and pointer after more than one turn"

    peer = "the reference: copy + host sync"
    work = f"N={num_new}, K={num_keys}, C={DIM}"
    size = num_keys * DIM * 4 / 2**20
    yield Contest(
        peer=peer,
        work=f"{work} ({size:.0f} MiB), {name_place(device)}",
        unit="enqueues/s",
        amount=1,
        ours=Side(run=run_ours),
        theirs=Side(run=run_theirs),
        agree=agree,
        ceiling=copy,
    )
    if device == "cuda":
        yield Contest(
            peer=None,
            work=f"{work}, {NUM_CAPTURED} in one captured graph, {name_place(device)}",
            unit="enqueues/s",
            amount=NUM_CAPTURED,
            ours=Side(run=captured(run_ours, times=NUM_CAPTURED)),
            bar=Bar(1e6 / MAX_ENQUEUE_US, of="ours", full_size=setting.size == "full"),
            ceiling=Ceiling(name=copy.name, side=Side(run=captured(copy.side.run, times=NUM_CAPTURED))),
            note=f"the bar is {MAX_ENQUEUE_US} us of the GPU's time",
        )
    ours, theirs = (count_side(side, large_numel=num_keys * DIM) for side in (run_ours, run_theirs))
    none = Bar(0, of="ours", at_most=True)
    yield Count(
        peer=peer, work=work, unit="queue copies", ours=ours.num_large, theirs=theirs.num_large, bar=none
    )
    yield Count(
        peer=peer, work=work, unit="host syncs", ours=ours.num_syncs, theirs=theirs.num_syncs, bar=none
    )


class InfoNceSides:
    """Ours and cat + cross_entropy on the same rows; N, K as given."""

    def __init__(self, num: int, num_keys: int, *, device: str) -> None:
        self.name = f"loss + grad, N={num}, K={num_keys}, C={DIM}, fp32"
        generator = torch.Generator().manual_seed(0)
        rows = [normalize(torch.randn(n, DIM, generator=generator)).to(device) for n in (num, num, num_keys)]
        self.query, self.key = rows[0].requires_grad_(), normalize(rows[0].detach() + rows[1])
        self.negatives = rows[2]
        self.columns = self.negatives.T.contiguous()

    def ours(self) -> tuple[Tensor, ...]:
        """Loss, top-1, top-5, and the gradient of the queries."""
        return self._with_gradient(
            tuple(infonce(self.query, self.key, self.negatives, temperature=TEMPERATURE))
        )

    def theirs(self) -> tuple[Tensor, ...]:
        """The same by the peer."""
        return self._with_gradient(peers.infonce_cat(self.query, self.key, self.columns, TEMPERATURE))

    @torch.no_grad()
    def products(self) -> Tensor:
        """The two matrix products that any form has, over blocks of keys that a cache holds.

        In one block the N x K logits go through memory, which ours leaves out: 1.2 times ours on one core.
        """
        num, num_keys = len(self.query), len(self.negatives)
        size = chunk_size(num, num_keys, device_type=self.query.device.type)
        logits, found = self.query.new_empty(num, size), torch.zeros_like(self.query)
        for block in torch.split(self.negatives, size):
            found.addmm_(torch.mm(self.query, block.T, out=logits[:, : len(block)]), block)
        return found

    def agree(self) -> str:
        """What was found equal."""
        return require_close(
            self.ours(), self.theirs(), what="loss, top-1, top-5 and the gradient of the queries", atol=1e-5
        )

    def contest(self, where: str, *, bar: Bar) -> Contest:
        """Both sides, below the ceiling of two matrix products by ours' own blocks of keys."""
        return Contest(
            peer=INFONCE_PEER,
            work=f"{self.name}, {where}",
            unit="losses/s",
            amount=1,
            ours=Side(run=self.ours),
            theirs=Side(run=self.theirs),
            agree=self.agree,
            bar=bar,
            ceiling=Ceiling(name="its two matrix products, block by block", side=Side(run=self.products)),
        )

    def _with_gradient(self, found: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        self.query.grad = None
        found[0].backward()  # type: ignore[no-untyped-call]
        assert self.query.grad is not None
        return (*found, self.query.grad)


def bench_infonce(setting: Setting) -> Iterator[Contest | Count]:
    """Loss, its gradient and the pretext accuracy."""
    num, num_keys = setting.pick(tiny=(4, 64), quick=(256, 8192), full=(256, 65536))
    full_size = setting.size == "full"
    if setting.device == "cuda":
        for rows in (num, 4 * num):
            on_gpu = InfoNceSides(rows, num_keys, device="cuda")
            yield on_gpu.contest(name_place("cuda"), bar=Bar(8, full_size=full_size))
    sides = InfoNceSides(num, num_keys, device="cpu")
    if setting.device == "cpu":
        yield from _infonce_on_cpu(setting, sides, num * num_keys * 4)
    ours, theirs = (count_side(side, open_operators=True) for side in (sides.ours, sides.theirs))
    most_mib = 0.1 * num * (num_keys + 1) * 4 / 2**20
    yield Count(
        peer=INFONCE_PEER,
        work=sides.name,
        unit="MiB at peak",
        ours=ours.peak_bytes / 2**20,
        theirs=theirs.peak_bytes / 2**20,
        bar=Bar(round(most_mib, 2), of="ours", at_most=True, full_size=full_size),
        note="the bar is 10 % of N x (K + 1) floats",
    )


def _infonce_on_cpu(setting: Setting, sides: InfoNceSides, num_bytes: int) -> Iterator[Contest]:
    """On one core and on all. num_bytes: of one N x K tensor of the peer."""
    bar = Bar(2.8, full_size=setting.size == "full")
    # Fewer cores first: one_core gives all of them back.
    for cores, which in ((one_core(), "one core"), (contextlib.nullcontext(), "all cores")):
        with cores, heap_without_holes(num_bytes):
            yield sides.contest(f"{which}, memory as inside a step", bar=bar)


def require_close(
    ours: list[Tensor] | tuple[Tensor, ...],
    theirs: list[Tensor] | tuple[Tensor, ...],
    *,
    what: str,
    atol: float,
) -> str:
    """What was found equal. Raises Disagreement where any pair of tensors is further apart than atol."""
    if len(ours) != len(theirs):
        raise Disagreement(f"{what}: {len(ours)} tensors ours, {len(theirs)} theirs")
    apart = max(float((a - b).detach().abs().max()) for a, b in zip(ours, theirs, strict=True))
    if not apart <= atol:
        raise Disagreement(f"{what} lie {apart:.3g} apart, {atol:g} is allowed")
    return f"{what}, to {apart:.1e}"


def count_side(
    side: Callable[[], object], *, large_numel: int | None = None, open_operators: bool = False
) -> OpCounter:
    counter = OpCounter(large_numel=large_numel, open_operators=open_operators)
    with counter:
        side()
    return counter


def captured(run: Callable[[], object], *, times: int) -> Callable[[], object]:
    """So many calls on a GPU as one graph, so that the time is the GPU's and not that of launching."""
    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(times):
            run()
    return graph.replay


def name_place(device: str) -> str:
    """Where the work is done, for the record."""
    return name_threads() if device == "cpu" else "on the GPU"


def name_threads() -> str:
    num = torch.get_num_threads()
    return f"{num} thread{'s' if num > 1 else ''}"
