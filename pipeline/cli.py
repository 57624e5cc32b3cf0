"""`linerate views`: look at the views that training sees, and at the order it sees them in."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from rich.console import Console
from rich.table import Table

from linerate.pipeline.loader import BACKENDS
from linerate.pipeline.order import DEFAULT_WINDOW_SHARDS, EpochOrder, default_num_lanes
from linerate.pipeline.preview import draw_sheet, find_position, see_samples
from linerate.pipeline.reader import ShardReader
from linerate.pipeline.recipe import RECIPES, find_recipe
from linerate.pipeline.shuffle_quality import measured_steps, shuffle_quality
from linerate.shards.catalog import Catalog
from linerate.shards.errors import UserError
from linerate.shards.terminal import emit_json, make_parent, nearest, parse_args

DRAWN_BACKENDS = tuple(b for b in BACKENDS if b != "synthetic")


@dataclass(frozen=True, kw_only=True)
class ViewsArgs:
    """Draw images beside their two views, exactly as training with the same seed sees them.

    The picture marks both crop windows in the stored image. --sample and --epoch replay any view;
    --order prints how an epoch is read and how well it is shuffled.
    """

    recipe: tyro.conf.Positional[str]
    """v1, v2 or v3."""
    shards: Path
    """The folder that `linerate shard pack` wrote."""
    out: Path = Path("views.png")
    """The picture, PNG."""
    sample: tuple[int, ...] = ()
    """Ids of the samples to draw (as the tar names them); without it some from all over the shards."""
    samples: int = 8
    """How many samples, where --sample names none."""
    epoch: int = 0
    """The epoch whose views are drawn."""
    epochs: int = 1
    """Draw so many epochs from there on."""
    size: int = 224
    """Height and width of a view in pixels."""
    seed: int = 0
    """The seed of the run to look at."""
    backend: str = "dali"
    """dali or torch: both make the same views from the same draws."""
    order: bool = False
    """Print the epoch's order instead of drawing: steps, drops, lanes, shuffle quality."""
    global_batch: int = 256
    """For --order: samples per step over all ranks."""
    num_lanes: int | None = None
    """For --order: lanes; by default the divisor of the batch that training takes."""
    window_shards: int = DEFAULT_WINDOW_SHARDS
    """For --order: shards that a lane mixes at a time."""
    world_size: int = 1
    """For --order: ranks, to show what each reads."""
    json: bool = False
    """One JSON object on stdout instead of a table."""


def main(argv: list[str]) -> int:
    args = parse_args(ViewsArgs, argv, prog="linerate views")
    if args.recipe not in RECIPES:
        raise nearest(args.recipe, list(RECIPES), what="recipe")
    if args.backend not in DRAWN_BACKENDS:
        raise nearest(args.backend, list(DRAWN_BACKENDS), what="backend that makes views of images:")
    catalog = Catalog.load(args.shards)
    result, table = _order(args, catalog) if args.order else _picture(args, catalog)
    if args.json:
        emit_json(result)
    else:
        Console().print(table)
    return 0


def _picture(args: ViewsArgs, catalog: Catalog) -> tuple[dict[str, Any], Table]:
    if args.samples < 1 or args.epochs < 1 or args.epoch < 0:
        raise UserError(
            f"--samples {args.samples} --epochs {args.epochs} --epoch {args.epoch}: "
            "at least 1 sample, 1 epoch, epoch 0"
        )
    if not catalog.num_samples:
        raise UserError(f"the shards in {args.shards} hold no sample; pack some images first")
    positions = [find_position(catalog, sample_id) for sample_id in args.sample]
    if not positions:
        num = min(args.samples, catalog.num_samples)
        positions = np.linspace(0, catalog.num_samples - 1, num).astype(int).tolist()
    _check_out(args.out)
    seen = see_samples(
        catalog,
        positions,
        recipe=find_recipe(args.recipe, size=args.size),
        backend=args.backend,
        seed=args.seed,
        epochs=range(args.epoch, args.epoch + args.epochs),
    )
    title = f"{args.recipe} on {args.shards.absolute().name}, seed {args.seed}, {args.backend}"
    draw_sheet(seen, title=title, class_names=catalog.class_names).save(args.out)
    result = {
        "out": str(args.out),
        "recipe": args.recipe,
        "size": args.size,
        "seed": args.seed,
        "backend": args.backend,
        "samples": [sample.describe(catalog.class_names) for sample in seen],
    }
    table = _table(
        f"Views of {args.shards}",
        [
            ("picture", str(args.out)),
            ("recipe", f"{args.recipe} at {args.size} px by {args.backend}"),
            ("samples", ", ".join(f"{sample:012d}" for sample in dict.fromkeys(s.sample_id for s in seen))),
            ("epochs", f"{args.epoch}..{args.epoch + args.epochs - 1}, seed {args.seed}"),
        ],
    )
    return result, table


def _order(args: ViewsArgs, catalog: Catalog) -> tuple[dict[str, Any], Table]:
    num_lanes = default_num_lanes(args.global_batch) if args.num_lanes is None else args.num_lanes
    order = EpochOrder(
        catalog.shard_sizes,
        seed=args.seed,
        epoch=args.epoch,
        global_batch=args.global_batch,
        num_lanes=num_lanes,
        window_shards=args.window_shards,
    )
    ranks = [_rank_share(order, catalog, rank=r, world_size=args.world_size) for r in range(args.world_size)]
    batches = np.array([order.positions(int(s)) for s in measured_steps(order, num_steps=32)])
    reader = ShardReader(catalog, num_shards_at_hand=16)
    labels = reader.index_rows(batches.ravel())["label"].reshape(batches.shape)
    quality = shuffle_quality(
        batches, shard_sizes=catalog.shard_sizes, labels=labels if (labels >= 0).any() else None
    )
    result = {
        "num_samples": order.num_samples,
        "num_shards": catalog.num_shards,
        "global_batch": args.global_batch,
        "world_size": args.world_size,
        "num_lanes": num_lanes,
        "window_shards": args.window_shards,
        "epoch": args.epoch,
        "seed": args.seed,
        "steps_per_epoch": order.num_steps,
        "num_dropped": order.num_dropped,
        "ranks": ranks,
        "shuffle": asdict(quality),
    }
    shards, bytes_read = ([rank[key] for rank in ranks] for key in ("num_shards", "num_bytes"))
    rows = [
        ("samples", f"{order.num_samples:,} in {catalog.num_shards:,} shards"),
        ("steps per epoch", f"{order.num_steps:,} of {args.global_batch:,} samples"),
        ("dropped per epoch", f"{order.num_dropped:,}, others every epoch"),
        ("lanes", f"{num_lanes}, each shuffling {args.window_shards} shards at a time"),
        ("shards per rank", f"{min(shards):,} to {max(shards):,}, world size {args.world_size}"),
        ("bytes per rank", f"{min(bytes_read) / 1e6:,.1f} to {max(bytes_read) / 1e6:,.1f} MB, about"),
        *_quality_rows(asdict(quality)),
    ]
    return result, _table(f"Order of epoch {args.epoch} of {args.shards}", rows)


def _quality_rows(quality: dict[str, Any]) -> list[tuple[str, str]]:
    rows = [
        ("shards per batch", "shards_per_batch", "{:.1f}"),
        ("pairs of one shard", "same_shard_pairs", "{:.2%}"),
        ("length of class runs", "class_run", "{:.3f}"),
    ]
    return [
        (title, f"{form.format(quality[key])}; uniform {form.format(quality[key + '_uniform'])}")
        for title, key, form in rows
        if quality[key] is not None
    ]


def _rank_share(order: EpochOrder, catalog: Catalog, *, rank: int, world_size: int) -> dict[str, int]:
    shard, _, rows = order.pieces(rank=rank, world_size=world_size)
    # By the shard's mean: the exact bytes would cost the index of every shard.
    share = rows / np.maximum(catalog.shard_sizes[shard], 1)
    return {
        "num_shards": len(np.unique(shard)),
        "num_samples": int(rows.sum()),
        "num_bytes": int((catalog.shard_bytes[shard] * share).sum()),
    }


def _check_out(out: Path) -> None:
    if out.suffix.lower() != ".png":
        raise UserError(f"--out {out}: the picture is a PNG; give a name that ends in .png")
    make_parent(out)


def _table(title: str, rows: list[tuple[str, str]]) -> Table:
    table = Table(title=title, title_justify="left", show_header=False)
    for row in rows:
        table.add_row(*row)
    return table
