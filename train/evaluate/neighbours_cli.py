"""`linerate neighbours`: a page of images beside their nearest ones."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import tyro
from rich.console import Console

from linerate.pipeline.cache import CacheOptions, open_shards
from linerate.pipeline.evaluation_views import CropBackend
from linerate.shards.errors import UserError
from linerate.shards.terminal import emit_json, make_parent, parse_args, progress, require_counts

if TYPE_CHECKING:
    from linerate.shards.catalog import Catalog


@dataclass(frozen=True, kw_only=True)
class NeighboursCommand(CacheOptions):
    """An HTML page of queries with their nearest images; where there are classes, right ones are marked."""

    run: tyro.conf.Positional[Path]
    """Run folder, one checkpoint of it, or a .parquet that `linerate features` made of the shards."""
    shards: str
    """Folder that `linerate shard pack` made, or its URL (s3://, gs://, https://)."""
    out: Path
    """Page to write."""
    queries: int = 24
    """Rows of the page: one image of every class in turn."""
    k: int = 8
    """Neighbours of each."""
    limit: int = 20_000
    """Most images among which neighbours are looked for: the first ones, which packing shuffled."""
    features: Literal["backbone", "projection"] = "backbone"
    """What is compared: the pooled features, or the C-dimensional queries."""
    seed: int = 0
    """Which images are queries."""
    backend: CropBackend = "dali"
    """What makes the centre crops; both make the same to a grey level."""
    threads: int | None = None
    """Threads that decode; None: this process's cores."""
    json: bool = False
    """One JSON object on stdout instead of a line."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_counts(self, "queries", "k", "threads")
        if self.limit < 2:
            raise UserError(f"--limit {self.limit} leaves no image another to be near; give 2 or more")
        if self.run.suffix == ".npy":
            raise UserError(
                f"{self.run} holds rows alone, not which images they are of; give a .parquet of "
                "`linerate features`, or the run itself"
            )


def main(argv: list[str]) -> int:
    """`linerate neighbours RUN --shards S --out page.html`."""
    command = parse_args(NeighboursCommand, argv, prog="linerate neighbours")
    if command.out.suffix not in (".html", ".htm"):
        raise UserError(f"--out {command.out} does not end in .html; name it {command.out.stem}.html")

    import numpy as np

    from linerate.train.evaluate.neighbours import (
        find_neighbours,
        pick_queries,
        same_class_share,
        write_page,
    )

    make_parent(command.out)
    catalog = open_shards(command.shards, command)
    num = min(command.limit, catalog.num_samples)
    features, what = _features(command, catalog, num)
    label = np.concatenate([catalog.shard_index(shard).label for shard in range(catalog.num_shards)])[:num]
    queries = pick_queries(label, min(command.queries, num), seed=command.seed)
    found = find_neighbours(features, np.arange(num), queries, k=command.k)
    share = same_class_share(found, catalog)
    facts = f"{what}; {len(queries)} of {num:,} images, each with its {command.k} nearest by cosine."
    if share is not None:
        facts += f" {100 * share:.1f} % of the neighbours are of the query's class (green)."
    write_page(command.out, found, catalog, title=f"Nearest images in {command.shards}", facts=facts)
    if command.json:
        emit_json({"out": str(command.out), "num": num, "k": command.k, "same_class_share": share})
        return 0
    Console().print(f"{command.out}: {facts}", highlight=False, markup=False, soft_wrap=True)
    return 0


def _features(command: NeighboursCommand, catalog: Catalog, num: int) -> tuple[Any, str]:
    """(num, D) features of the first samples, and what they are of, in words."""
    import torch

    if command.run.suffix == ".parquet":
        from linerate.train.evaluate.feature_file import load_features

        stored, about = load_features(command.run)
        if (about["plan_id"], len(stored)) != (catalog.plan_id, catalog.num_samples):
            raise UserError(
                f"{command.run} is of other shards ({len(stored):,} samples, plan {about['plan_id']}) than "
                f"{command.shards} ({catalog.num_samples:,}, plan {catalog.plan_id}); name those of before"
            )
        rows = torch.from_numpy(stored[:num].astype("float32"))
        return rows, f"{about['features']} features of {about['checkpoint']}"

    import numpy as np

    from linerate.train.checkpoint import load_trained
    from linerate.train.evaluate.features import LabelledSet, extract_features
    from linerate.train.evaluate.judge import encoder_features

    trained = load_trained(command.run)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with progress("features", total=num, unit="images") as advance:
        found, _ = extract_features(
            encoder_features(trained.encoder, command.features, device=device),
            LabelledSet(catalog, np.arange(num)),
            size=trained.config.views.size,
            backend=command.backend,
            device=device,
            num_threads=command.threads,
            advance=advance,
        )
    return found, f"{command.features} features of {trained.path.name}"
