import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor, nn

from linerate.train.encoder import build_encoder
from linerate.train.key_queue import KeyQueue
from linerate.train.shuffle_bn import KeyShuffle
from linerate.train.step import MoCo, train_step

NUM, SIDE, KEYS, DIM, STEPS = 16, 16, 50, 8, 20


def load_neighbour(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def pixels(seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    image = torch.randint(0, 256, (NUM, SIDE, SIDE, 3), dtype=torch.uint8, generator=generator)
    return image.permute(0, 3, 1, 2)


def make_smooth(encoder: nn.Module) -> None:
    """Softplus in place of every ReLU.

    In float32 the two sides' sums differ in their last bits. A ReLU whose input lies that near to zero then
    lets a gradient through on one side alone: with ReLU all gradients agreed to 1e-6 until some step, where
    one jumped to 1e-3 at once. The step is the same whatever the encoder; float64 keeps its ReLUs.
    """
    for module in list(encoder.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.ReLU):
                setattr(module, name, nn.Softplus())


@pytest.mark.parametrize(
    ("dtype", "bn_group", "micro_batch"),
    [
        (torch.float32, None, None),
        (torch.float32, 8, None),
        (torch.float64, None, None),
        (torch.float64, 4, None),
        (torch.float64, 4, 8),
    ],
)
def test_the_step_is_the_paper_s_algorithm_1(
    dtype: torch.dtype, bn_group: int | None, micro_batch: int | None
) -> None:
    """Loss, gradients, both encoders, queue and pointer over 20 steps; K is no multiple of N."""
    torch.manual_seed(0)
    encoder = build_encoder("tiny-resnet-w4", dim=DIM, head="mlp", stem="cifar").to(dtype)
    if dtype == torch.float32:
        make_smooth(encoder)
    queue = KeyQueue(KEYS, DIM, dtype=dtype)
    paper = load_neighbour("algorithm1").Algorithm1(
        encoder, queue.keys, t=0.2, m=0.99, lr=0.03, group=bn_group
    )
    shuffle = KeyShuffle(seed=5)
    moco = MoCo(encoder, queue, temperature=0.2, ema_momentum=0.99, bn_group=bn_group, shuffle=shuffle)
    sgd = torch.optim.SGD(encoder.parameters(), lr=0.03, momentum=0.9, weight_decay=1e-4, foreach=True)
    losses = []
    for step in range(STEPS):
        views = pixels(2 * step), pixels(2 * step + 1)
        metrics = train_step(moco, *views, sgd, step=step, micro_batch=micro_batch)
        loss = paper.iterate(*views, shuffle.permutation(step, global_batch=NUM))
        losses.append((metrics.loss, loss))
        bound = 1e-6 if dtype == torch.float32 else 1e-10
        bounds = {"rtol": bound, "atol": bound}
        torch.testing.assert_close(metrics.loss, loss, **bounds)
        for mine, other in zip(encoder.parameters(), paper.f_q.parameters(), strict=True):
            torch.testing.assert_close(mine.grad, other.grad, **bounds)
            torch.testing.assert_close(mine, other, **bounds)
        for mine, other in zip(moco.key_encoder.parameters(), paper.f_k.parameters(), strict=True):
            torch.testing.assert_close(mine, other, **bounds)
        torch.testing.assert_close(queue.keys, paper.queue.T, **bounds)
        assert int(queue.pointer) == paper.pointer
    # Not a standstill that would agree with anything.
    assert len({round(float(mine), 4) for mine, _ in losses}) > STEPS // 2
