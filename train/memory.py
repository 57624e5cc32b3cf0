"""How much memory a rank needs, counted without doing the work: the encoder runs on shapes alone.

Legend: N images on a rank, K keys, C dimensions.
"""

from __future__ import annotations

import torch
from torch import Tensor

from linerate.pipeline.host_memory import SampleSize, predict_host_memory
from linerate.shards.errors import UserError
from linerate.train.config import TrainConfig
from linerate.train.encoder import Encoder, build_encoder
from linerate.train.infonce import chunk_size
from linerate.train.launch import loader_threads, resolve_precision
from linerate.train.memory_bank import own_rows
from linerate.train.plan import ShardTable

FLOAT_BYTES = 4


def estimate_memory(
    config: TrainConfig, *, rank_batch: int, num_samples: int | None = None
) -> dict[str, int]:
    """Bytes on one rank by what they hold, with their sum as `total`.

    Counted: parameters of the encoders, gradients and SGD's buffer of one, the dictionary, the views at hand,
    the activations that backward needs, and the logits at hand. Not counted: the allocator's and the
    libraries' own, some hundred MiB on a GPU. num_samples: of the data set; a memory bank has a row for each.
    """
    with torch.device("meta"):
        model = config.model
        encoder = build_encoder(model.encoder, dim=model.dim, head=model.head, stem=model.stem)
    encoder.require_size(config.views.size)
    parameters = sum(p.numel() for p in encoder.parameters()) * FLOAT_BYTES
    image = 3 * config.views.size**2
    narrow = 2 if resolve_precision(config.speed) == "bf16" else 1
    at_once = config.speed.micro_batch or rank_batch
    # End-to-end keeps the activations of the keys' forward, too.
    forwards = 2 if config.dictionary.dictionary == "end-to-end" else 1
    has_both = config.dictionary.dictionary == "queue"
    parts = {
        "parameters of both encoders" if has_both else "parameters": (1 + has_both) * parameters,
        "gradients and momentum": 2 * parameters,
        **_dictionary_bytes(config, rank_batch=rank_batch, num_samples=num_samples),
        "views": 2 * rank_batch * image,
        "activations": forwards * at_once * activation_bytes(encoder, size=config.views.size) // narrow,
        "logits": _logit_bytes(config, num_queries=at_once),
    }
    return {**parts, "total": sum(parts.values())}


def _dictionary_bytes(config: TrainConfig, *, rank_batch: int, num_samples: int | None) -> dict[str, int]:
    about, row = config.dictionary, config.model.dim * FLOAT_BYTES
    batch = config.optim.global_batch
    if about.dictionary == "queue":
        return {"queue": about.num_keys * row // (2 if about.queue_dtype == "bf16" else 1)}
    if about.dictionary == "end-to-end":
        return {"keys": batch * row}
    if num_samples is None:
        raise UserError("a memory bank has a row for every sample; name the data set with --shards")
    world_size = batch // rank_batch
    _, num_rows = own_rows(num_samples, rank=0, world_size=world_size)
    return {"memory bank": (num_rows + 1) * row, "rows drawn": (batch + about.num_keys) * row}


def _logit_bytes(config: TrainConfig, *, num_queries: int) -> int:
    if config.dictionary.dictionary == "end-to-end":
        return num_queries * config.optim.global_batch * FLOAT_BYTES
    device = "cuda" if torch.cuda.is_available() else "cpu"
    num_keys = config.dictionary.num_keys
    return 2 * num_queries * chunk_size(num_queries, num_keys, device_type=device) * FLOAT_BYTES


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
