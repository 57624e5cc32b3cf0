"""`linerate bench pipeline`: arguments and output only."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.table import Table

from linerate.bench.timing import MIN_ROUNDS
from linerate.pipeline.cache import open_shards
from linerate.shards.errors import UserError
from linerate.shards.terminal import emit_json, make_parent, stderr
from linerate.train.cli import RecipeCommand, parse_recipe, say_what_was_tuned_for
from linerate.train.plan import require_one_batch

if TYPE_CHECKING:
    from linerate.bench.suites.pipeline_stages import Measured
    from linerate.train.config import TrainConfig

PROG = "linerate bench pipeline"


@dataclass(frozen=True, kw_only=True)
class PipelineCommand(RecipeCommand):
    """Say where a recipe's time goes on this machine, what bounds it, and what would lift it.

    Nothing is trained: the encoders are new ones, and no run is touched.
    """

    seconds: float = 60.0
    """About how long the timing takes; start-up and compilation come on top."""
    rounds: int = MIN_ROUNDS
    """Interleaved rounds, at least 7."""
    out: Path | None = None
    """Results file (JSON lines) to append to."""
    tuned: Path | None = None
    """Switches that `linerate tune` found, which `linerate train` takes as --profile."""
    profile: Path | None = None
    """Folder for a trace of some steps (Perfetto), their largest kernels, and memory by stage."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.seconds < math.inf:
            raise UserError(f"--seconds {self.seconds:g} must be above 0 and finite, as 60")
        if self.rounds < MIN_ROUNDS:
            raise UserError(f"--rounds {self.rounds} cannot carry a 95 % interval; give {MIN_ROUNDS} or more")


def main(argv: list[str]) -> int:
    """`linerate bench pipeline RECIPE --shards OUT [flags of the recipe] [--profile FOLDER]`."""
    command, config = parse_recipe(
        PipelineCommand, argv, prog=PROG, usage="--shards FOLDER [--profile FOLDER]", tuned="--tuned"
    )
    if command.shards is None:
        raise UserError(f"--shards is missing: {PROG} {argv[0]} --shards FOLDER")
    _check(command, config)
    say_what_was_tuned_for(command.tuned, config)

    from linerate.bench.record import append_jsonl
    from linerate.bench.suites.pipeline_stages import measure_stages

    catalog = open_shards(command.shards, command)
    require_one_batch(config.optim.global_batch, num_images=catalog.num_samples)
    with stderr.status(f"measuring for about {command.seconds:g} s once all is open ..."):
        found = measure_stages(config, catalog, budget_s=command.seconds, rounds=command.rounds)
    if command.out is not None:
        for record in found.records:
            append_jsonl(command.out, record)
    files: dict[str, Path] = {}
    if command.profile is not None:
        from linerate.bench.pipeline_profile import profile_pipeline

        files = profile_pipeline(config, catalog, folder=command.profile)
    if command.json:
        emit_json({**as_json(found), "profile": {what: str(path) for what, path in files.items()}})
    else:
        _print_measured(found, files)
    return 0


def _check(command: PipelineCommand, config: TrainConfig) -> None:
    """Raise UserError for what cannot be measured or written, before a minute has gone by."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError(f"{PROG} measures one rank; start it without torchrun or accelerate launch")
    if config.views.backend == "synthetic":
        raise UserError(
            "--backend synthetic has no loader to measure; take the backend that the run will have"
        )
    if command.out is not None:
        if command.out.is_dir():
            raise UserError(
                f"--out {command.out} is a folder; name a file, as {command.out / 'results.jsonl'}"
            )
        make_parent(command.out)
    if command.profile is not None:
        if command.profile.is_file():
            raise UserError(
                f"--profile {command.profile} is a file, and here it names the folder of a trace; switches "
                f"of `linerate tune` are given as --tuned {command.profile}"
            )
        make_parent(command.profile / "trace.json")


def as_json(found: Measured) -> dict[str, Any]:
    """What was found as plain JSON types; seconds are those of one batch."""
    model, times = found.model, found.model.times
    free, shares = model.rates_if_free(), model.shares()
    return {
        "verdict": found.verdict,
        "bound_by": found.bottleneck.kind,
        "stage": found.bottleneck.stage,
        "pairs_per_s": {
            "loader": times.batch / times.loader_s,
            "step": times.batch / model.step_s,
            "both": model.rate(),
        },
        "stages": [
            {
                "stage": stage,
                "seconds": seconds,
                "pairs_per_s_alone": times.batch / seconds if seconds > 0 else None,
                "share_of_its_side": shares[stage],
                "pairs_per_s_if_free": free[stage],
            }
            for stage, seconds in model.stages().items()
        ],
        "model": {
            "share_not_hidden": model.run_share,
            "overlap_error": model.overlap_error,
            "sum_error": model.sum_error,
        },
        "notes": list(found.notes),
        "records": [record.to_json() for record in found.records],
    }


def _print_measured(found: Measured, files: dict[str, Path]) -> None:
    from linerate.bench.record import is_noisy

    console = Console()
    console.print(found.records[-1].work, highlight=False, markup=False)
    console.print(_sides_table(found))
    console.print(_stages_table(found))
    console.print(f"[bold]{found.verdict}[/]", highlight=False)
    for line in [_model_line(found), *found.notes]:
        console.print(line, highlight=False, style="dim")
    if is_noisy(found.records[-1]):
        console.print("[yellow]~[/] the machine was busy with something else: measure again when it is quiet")
    if files:
        console.print(f"\nin {next(iter(files.values())).parent}:", highlight=False, markup=False)
    for what, path in files.items():
        console.print(f"  {path.name:<14}{what}", highlight=False, markup=False)


def _sides_table(found: Measured) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1))
    table.add_column("")
    for header in ("pairs/s", "p10 to p90", "ms a batch"):
        table.add_column(header, justify="right")
    for name, record in zip(("loader alone", "step alone", "both together"), found.records, strict=True):
        assert record.ours is not None
        assert record.ours_p10 is not None
        assert record.ours_p90 is not None
        ms = 1e3 * found.model.times.batch / record.ours
        spread = f"{show(record.ours_p10)} to {show(record.ours_p90)}"
        table.add_row(name, show(record.ours), spread, show(ms))
    return table


def _stages_table(found: Measured) -> Table:
    model, bottleneck = found.model, found.bottleneck
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1))
    table.add_column("stage")
    for header in ("ms a batch", "pairs/s alone", "of its side", "pairs/s if free"):
        table.add_column(header, justify="right")
    free, shares, loader = model.rates_if_free(), model.shares(), model.times.loader_stages
    for stage, seconds in model.stages().items():
        alone = show(model.times.batch / seconds) if seconds > 0 else "-"
        table.add_row(
            stage,
            show(1e3 * seconds),
            alone,
            f"{100 * shares[stage]:.0f} %",
            show(free[stage]),
            style="bold" if stage == bottleneck.stage else None,
            end_section=stage == [*loader][-1],
        )
    return table


def _model_line(found: Measured) -> str:
    model = found.model
    hidden = 1 - model.run_share
    return (
        f"model: loader and step overlap by {100 * hidden:.0f} %; a batch takes "
        f"{_signed(model.overlap_error)} against full overlap, {_signed(model.sum_error)} against their sum"
    )


def _signed(share: float) -> str:
    return f"{100 * share:+.0f} %"


def show(value: float) -> str:
    """Three digits."""
    from linerate.bench.way_out import show_rate

    return show_rate(value)
