"""What shuffling BN sends: bytes that a rank's collectives fill in one step. Exact, and without other ranks.

Torch's fake process group stands in for the other ranks: collectives are called but move nothing.
"""

import contextlib
from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

from linerate.bench.contest import Bar, Count, Disagreement, Setting
from linerate.bench.counting import OpCounter
from linerate.train.shuffle_bn import KeyShuffle

DIM = 128
WORLD_SIZE = 4


def bench_shuffle_bn(setting: Setting) -> Iterator[Count]:
    """Across ranks, and within a rank of several groups, against the reference's all-gather of floats."""
    batch, size = setting.pick(tiny=(8, 32), quick=(32, 224), full=(32, 224))
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (batch, size, size, 3), dtype=torch.uint8, generator=generator)
    images = pixels.permute(0, 3, 1, 2)
    with fake_ranks(WORLD_SIZE):
        across, within = (
            _filled(partial(KeyShuffle(block=block, world_size=WORLD_SIZE).encode, _encode, images, step=0))
            for block in (None, batch)
        )
        reference = _filled(lambda: _all_gather_floats(images))
    features = batch * WORLD_SIZE * DIM * 4
    peer = "the reference: all-gather of float images"
    work = f"key images of a rank and step: {WORLD_SIZE} ranks of {batch} images of {size} px"
    # The gather of the keys is not shuffling: enqueueing needs it in every form.
    if min(across, within, reference) < features:
        raise Disagreement(f"a form gathers fewer than the {features} bytes of the keys")
    yield Count(
        peer=peer,
        work=f"{work}, one BN group a rank",
        unit="bytes",
        ours=across - features,
        theirs=reference - features,
        bar=Bar(2.0 * WORLD_SIZE),
        note="the bar is 1/world x 1/2 of the reference's bytes",
    )
    yield Count(
        peer=peer,
        work=f"{work}, several BN groups a rank",
        unit="bytes",
        ours=within - features,
        theirs=reference - features,
        bar=Bar(0, of="ours", at_most=True),
    )


def _encode(images: Tensor) -> Tensor:
    return torch.zeros(len(images), DIM)


def _all_gather_floats(images: Tensor) -> None:
    """Images and features of all ranks on every rank, as in facebookresearch/moco."""
    for rows in (images.float(), _encode(images)):
        gathered = [torch.empty_like(rows) for _ in range(WORLD_SIZE)]
        dist.all_gather(gathered, rows.contiguous())


def _filled(side: Callable[[], object]) -> int:
    counter = OpCounter()
    with counter:
        side()
    return counter.collective_bytes


@contextlib.contextmanager
def fake_ranks(world_size: int) -> Iterator[None]:
    """A process group of which only this rank exists. Raises RuntimeError inside a real one."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    if dist.is_initialized():
        raise RuntimeError("a process group is open already; run the benchmark in a process of its own")
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world_size)
    try:
        yield
    finally:
        dist.destroy_process_group()
