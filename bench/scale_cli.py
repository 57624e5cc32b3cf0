"""`linerate bench scale`: arguments and output only."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from linerate.bench.record import append_jsonl
from linerate.bench.record_table import results_table
from linerate.bench.timing import MIN_ROUNDS
from linerate.shards.errors import UserError
from linerate.shards.terminal import emit_json, make_parent
from linerate.train.cli import RecipeCommand, parse_recipe

SUITE = "scale"


@dataclass(frozen=True, kw_only=True)
class ScaleCommand(RecipeCommand):
    """Measure a recipe's step on several numbers of ranks of this machine, and project it to more."""

    ranks: tuple[int, ...] = (1, 2)
    """Numbers of ranks: processes of one thread, or a GPU each where there are as many; 1 is always one."""
    project_to: tuple[int, ...] = ()
    """Numbers of ranks to project to by formula from the bytes measured; needs --link-gb-per-s."""
    link_gb_per_s: float | None = None
    """What a rank's own link sends, and gets at the same time, GB/s: 50 is 400 Gbit/s."""
    rounds: int = 9
    """Interleaved rounds, at least 7."""
    out: Path | None = None
    """Results file (JSON lines) to append to."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for flag, given in (("ranks", self.ranks), ("project-to", self.project_to)):
            if any(num < 1 for num in given):
                raise UserError(f"--{flag} {' '.join(map(str, given))}: each must be at least 1")
        if self.rounds < MIN_ROUNDS:
            raise UserError(f"--rounds {self.rounds} cannot carry a 95 % interval; give {MIN_ROUNDS} or more")
        if bool(self.project_to) != (self.link_gb_per_s is not None):
            raise UserError(
                "--project-to and --link-gb-per-s go together, as --project-to 8 64 --link-gb-per-s 50"
            )
        if self.link_gb_per_s is not None and not 0 < self.link_gb_per_s < math.inf:
            raise UserError(
                f"--link-gb-per-s {self.link_gb_per_s:g} must be above 0 and finite; 50 is 400 Gbit/s"
            )
        if self.out is not None:
            if self.out.is_dir():
                raise UserError(f"--out {self.out} is a folder; name a file, as {self.out / 'results.jsonl'}")
            make_parent(self.out)
        if self.project_to and max(self.ranks, default=1) < 2:
            raise UserError("a projection needs the bytes of at least two ranks; give --ranks 1 2")


def main(argv: list[str]) -> int:
    """`linerate bench scale RECIPE [--ranks 1 2 4] [--project-to 8 64 --link-gb-per-s X] [flags]`."""
    usage = "[--ranks 1 2 4] [--project-to 8 64 --link-gb-per-s 50]"
    command, config = parse_recipe(ScaleCommand, argv, prog="linerate bench scale", usage=usage)
    from linerate.bench.contest import Setting, run_contest
    from linerate.bench.suites.scale import NAME, Scaling

    scaling = Scaling(config, command.ranks)
    setting = Setting(scratch=Path(), rounds=command.rounds)
    found = scaling.measure(rounds=command.rounds, min_round_s=setting.min_round_s)
    measured = [run_contest(NAME, one, setting=setting, suite=SUITE) for one in found]
    projected = []
    if command.link_gb_per_s is not None:
        projection = scaling.project(command.project_to, link_gb_per_s=command.link_gb_per_s)
        projected = [run_contest(NAME, one, setting=setting, suite=SUITE) for one in projection]
    for record in [*measured, *projected]:
        if command.out is not None:
            append_jsonl(command.out, record)
        if command.json:
            emit_json(record.to_json())
    if not command.json:
        console = Console()
        console.print(results_table(measured))
        if projected:
            console.print("projection: by formula from one rank's time and the bytes above, nothing measured")
            console.print(results_table(projected))
            for record in projected:
                console.print(f"{record.ranks} ranks, {record.work.partition(':')[0]}: {record.note}")
    return 0
