"""What the kNN monitor takes of rank 0's memory while it judges, counted without doing the work.

Legend: N train images, M test images, D dimensions of a feature.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from linerate.pipeline.evaluation_views import AHEAD_BATCHES, batch_within
from linerate.pipeline.host_memory import SampleSize, predict_host_memory
from linerate.shards.catalog import Catalog
from linerate.train.config import TrainConfig, Watch
from linerate.train.encoder import Encoder, build_encoder
from linerate.train.evaluate.features import EVALUATION_BATCH
from linerate.train.evaluate.knn import TEST_CHUNK, TRAIN_CHUNK
from linerate.train.launch import loader_threads
from linerate.train.memory import FLOAT_BYTES
from linerate.train.switches import resolve_precision

ON_HOST = "kNN monitor on rank 0"
ON_DEVICE = "kNN monitor on rank 0, beyond a step"
"""The part's names in the two tables."""


def has_monitor(watch: Watch, catalog: Catalog | None) -> bool:
    """Whether kNN would be watched: of training shards without classes it is not, unless others vote."""
    labelled = catalog is None or bool(catalog.class_names)
    return watch.knn_epochs > 0 and (labelled or watch.knn_train is not None)


def add_monitor(
    device: dict[str, int],
    host: dict[str, int] | None,
    config: TrainConfig,
    sample: SampleSize,
    *,
    num_samples: int,
) -> tuple[dict[str, int], dict[str, int] | None]:
    """The tables of estimate_memory and estimate_host_memory, with what the monitor adds to them.

    On the device that is what it needs beyond a step's activations and logits, whose place it takes; DALI's
    pipeline on the host is there besides the loader's. num_samples: of the training shards; of others that
    are named for the monitor --knn-limit images are counted, each of the size of sample.
    """
    batch = batch_within(EVALUATION_BATCH, decoded_bytes=sample.decoded_bytes)
    if config.views.backend != "dali":
        batch = EVALUATION_BATCH
    on_gpu = torch.cuda.is_available()
    need = _judging_bytes(config, batch=batch, num_samples=num_samples)
    if on_gpu:
        need += _loading_bytes(config, sample, batch=batch, on_gpu=False, parts=("decoded images",))
    beyond = max(0, need - device["activations"] - device["logits"])
    parts = ("pipeline", "views", "JPEG bytes", "decoded images", "decoders")
    on_host = _loading_bytes(config, sample, batch=batch, on_gpu=on_gpu, parts=parts)
    return _with(device, ON_DEVICE, beyond), None if host is None else _with(host, ON_HOST, on_host)


def _with(table: dict[str, int], name: str, size: int) -> dict[str, int]:
    parts = {part: value for part, value in table.items() if part != "total"}
    return {**parts, name: size, "total": table["total"] + size}


def _loading_bytes(
    config: TrainConfig, sample: SampleSize, *, batch: int, on_gpu: bool, parts: tuple[str, ...]
) -> int:
    """What those parts of a loader take that makes one crop of each image."""
    by_dali = config.views.backend == "dali"
    options: dict[str, Any] = {"size": config.views.size, "prefetch": AHEAD_BATCHES, "rank_lanes": 1}
    found = predict_host_memory(
        sample,
        shard_sizes=np.array([1]),
        backend="dali" if by_dali else "synthetic",
        on_gpu=on_gpu,
        rank_batch=batch,
        num_threads=loader_threads(config.speed),
        **options,
    )
    assert found is not None
    found["views"] //= 2
    if not by_dali:
        # Pillow in threads: each decodes one image at a time, from batches that are read ahead.
        found["JPEG bytes"] = (AHEAD_BATCHES + 1) * batch * sample.num_bytes
        found["decoded images"] = loader_threads(config.speed) * sample.decoded_bytes
    return sum(size for name, size in found.items() if name in parts)


def _judging_bytes(config: TrainConfig, *, batch: int, num_samples: int) -> int:
    """The features of both sets, and the larger of a forward of one batch and one chunk's similarities."""
    model = config.model
    with torch.device("meta"):
        encoder = build_encoder(model.encoder, dim=model.dim, head=model.head, stem=model.stem)
    dim = encoder.num_features if config.watch.knn_features == "backbone" else model.dim
    num_train, num_test = num_judged(config.watch, num_samples)
    chunk = min(num_train, TRAIN_CHUNK)
    similarities = chunk * (dim + min(num_test, TEST_CHUNK)) * FLOAT_BYTES
    narrow = 1 if resolve_precision(config.speed) == "fp32" else 2
    forward = batch * forward_bytes(encoder, size=config.views.size) // narrow
    return (num_train + num_test) * dim * FLOAT_BYTES + max(similarities, forward)


def num_judged(watch: Watch, num_samples: int) -> tuple[int, int]:
    """(N, M) at most."""
    limit, held_out = watch.knn_limit, round(num_samples * watch.knn_test_share)
    num_train = limit if watch.knn_train else num_samples if watch.knn_test else num_samples - held_out
    num_test = limit if watch.knn_train or watch.knn_test else held_out
    return min(limit, num_train), min(limit, num_test)


@torch.no_grad()
def forward_bytes(encoder: Encoder, *, size: int) -> int:
    """Bytes in float32 that a forward without gradient holds at once for one image, on the meta device.

    The input and the output of the layer with the most of them, and the largest output once more: a shortcut.
    """
    at_hand, largest = 0, 0

    def look(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        nonlocal at_hand, largest
        at_hand = max(at_hand, output.nbytes + sum(one.nbytes for one in inputs))
        largest = max(largest, output.nbytes)

    leaves = [module for module in encoder.modules() if not list(module.children())]
    hooks = [module.register_forward_hook(look) for module in leaves]
    encoder.eval()(torch.empty(1, 3, size, size, device="meta"))
    for hook in hooks:
        hook.remove()
    return at_hand + largest
