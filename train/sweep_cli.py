"""`linerate sweep`: the paper's ablations, its figures beside ours."""

from __future__ import annotations

import dataclasses
import shlex
import signal
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from linerate.pipeline.cache import CacheOptions, open_shards
from linerate.shards.errors import UserError
from linerate.shards.terminal import emit_json, stderr
from linerate.train.cli import RecipeCommand, is_given, parse_recipe
from linerate.train.sweep_cells import OVERS, Over
from linerate.train.sweep_plan import SWEPT_FIELD, SweepPlan, plan_sweep

if TYPE_CHECKING:
    from linerate.train.sweep import SweepEnd, TrainProcess
    from linerate.train.sweep_results import CellResult


@dataclass(frozen=True, kw_only=True)
class SweepCommand(RecipeCommand):
    """Run an ablation of the paper, one run a cell, judged by kNN; every other flag holds for all cells.

    The same command continues: what is finished is kept, a cell cut short goes on from its checkpoint.
    """

    over: Over | None = None
    """K: the size of the dictionary; m: the momentum of the key encoder, at the paper's K of 4,096 unless
    --num-keys is given; dictionary: queue, end-to-end, memory-bank; shuffle-bn: on, off."""
    out: Path | None = None
    """Folder for the cells' run folders, results.jsonl and sweep.png."""
    values: tuple[str, ...] = ()
    """The values, as 0 0.9 0.99; by default the paper's, less the K that are larger than the data set."""
    dictionaries: tuple[str, ...] = ()
    """With --over K: whose K is swept, all three for the paper's figure 3; by default --dictionary's."""
    seeds: tuple[str, ...] = ()
    """Every cell is run with each of these, as 0 1 2 or 0,1,2; by default with --seed alone."""
    launch: str | None = None
    """What starts a cell on several ranks, as "torchrun --nproc-per-node 8"; by default one process does."""
    dry_run: bool = False
    """Print the cells and their commands, and stop."""
    profile: Path | None = None
    """Switches that `linerate tune` found; flags given beside it count more."""


def main(argv: list[str]) -> int:
    """`linerate sweep RECIPE --shards S --out DIR --over K|m|dictionary|shuffle-bn [--values ...]`."""
    if not argv or argv[0] in ("-h", "--help"):
        argv = ["demo", "--help"]
    command, config = parse_recipe(SweepCommand, argv, prog="linerate sweep")
    over, shards, out = _required(command, recipe=argv[0])
    _require_no_contradiction(command, over, words=argv[1:])
    catalog = open_shards(shards, command)
    plan = plan_sweep(
        config,
        over=over,
        num_images=catalog.num_samples,
        values=_listed(command.values),
        dictionaries=_listed(command.dictionaries),
        seeds=_seeds(command.seeds),
        keep_num_keys=is_given("--num-keys", argv[1:]),
    )
    for note in plan.notes:
        stderr.print(f"note: {note}", highlight=False, markup=False)

    from linerate.train.sweep import run_sweep

    start = _train_process(command, recipe=argv[0], shards=shards)
    if command.dry_run:
        return _dry_run(command, plan, start, out=out)
    end = run_sweep(plan, catalog=catalog, out=out, start=start, on_cell=_say)
    _print_end(command, plan, end, out=out)
    if end.stopped_by is not None:
        _say(f"stopped by {end.stopped_by.name}; the same command continues")
        return 130 if end.stopped_by == signal.SIGINT else 0
    return 0 if all(result.finished for result in end.results) else 1


def _required(command: SweepCommand, *, recipe: str) -> tuple[Over, str, Path]:
    over, shards, out = command.over, command.shards, command.out
    if over is None or shards is None or out is None:
        given = {"--over": over, "--shards": shards, "--out": out}
        missing = " and ".join(flag for flag, value in given.items() if value is None)
        raise UserError(
            f"what is missing: {missing}; linerate sweep {recipe} --shards FOLDER --out FOLDER "
            f"--over {'|'.join(OVERS)}"
        )
    return over, shards, out


def _require_no_contradiction(command: SweepCommand, over: Over, *, words: Sequence[str]) -> None:
    flag = SWEPT_FIELD[over].replace("_", "-")
    for name in dict.fromkeys((f"--{flag}", f"--no-{flag}", f"--{over}")):
        if is_given(name, list(words)):
            raise UserError(f"--over {over} gives every cell its own {name}; choose them by --values")
    if command.seeds and is_given("--seed", list(words)):
        raise UserError("--seed and --seeds contradict; keep one of them")


def _listed(words: Sequence[str]) -> list[str]:
    """`0 1`, `0,1` and `0, 1` are the same list."""
    return [part for word in words for part in word.split(",") if part]


def _seeds(words: Sequence[str]) -> list[int]:
    try:
        return [int(word) for word in _listed(words)]
    except ValueError:
        raise UserError(f"--seeds {' '.join(words)}: each must be a whole number, as 0 1 2") from None


def _train_process(command: SweepCommand, *, recipe: str, shards: str) -> TrainProcess:
    from linerate.train.sweep import TrainProcess

    more = []
    for field in dataclasses.fields(CacheOptions):
        value = getattr(command, field.name)
        if value != field.default:
            more += [f"--{field.name.replace('_', '-')}", str(value)]
    launcher = tuple(shlex.split(command.launch)) if command.launch else (sys.executable,)
    return TrainProcess(recipe=recipe, shards=shards, more_words=tuple(more), launcher=launcher)


def _say(line: str) -> None:
    stderr.print(f"[bold]sweep[/] {line}", highlight=False)


def _dry_run(command: SweepCommand, plan: SweepPlan, start: TrainProcess, *, out: Path) -> int:
    commands = {
        cell.name: shlex.join(["linerate", *start.train_words(cell, out / cell.name)]) for cell in plan.cells
    }
    if command.json:
        papers = {cell.name: asdict(paper) for cell in plan.cells if (paper := cell.paper)}
        emit_json({"over": plan.over, "notes": plan.notes, "commands": commands, "paper": papers})
        return 0
    for line in commands.values():
        print(line)
    return 0


def _print_end(command: SweepCommand, plan: SweepPlan, end: SweepEnd, *, out: Path) -> None:
    if command.json:
        emit_json(
            {
                "over": plan.over,
                "notes": plan.notes,
                "stopped_by": end.stopped_by.name if end.stopped_by else None,
                "cells": [asdict(result) for result in end.results],
                "results": str(out / "results.jsonl"),
                "plot": str(out / "sweep.png"),
            }
        )
        return
    console = Console()
    console.print(_table(plan, end.results))
    console.print("paper: linear top-1, ResNet-50, 200 epochs of ImageNet-1M; kNN and pretext: top-1 here.")
    console.print("`memory`: read off the paper's figure from memory, not from its text.", highlight=False)
    console.print(f"{out / 'results.jsonl'}, {out / 'sweep.png'}", highlight=False, soft_wrap=True)


def _table(plan: SweepPlan, results: Sequence[CellResult]) -> Table:
    """The paper's cells and ours; several seeds as `mean (least to most)`."""
    from linerate.train.sweep_results import mean_and_range, rows_of

    table = Table(title=f"the paper's ablation of {plan.over}", title_justify="left")
    for name in ("", "paper, %", "kNN, %", "pretext, %", "loss (chance)", ""):
        table.add_column(name, overflow="fold")
    for row in rows_of(plan, results):
        loss = mean_and_range(row.figures("loss"), digits=2)
        chance = row.figures("chance_loss")
        table.add_row(
            row.label,
            row.paper.text if row.paper else "",
            mean_and_range(row.figures("knn_top1"), scale=100),
            mean_and_range(row.figures("pretext_top1"), scale=100),
            f"{loss} ({chance[0]:.2f})" if loss else "",
            row.state,
        )
    return table
