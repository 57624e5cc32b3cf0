"""`linerate tune`: arguments and output only."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from linerate.pipeline.cache import open_shards
from linerate.shards.errors import UserError
from linerate.shards.terminal import emit_json, stderr
from linerate.train.cli import RecipeCommand, parse_recipe
from linerate.train.plan import require_one_batch
from linerate.train.speed_profile import TUNABLE, SpeedProfile, made_for

if TYPE_CHECKING:
    from linerate.bench.tune import Trial, Tuned


@dataclass(frozen=True, kw_only=True)
class TuneCommand(RecipeCommand):
    """Find the fastest switches for a recipe on this machine; nothing that changes results is touched."""

    out: Path | None = None
    """Profile to write, for `linerate train RECIPE --profile OUT`."""
    minutes: float = 3.0
    """About how long the timing takes; start-up and compilation come on top."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.minutes > 0:
            raise UserError(f"--minutes {self.minutes:g} must be above 0, as 3")


def main(argv: list[str]) -> int:
    """`linerate tune RECIPE --shards OUT --out profile.json [flags of the recipe]`.

    Under torchrun or accelerate launch for those ranks together; rank 0 writes.
    """
    command, config = parse_recipe(TuneCommand, argv, prog="linerate tune")
    if command.shards is None or command.out is None:
        missing = "--shards" if command.shards is None else "--out"
        raise UserError(f"{missing} is missing: linerate tune {argv[0]} --shards FOLDER --out profile.json")
    if command.out.is_dir():
        raise UserError(f"--out {command.out} is a folder; name a file, as {command.out / 'profile.json'}")

    from linerate.bench.machine import machine
    from linerate.bench.tune import tune
    from linerate.bench.tune_ranks import open_ranks
    from linerate.train.launch import launch_note, parent_command

    catalog = open_shards(command.shards, command)
    require_one_batch(config.optim.global_batch, num_images=catalog.num_samples)
    with open_ranks(config) as ranks:
        if note := launch_note(ranks.world_size, command=parent_command()):
            stderr.print(f"note: {note}", highlight=False, markup=False)
        show = _show_trial if ranks.rank == 0 else _ignore
        tuned = tune(config, catalog, budget_s=60.0 * command.minutes, ranks=ranks, on_trial=show)
    if ranks.rank:
        return 0
    profile = SpeedProfile(
        speed={
            name: getattr(tuned.speed, name)
            for name in TUNABLE
            if getattr(tuned.speed, name) != getattr(config.speed, name)
        },
        made_for=made_for(config),
        report={
            "recipe": config.recipe,
            "trials": [dataclasses.asdict(trial) for trial in tuned.trials],
            "ratio": dataclasses.asdict(tuned.ratio) if tuned.ratio else None,
            "pairs_per_s": tuned.pairs_per_s,
            "machine": {**machine(), "noise": tuned.noise},
        },
    )
    profile.save(command.out)
    if command.json:
        emit_json(dataclasses.asdict(profile))
    else:
        _print_tuned(tuned, profile, out=command.out)
    return 0


def _ignore(_: Trial) -> None:
    """What the other ranks say of a trial."""


def _show_trial(trial: Trial) -> None:
    ratio = (
        f"{trial.ratio.median:.2f}x ({trial.ratio.low:.2f} to {trial.ratio.high:.2f})" if trial.ratio else ""
    )
    stderr.print(f"{trial.name} = {trial.value}: {ratio} {trial.why}", highlight=False, markup=False)


def _print_tuned(tuned: Tuned, profile: SpeedProfile, *, out: Path) -> None:
    console = Console()
    if profile.speed:
        table = Table("switch", "value", title="what differs from the recipe", title_justify="left")
        for name, value in profile.speed.items():
            table.add_row(name, str(value))
        console.print(table)
    if tuned.ratio is None:
        told = (
            f"{tuned.pairs_per_s:,.0f} pairs/s with the recipe's own switches: none of the others is better"
        )
    else:
        r = tuned.ratio
        told = f"{tuned.pairs_per_s:,.0f} pairs/s, {r.median:.2f}x ({r.low:.2f} to {r.high:.2f}) the recipe's"
        told += "" if profile.speed else ": not clearly faster together, so none is taken"
    console.print(told, highlight=False)
    if tuned.noise["noisy"]:
        console.print("other work took part of the machine meanwhile: tune again when it is quiet")
    console.print(
        f"{out}: use it with `linerate train {profile.report['recipe']} --profile {out}`", soft_wrap=True
    )
