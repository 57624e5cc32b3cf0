"""`linerate views`: look at the views that training sees, and at the order it sees them in."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from rich.console import Console
from rich.table import Table

from linerate.pipeline.cache import CacheOptions, open_shards
from linerate.pipeline.cores import default_num_threads
from linerate.pipeline.gallery import write_animation, write_gallery
from linerate.pipeline.order import DEFAULT_WINDOW_SHARDS, EpochOrder, default_num_lanes
from linerate.pipeline.order_report import order_rows, report_order
from linerate.pipeline.preview import find_position, see_samples, write_sheet
from linerate.pipeline.reader import ShardReader
from linerate.pipeline.recipe import RECIPES, find_recipe
from linerate.shards.catalog import Catalog
from linerate.shards.errors import UserError
from linerate.shards.terminal import emit_json, make_parent, nearest, parse_args

DEFAULT_DRAWN_SAMPLES, DEFAULT_PARITY_SAMPLES, DEFAULT_GALLERY_EPOCHS = 8, 64, 12
DRAWN_BACKENDS = ("dali", "torch")


@dataclass(frozen=True, kw_only=True)
class ViewsArgs(CacheOptions):
    """Draw images beside their two views, exactly as training with the same seed sees them.

    The picture marks both crop windows in the stored image. --sample and --epoch replay any view;
    --order prints how an epoch is read and how well it is shuffled. --parity measures how far dali's
    views lie from torchvision's on the same draws.
    """

    recipe: tyro.conf.Positional[str]
    """v1, v2 or v3."""
    shards: str
    """The folder that `linerate shard pack` wrote, or its URL: s3://, gs:// or https://."""
    out: Path = Path("views.png")
    """The picture. A .png shows the samples side by side; a .gif has a frame an epoch, and a .html is a page
    of every epoch's views of each sample."""
    sample: tuple[int, ...] = ()
    """Ids of the samples to draw (as the tar names them); without it some from all over the shards."""
    samples: int | None = None
    """How many samples, where --sample names none; by default 8, and 64 for --parity."""
    epoch: int = 0
    """The epoch whose views are drawn."""
    epochs: int | None = None
    """Draw so many epochs from there on; by default 1, and 12 in a .gif or .html."""
    size: int = 224
    """Height and width of a view in pixels."""
    seed: int = 0
    """The seed of the run to look at."""
    backend: str = "dali"
    """dali or torch: both make the same views from the same draws."""
    parity: bool = False
    """Instead of drawing, compare dali with torchvision on the same draws; exit 1 beyond the bounds."""
    device: str = "cpu"
    """For --parity: where dali works, cpu or cuda."""
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
    catalog = open_shards(args.shards, args)
    make = _order if args.order else _parity if args.parity else _picture
    result, table = make(args, catalog)
    if args.json:
        emit_json(result)
    else:
        Console().print(table)
    return int(not result.get("met", True))


def _picture(args: ViewsArgs, catalog: Catalog) -> tuple[dict[str, Any], Table]:
    write, default_samples, default_epochs = _choose_writer(args.out)
    positions = _positions(args, catalog, default=default_samples)
    epochs = default_epochs if args.epochs is None else args.epochs
    seen = see_samples(
        catalog,
        positions,
        recipe=find_recipe(args.recipe, size=args.size),
        backend=args.backend,
        seed=args.seed,
        epochs=range(args.epoch, args.epoch + epochs),
    )
    title = f"{args.recipe} on {Path(args.shards).absolute().name}, seed {args.seed}, {args.backend}"
    write(args.out, seen, title=title, class_names=catalog.class_names)
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
            ("epochs", f"{args.epoch}..{args.epoch + epochs - 1}, seed {args.seed}"),
        ],
    )
    return result, table


def _order(args: ViewsArgs, catalog: Catalog) -> tuple[dict[str, Any], Table]:
    order = EpochOrder(
        catalog.shard_sizes,
        seed=args.seed,
        epoch=args.epoch,
        global_batch=args.global_batch,
        num_lanes=default_num_lanes(args.global_batch) if args.num_lanes is None else args.num_lanes,
        window_shards=args.window_shards,
    )
    result = report_order(order, catalog, world_size=args.world_size)
    return result, _table(f"Order of epoch {args.epoch} of {args.shards}", order_rows(result))


def _parity(args: ViewsArgs, catalog: Catalog) -> tuple[dict[str, Any], Table]:
    """`met` in the result says whether every difference keeps its bound."""
    import torch

    from linerate.pipeline.parity import measure_ffcv_decoder, measure_parity

    if args.device not in ("cpu", "cuda"):
        raise nearest(args.device, ["cpu", "cuda"], what="device")
    if args.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: there is no CUDA device here; --device cpu compares DALI on the CPU")
    reader = ShardReader(catalog)
    try:
        batch = reader.read(np.array(_positions(args, catalog, default=DEFAULT_PARITY_SAMPLES)))
    finally:
        reader.close()
    found = measure_parity(
        batch,
        recipe=find_recipe(args.recipe, size=args.size),
        seed=args.seed,
        epoch=args.epoch,
        device=args.device,
        num_threads=default_num_threads(),
    )
    found += [one for one in [measure_ffcv_decoder(batch)] if one]
    result = {
        "met": all(one.met for one in found),
        "num_samples": len(batch.jpegs),
        "recipe": args.recipe,
        "size": args.size,
        "seed": args.seed,
        "epoch": args.epoch,
        "device": args.device,
        "differences": [asdict(one) | {"met": one.met} for one in found],
    }
    title = (
        f"dali on the {args.device} against torchvision, same draws, {len(batch.jpegs)} samples, grey levels"
    )
    table = Table(title=title, title_justify="left")
    for header in ("operation", "mean", "p99", "max", "mean may be", ""):
        table.add_column(header, justify="left" if header in ("operation", "") else "right")
    for one in found:
        numbers = f"{one.mean:.4f}", f"{one.p99:.0f}", f"{one.max:.0f}", _bound(one.mean_bound)
        table.add_row(one.name, *numbers, "" if one.met else "TOO FAR")
    return result, table


def _bound(bound: float) -> str:
    return "any" if math.isinf(bound) else f"{bound:g}"


def _positions(args: ViewsArgs, catalog: Catalog, *, default: int) -> list[int]:
    """Those of --sample, or --samples from all over the shards."""
    for name, least in (("samples", 1), ("epochs", 1), ("epoch", 0)):
        given = getattr(args, name)
        if given is not None and given < least:
            raise UserError(f"--{name} is {given}, at least {least} is needed")
    if not catalog.num_samples:
        raise UserError(f"the shards in {args.shards} hold no sample; pack some images first")
    if args.sample:
        return [find_position(catalog, sample_id) for sample_id in args.sample]
    num = min(args.samples or default, catalog.num_samples)
    return [int(place) for place in np.linspace(0, catalog.num_samples - 1, num).astype(int)]


def _choose_writer(out: Path) -> tuple[Callable[..., None], int, int]:
    """What writes the picture, how many samples it shows by default, and how many epochs."""
    writers = {
        ".png": (write_sheet, DEFAULT_DRAWN_SAMPLES, 1),
        ".gif": (write_animation, 2, DEFAULT_GALLERY_EPOCHS),
        ".html": (write_gallery, 1, DEFAULT_GALLERY_EPOCHS),
    }
    if out.suffix.lower() not in writers:
        raise UserError(f"--out {out}: give a name that ends in {', '.join(writers)}")
    make_parent(out)
    return writers[out.suffix.lower()]


def _table(title: str, rows: list[tuple[str, str]]) -> Table:
    table = Table(title=title, title_justify="left", show_header=False)
    for row in rows:
        table.add_row(*row)
    return table
