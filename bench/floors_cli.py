"""`linerate bench floors`: arguments and output only."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from linerate.bench.record_table import number
from linerate.shards.errors import UserError
from linerate.shards.terminal import emit_json
from linerate.train.cli import RecipeCommand, parse_recipe

if TYPE_CHECKING:
    from linerate.bench.floors import Floor


@dataclass(frozen=True, kw_only=True)
class FloorsCommand(RecipeCommand):
    """Count one step of a recipe on shapes alone, and say how fast it could be at most."""

    gb_per_s: float | None = None
    """What memory moves, reads and writes together, GB/s; None: this machine's copy, measured."""
    tflops: float | None = None
    """What a matrix product reaches, TFLOP/s in the recipe's --precision; None: this machine's, measured."""
    ranks: int = 1
    """Ranks that share the global batch; what is counted is one of them."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("gb_per_s", "tflops"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                flag = name.replace("_", "-")
                raise UserError(
                    f"--{flag} {value:g} must be above 0 and finite; an H200's are 4300 GB/s and 790 TFLOP/s"
                )


def main(argv: list[str]) -> int:
    """`linerate bench floors RECIPE [--gb-per-s X --tflops Y] [flags of the recipe]`."""
    command, config = parse_recipe(
        FloorsCommand, argv, prog="linerate bench floors", usage="[--gb-per-s X] [--tflops Y]"
    )
    import torch

    from linerate.bench.ceilings import measure_machine
    from linerate.bench.floors import count_config
    from linerate.train.switches import resolve_precision

    work = count_config(config, world_size=command.ranks)
    precision = resolve_precision(config.speed)
    gb_per_s, tflops = command.gb_per_s, command.tflops
    if gb_per_s is None or tflops is None:
        dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision, torch.float32)
        measured = measure_machine("cuda" if torch.cuda.is_available() else "cpu", dtype)
        gb_per_s, tflops = gb_per_s or measured[0], tflops or measured[1]
    floors = work.floors(gb_per_s=gb_per_s, tflops=tflops)
    if command.json:
        found = {one.name: {"seconds": one.seconds, "pairs_per_s": one.pairs_per_s} for one in floors}
        ceilings = {"gb_per_s": gb_per_s, "tflops": tflops}
        emit_json({"work": dataclasses.asdict(work), "ceilings": ceilings, "floors": found})
        return 0
    views, model = config.views, config.model
    print_floors(
        floors,
        title=f"{config.recipe}: one step of {model.encoder}, {views.size} px, b{work.pairs}, {precision}",
        where=f"at {number(gb_per_s)} GB/s and {number(tflops)} TFLOP/s"
        + ("" if command.gb_per_s and command.tflops else ", measured here where not given"),
    )
    return 0


def print_floors(floors: list[Floor], *, title: str, where: str) -> None:
    """The floors as people read them, and the rule by which they were counted."""
    table = Table(title=f"{title}\n{where}", title_justify="left")
    table.add_column("floor")
    for header in ("a pair", "step, ms", "pairs/s"):
        table.add_column(header, justify="right")
    for one in floors:
        table.add_row(
            one.name, f"{one.a_pair:,.4g} {one.unit}", f"{1e3 * one.seconds:,.4g}", number(one.pairs_per_s)
        )
    console = Console()
    console.print(table)
    console.print(
        "A pair is one image in its two views. Bytes: what each kernel reads and writes, with second reads "
        "of BatchNorm and of convolutions' gradients; fused: without what no kernel would have to move "
        "(docs/benchmarks.md)."
    )
