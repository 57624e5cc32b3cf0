"""kNN on a split of labelled shards, for the monitor in training and for `linerate eval knn` alike."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from linerate.pipeline.evaluation_views import CropBackend
from linerate.shards.errors import UserError
from linerate.train.checkpoint import TrainedEncoder
from linerate.train.encoder import Encoder
from linerate.train.evaluate.controls import calibrate_bn, raw_pixels, untrained_encoder
from linerate.train.evaluate.features import Encode, Split, extract_features, open_evaluation
from linerate.train.evaluate.knn import knn_accuracy_over_ranks

Features = Literal["backbone", "projection"]
CALIBRATION_IMAGES = 2048


@dataclass(frozen=True, kw_only=True)
class KnnOptions:
    """How kNN judges."""

    size: int
    """Side of the images, pixels."""
    k: int = 200
    """Neighbours that vote."""
    temperature: float = 0.1
    """A neighbour's vote weighs exp(cosine / temperature)."""
    backend: CropBackend = "dali"
    """What makes the centre crops."""
    device: str = "cpu"
    num_threads: int | None = None
    """Threads that decode; None: this process's cores."""
    rank: int = 0
    world_size: int = 1
    """Ranks that share the images; torch.distributed is there if they are several."""


def judge_by_knn(
    encode: Encode, split: Split, options: KnnOptions, *, advance: Callable[[float], None] = lambda _: None
) -> dict[str, Any]:
    """knn_top1 in [0, 1] and the images it stands on. advance is told how many images this rank has done.

    Raises UserError where a rank would have no image.
    """
    if min(len(split.train), len(split.test)) < options.world_size:
        raise UserError(
            f"{len(split.train):,} train and {len(split.test):,} test images are too few for "
            f"{options.world_size} ranks; start fewer"
        )
    (train, train_labels), (test, test_labels) = (
        extract_features(
            encode,
            part.share(rank=options.rank, world_size=options.world_size),
            size=options.size,
            backend=options.backend,
            device=options.device,
            num_threads=options.num_threads,
            advance=advance,
        )
        for part in (split.train, split.test)
    )
    top1 = knn_accuracy_over_ranks(
        train,
        train_labels,
        test,
        test_labels,
        k=options.k,
        temperature=options.temperature,
        num_classes=split.num_classes,
        rank=options.rank,
        world_size=options.world_size,
    )
    counts = {"num_train": len(split.train), "num_test": len(split.test)}
    return {"knn_top1": top1, **counts, "dim": train.shape[1]}


def encoder_features(encoder: Encoder, features: Features, *, device: str) -> Encode:
    """The encoder, moved to the device, in eval mode, as a function of uint8 images."""
    moved = encoder.to(device).eval()
    return moved.features if features == "backbone" else moved


def contestants(
    trained: TrainedEncoder, split: Split, options: KnnOptions, *, features: Features = "backbone"
) -> dict[str, Encode]:
    """The trained encoder and its two controls, in this order: trained, untrained, raw pixels.

    The untrained encoder gets the BN statistics of some of the images that vote.
    """
    untrained = untrained_encoder(trained.config).to(options.device)
    samples = split.train.first(CALIBRATION_IMAGES)
    batches = open_evaluation(
        samples,
        size=options.size,
        backend=options.backend,
        device=options.device,
        num_threads=options.num_threads,
    )
    calibrate_bn(untrained, (part.images for part in batches))
    return {
        f"step {trained.step:,}": encoder_features(trained.encoder, features, device=options.device),
        "untrained encoder": encoder_features(untrained, features, device=options.device),
        "raw pixels": raw_pixels,
    }
