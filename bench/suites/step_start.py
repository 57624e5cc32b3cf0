"""Where both sides of the benchmark `step` start: encoder, queue and views, the same on every call.

Apart from step.py because a peer's worker imports it, in an environment with little besides torch and timm.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from linerate.train.encoder import Encoder, build_encoder
from linerate.train.key_queue import KeyQueue

DIM = 128
TEMPERATURE = 0.07
EMA_MOMENTUM = 0.999
LR = 0.03


def start(
    name: str, *, num_keys: int, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> tuple[Encoder, KeyQueue]:
    """An encoder and a queue, the same on every call."""
    torch.manual_seed(0)
    encoder: Encoder = build_encoder(name, dim=DIM, stem="cifar" if name.startswith("tiny") else "imagenet")
    queue = KeyQueue(num_keys, DIM, dtype=dtype)
    return encoder.to(device=device, dtype=dtype), queue.to(device)


def curve_views(steps: int, batch: int, size: int, *, device: str = "cpu") -> Iterator[list[Tensor]]:
    """Query and key views of each step of a loss curve, the same on every call."""
    for step in range(steps):
        yield [random_views(batch, size, seed=10 * step + view, device=device) for view in (0, 1)]


def random_views(batch: int, size: int, *, seed: int, device: str = "cpu") -> Tensor:
    """(N, 3, S, S) uint8 with channels_last strides."""
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (batch, size, size, 3), dtype=torch.uint8, generator=generator)
    return pixels.to(device).permute(0, 3, 1, 2)
