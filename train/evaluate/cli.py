"""`linerate eval knn`."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import tyro
from rich.console import Console
from rich.table import Table

from linerate.pipeline.cache import CacheOptions, open_shards
from linerate.pipeline.evaluation_views import CropBackend
from linerate.shards.errors import UserError
from linerate.shards.terminal import emit_json, parse_args, progress, require_counts, stderr

if TYPE_CHECKING:
    from linerate.train.checkpoint import TrainedEncoder
    from linerate.train.evaluate.features import Split
    from linerate.train.evaluate.judge import KnnOptions


@dataclass(frozen=True, kw_only=True)
class KnnCommand(CacheOptions):
    """kNN on an encoder's features: no training, no parameters."""

    run: tyro.conf.Positional[Path]
    """Run folder, or one checkpoint of it."""
    train: str
    """Labelled shards that vote: a folder or a URL (s3://, gs://, https://)."""
    test: str | None = None
    """Labelled shards that are judged; without them a share of --train is held out."""
    test_share: float = 0.1
    """Share of --train that is held out, by a hash of the sample's id."""
    k: int = 200
    """Neighbours that vote."""
    temperature: float = 0.1
    """A neighbour's vote weighs exp(cosine / temperature)."""
    features: Literal["backbone", "projection"] = "backbone"
    """What is compared: the pooled features, or the C-dimensional queries."""
    size: int | None = None
    """Side of the images, pixels; None: the one of training."""
    controls: bool = False
    """Also judge raw pixels and the encoder before its first step, on the same images."""
    backend: CropBackend = "dali"
    """What makes the centre crops; both make the same to a grey level."""
    threads: int | None = None
    """Threads that decode; None: this process's cores."""
    json: bool = False
    """One JSON object on stdout instead of a table."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_counts(self, "size", "threads")
        if not 0 < self.test_share < 1:
            raise UserError(f"--test-share {self.test_share} must lie between 0 and 1, as 0.1")
        if self.k < 1 or not self.temperature > 0:
            raise UserError(f"--k {self.k} must be at least 1, --temperature {self.temperature:g} above 0")


def main_knn(argv: list[str]) -> int:
    """`linerate eval knn RUN --train SHARDS [--test SHARDS] [--controls]`."""
    command = parse_args(KnnCommand, argv, prog="linerate eval knn")
    result = run_knn(command)
    if result is None:
        return 0
    if command.json:
        emit_json(result)
        return 0
    num_train, num_test = (result["results"][0][name] for name in ("num_train", "num_test"))
    title = f"kNN, k {command.k}, T {command.temperature:g}, {num_train:,} images vote"
    table = Table("features", "dimensions", f"top-1 of {num_test:,}", title=title, title_justify="left")
    for row in result["results"]:
        table.add_row(row["name"], f"{row['dim']:,}", f"{100 * row['knn_top1']:.1f} %")
    Console().print(table)
    return 0


def run_knn(command: KnnCommand) -> dict[str, Any] | None:
    """What the command prints: how it was judged, and one result for the encoder and each control.

    Under torchrun the ranks share the images; None on all but the first.
    """
    from linerate.train.checkpoint import load_trained
    from linerate.train.evaluate.classify import open_ranks
    from linerate.train.evaluate.judge import KnnOptions
    from linerate.train.evaluate.labelled import open_labelled_split

    trained = load_trained(command.run)
    test = open_shards(command.test, command) if command.test else None
    labelled = open_labelled_split(open_shards(command.train, command), test, test_share=command.test_share)
    size = command.size or trained.config.views.size
    trained.encoder.require_size(size)
    with open_ranks(bf16=False) as accelerator:
        is_first = accelerator.is_main_process
        options = KnnOptions(
            size=size,
            k=command.k,
            temperature=command.temperature,
            backend=command.backend,
            device="cpu" if accelerator.device.type == "cpu" else str(accelerator.device),
            num_threads=command.threads,
            rank=accelerator.process_index,
            world_size=accelerator.num_processes,
        )
        for note in labelled.notes if is_first else ():
            stderr.print(f"note: {note}", highlight=False, markup=False, soft_wrap=True)
        results = _judged(command, trained, labelled.split, options)
    if not is_first:
        return None
    return {
        "run": str(command.run),
        "checkpoint": str(trained.path),
        "step": trained.step,
        "features": command.features,
        "k": options.k,
        "temperature": options.temperature,
        "size": options.size,
        "world_size": options.world_size,
        "num_classes": labelled.num_classes,
        "num_test_in_train": labelled.num_test_in_train,
        "notes": [*labelled.notes],
        "results": results,
    }


def _judged(
    command: KnnCommand, trained: TrainedEncoder, split: Split, options: KnnOptions
) -> list[dict[str, Any]]:
    from linerate.train.evaluate.judge import contestants, encoder_features, judge_by_knn

    if command.controls:
        entries = contestants(trained, split, options, features=command.features)
    else:
        encode = encoder_features(trained.encoder, command.features, device=options.device)
        entries = {f"step {trained.step:,}": encode}
    results = []
    total = (len(split.train) + len(split.test)) // options.world_size
    for name, encode in entries.items():
        with contextlib.ExitStack() as stack:
            advance = (
                stack.enter_context(progress(name, total=total, unit="images"))
                if options.rank == 0
                else lambda _: None
            )
            results.append({"name": name, **judge_by_knn(encode, split, options, advance=advance)})
    return results
