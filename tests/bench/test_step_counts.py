"""Exact counts of a step, the same on any machine: a change that makes one rise fails here, before any clock.

Where a count falls, or must rise for a good reason, change the number here and say why in the commit.
"""

from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from linerate.bench.counting import OpCounter
from linerate.bench.suites.shuffle_bn import fake_ranks
from linerate.bench.suites.step import _trace, build_sides
from linerate.train.encoder import build_encoder
from linerate.train.key_queue import KeyQueue
from linerate.train.shuffle_bn import KeyShuffle, bn_modules
from linerate.train.step import MoCo, train_step

# Inputs and outputs of all of them, read or written once.
STEP_BYTES = 144_790_982_896
NUM, SIDE, DIM, KEYS, RANKS = 16, 8, 8, 4096, 8


def test_a_step_of_resnet50_is_749_operations_of_so_many_bytes_and_waits_at_no_time() -> None:
    """bf16 autocast, batch 256, K 65536, one BN group: the count of `linerate bench run step`."""
    ours, _ = build_sides("resnet50", num_keys=65536, autocast=True)
    counter = _trace(ours, 256, 224)
    assert (counter.num_ops, counter.num_syncs) == (749, 0)
    assert counter.num_bytes == STEP_BYTES


def counted(*, ranks: int, sync_bn: bool = False, symmetric: bool = False, block: int | None = None) -> Any:
    """Counts of the second step of the first of so many ranks, which alone exists."""
    torch.manual_seed(0)
    encoder = build_encoder("tiny-resnet-w4", dim=DIM, stem="cifar")
    shuffle = KeyShuffle(world_size=ranks, block=block, enabled=not sync_bn)
    moco = MoCo(
        encoder,
        KeyQueue(KEYS, DIM),
        symmetric=symmetric,
        bn_group=None if sync_bn else NUM,
        sync_bn=sync_bn,
        shuffle=shuffle,
    )
    sgd = torch.optim.SGD(encoder.parameters(), lr=0.1, momentum=0.9, foreach=True)
    images = torch.zeros(NUM, SIDE, SIDE, 3, dtype=torch.uint8).permute(0, 3, 1, 2)
    with fake_ranks(ranks):
        train_step(moco, images, images, sgd, step=0)
        with OpCounter(large_numel=KEYS * DIM) as counter:
            train_step(moco, images, images, sgd, step=1)
    assert counter.num_large == 0, "the queue was copied"
    return counter, len(list(bn_modules(encoder)))


@pytest.mark.parametrize("symmetric", [False, True])
def test_each_key_forward_sends_every_image_once_as_bytes_and_gathers_the_keys(symmetric: bool) -> None:
    counter, _ = counted(ranks=RANKS, symmetric=symmetric)
    forwards = 2 if symmetric else 1
    images, keys = NUM * 3 * SIDE * SIDE, RANKS * NUM * DIM * 4
    assert counter.num_collectives == forwards * 2
    assert counter.collective_bytes == forwards * (images + keys)


def test_a_shuffle_within_a_rank_sends_the_keys_alone() -> None:
    counter, _ = counted(ranks=RANKS, block=NUM)
    assert (counter.num_collectives, counter.collective_bytes) == (1, RANKS * NUM * DIM * 4)


def test_one_rank_sends_nothing() -> None:
    counter, _ = counted(ranks=1)
    assert counter.num_collectives == 0


def test_bn_over_all_ranks_costs_three_small_collectives_a_layer() -> None:
    """One in each encoder's forward and one in the query's backward, besides the gather of the keys."""
    counter, num_layers = counted(ranks=RANKS, sync_bn=True)
    assert counter.num_collectives == 3 * num_layers + 1


def test_infonce_is_two_launches_and_the_update_with_the_ema_one(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton", reason="how often the Triton kernels are launched stays untested")
    from linerate.train.kernels import infonce, sgd_ema

    device = "cuda" if torch.cuda.is_available() else "cpu"
    launched: list[str] = []

    def count(module: ModuleType, *names: str) -> None:
        for name in names:
            monkeypatch.setattr(module, name, Launches(getattr(module, name), name, launched))

    count(infonce, "_sweep", "_combine")
    count(sgd_ema, "_update")
    rows = torch.nn.functional.normalize(torch.ones(4, 16, device=device))
    infonce.infonce_kernels(rows, rows, torch.cat([rows] * 20), 0.2)
    assert launched == ["_sweep", "_combine"]
    launched.clear()

    def tensors() -> list[Tensor]:
        return [torch.zeros(3, 5, device=device), torch.zeros(7, device=device)]

    update = sgd_ema.SgdEma(tensors(), tensors(), tensors())
    for _ in range(2):
        update.step(tensors(), lr=0.1, sgd_momentum=0.9, weight_decay=0.0, ema_momentum=0.9)
    assert launched == ["_update"] * 2


class Launches:
    """A kernel that notes its launches."""

    def __init__(self, kernel: Any, name: str, launched: list[str]) -> None:
        self.kernel, self.name, self.launched = kernel, name, launched

    def __getitem__(self, grid: Any) -> Any:
        self.launched.append(self.name)
        return self.kernel[grid]
