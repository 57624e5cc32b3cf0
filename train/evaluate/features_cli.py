"""`linerate features`: embeddings of a set of shards as a file."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import tyro
from rich.console import Console
from rich.table import Table

from linerate.pipeline.cache import CacheOptions, open_shards
from linerate.pipeline.evaluation_views import CropBackend
from linerate.shards.terminal import emit_json, parse_args, progress, require_counts

if TYPE_CHECKING:
    from linerate.shards.catalog import Catalog
    from linerate.train.checkpoint import TrainedEncoder
    from linerate.train.evaluate.feature_file import FeatureSource


@dataclass(frozen=True, kw_only=True)
class FeaturesCommand(CacheOptions):
    """Write the features of every sample, in the order of positions; the same command again goes on."""

    run: tyro.conf.Positional[Path]
    """Run folder, or one checkpoint of it."""
    shards: str
    """Folder that `linerate shard pack` made, or its URL (s3://, gs://, https://)."""
    out: Path
    """File to write: .parquet (sample_id, key, label, feature) or .npy (rows alone)."""
    features: Literal["backbone", "projection"] = "backbone"
    """The pooled features, or the C-dimensional queries (not normalised)."""
    size: int | None = None
    """Side of the images, pixels; None: the one of training."""
    dtype: Literal["float32", "float16"] = "float32"
    """How a number is stored."""
    batch: int = 256
    """Images that pass the encoder at once."""
    backend: CropBackend = "dali"
    """What makes the centre crops; both make the same to a grey level."""
    threads: int | None = None
    """Threads that decode; None: this process's cores."""
    json: bool = False
    """One JSON object on stdout instead of a table."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_counts(self, "size", "batch", "threads")


def main(argv: list[str]) -> int:
    """`linerate features RUN --shards S --out F.parquet`."""
    command = parse_args(FeaturesCommand, argv, prog="linerate features")

    import torch

    from linerate.train.checkpoint import load_trained
    from linerate.train.evaluate.feature_file import require_writable, write_features
    from linerate.train.evaluate.judge import encoder_features

    require_writable(command.out)
    trained, catalog = load_trained(command.run), open_shards(command.shards, command)
    source = describe_source(
        trained,
        catalog,
        features=command.features,
        size=command.size,
        dtype=command.dtype,
        backend=command.backend,
    )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with progress("features", total=catalog.num_samples, unit="images") as advance:
        dim = write_features(
            encoder_features(trained.encoder, command.features, device=device),
            catalog,
            source,
            out=command.out,
            backend=command.backend,
            device=device,
            batch=command.batch,
            num_threads=command.threads,
            advance=advance,
        )
    result = {"out": str(command.out), "dim": dim, "num_bytes": command.out.stat().st_size, **asdict(source)}
    if command.json:
        emit_json(result)
        return 0
    table = Table(title=str(command.out), title_justify="left", show_header=False)
    for name, value in result.items():
        table.add_row(name.replace("_", " "), f"{value:,}" if isinstance(value, int) else str(value))
    Console().print(table)
    return 0


def describe_source(
    trained: TrainedEncoder,
    catalog: Catalog,
    *,
    features: str,
    size: int | None,
    dtype: Literal["float32", "float16"] = "float32",
    backend: CropBackend = "dali",
) -> FeatureSource:
    """What the features will be of. Raises UserError where the encoder does not take that size."""
    import xxhash

    from linerate.train.evaluate.feature_file import FeatureSource

    size = size or trained.config.views.size
    trained.encoder.require_size(size)
    digest = xxhash.xxh3_64()
    for tensor in trained.encoder.state_dict().values():
        digest.update(tensor.contiguous().numpy())
    return FeatureSource(
        checkpoint=trained.path.name,
        weights_xxh3=digest.hexdigest(),
        plan_id=catalog.plan_id,
        num_samples=catalog.num_samples,
        features=features,
        size=size,
        dtype=dtype,
        backend=backend,
    )
