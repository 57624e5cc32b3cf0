"""How much memory a rank needs, counted without doing the work: the encoder runs on shapes alone.

Legend: N images on a rank, K keys, C dimensions.
"""

from __future__ import annotations

import torch
from torch import Tensor

from linerate.pipeline.host_memory import SampleSize, predict_host_memory
from linerate.train.config import TrainConfig
from linerate.train.encoder import Encoder, build_encoder
from linerate.train.infonce import chunk_size
from linerate.train.launch import loader_threads, resolve_precision
from linerate.train.plan import ShardTable

FLOAT_BYTES = 4


def estimate_memory(config: TrainConfig, *, rank_batch: int) -> dict[str, int]:
    """Bytes on one rank by what they hold, with their sum as `total`.

    Counted: parameters of both encoders, gradients and SGD's buffer of one, the queue, the views at hand, the
    activations that the query encoder's backward needs, and the chunk of logits that InfoNCE streams. Not
    counted: the allocator's and the libraries' own, some hundred MiB on a GPU.
    """
    with torch.device("meta"):
        model = config.model
        encoder = build_encoder(model.encoder, dim=model.dim, head=model.head, stem=model.stem)
    encoder.require_size(config.views.size)
    parameters = sum(p.numel() for p in encoder.parameters()) * FLOAT_BYTES
    image = 3 * config.views.size**2
    num_keys = config.dictionary.num_keys
    device = "cuda" if torch.cuda.is_available() else "cpu"
    narrow = 2 if resolve_precision(config.speed) == "bf16" else 1
    parts = {
        "parameters of both encoders": 2 * parameters,
        "gradients and momentum": 2 * parameters,
        "queue": num_keys * model.dim * FLOAT_BYTES,
        "views": 2 * rank_batch * image,
        "activations": rank_batch * activation_bytes(encoder, size=config.views.size) // narrow,
        "logits": 2 * rank_batch * chunk_size(rank_batch, num_keys, device_type=device) * FLOAT_BYTES,
    }
    return {**parts, "total": sum(parts.values())}


def estimate_host_memory(
    config: TrainConfig, sample: SampleSize, shards: ShardTable, *, world_size: int
) -> dict[str, int] | None:
    """Host bytes of one rank's loader, were every sample of that size; None: its backend cannot be foreseen.

    On a CPU the device's memory, of `estimate_memory`, is the host's too and comes on top.
    """
    return predict_host_memory(
        sample,
        shard_sizes=shards.sizes,
        backend=config.views.backend,
        on_gpu=torch.cuda.is_available(),
        size=config.views.size,
        rank_batch=config.rank_batch(world_size),
        rank_lanes=config.lanes // world_size,
        num_threads=loader_threads(config.speed),
        prefetch=config.speed.prefetch,
    )


def activation_bytes(encoder: Encoder, *, size: int) -> int:
    """Bytes in float32 that one image leaves behind for the backward pass. encoder: on the meta device."""
    saved: dict[int, tuple[Tensor, int]] = {}
    weights = {parameter.untyped_storage()._cdata for parameter in encoder.parameters()}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            # The tensor is kept, too: a freed storage's address could come again.
            saved[storage._cdata] = (tensor, storage.nbytes())
        return tensor

    images = torch.empty(2, 3, size, size, device="meta")
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        encoder(images)
    return sum(size for _, size in saved.values()) // len(images)
