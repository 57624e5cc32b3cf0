"""The report without a page: the same findings as tables of 80 columns, and as JSON."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rich import box
from rich.console import RenderableType
from rich.table import Table

from linerate.bench.cost import Cost, paper_runs, usd
from linerate.bench.findings import Findings, Scaling, Stack, is_elsewhere, status
from linerate.bench.machine_facts import machine_facts
from linerate.bench.record import compact_json, is_noisy
from linerate.bench.record_table import number, plain, results_table
from linerate.bench.report_page import counted
from linerate.bench.report_parts import milliseconds


def report_tables(findings: Findings) -> Iterator[RenderableType]:
    """What to print, part by part."""
    for machine in findings.machines:
        yield f"[bold]{plain(machine.name)}[/], {counted(len(machine.records), 'line')}"
        facts = [
            f"{name} {value}" for name, value in machine_facts(machine.facts) if value and value != "none"
        ]
        yield f"[dim]{plain('; '.join(facts))}[/]"
        ceilings = [record for record in machine.newest if record.name == "ceilings"]
        if ceilings:
            words = [f"{r.work.partition(':')[0]} {number(r.ours)} {r.unit}" for r in ceilings]
            yield f"ceilings: {plain('; '.join(words))}"
        records = [record for record in machine.newest if not is_elsewhere(record)]
        if records:
            yield results_table(records)
        for history in machine.histories:
            values = " -> ".join(number(record.ours) for record in history)
            yield f"[dim]{plain(f'{history[0].name}, {history[0].work}: {values} {history[0].unit}')}[/]"
    tally = ", ".join(f"{count} {name}" for name, count in findings.tally.items())
    noisy = sum(is_noisy(record) for machine in findings.machines for record in machine.newest)
    yield f"{tally or 'nothing held against a bar'}{f'; {noisy} on a noisy machine' if noisy else ''}"
    for scaling in findings.scalings:
        yield f"\n[bold]scaling on {plain(scaling.machine)}[/]: {plain(scaling.title)}"
        yield _scaling_table(scaling)
    for stack in findings.stacks:
        yield f"\n[bold]{plain(stack.name)} on {plain(stack.machine)}[/]: {plain(stack.work)}"
        yield from [f"[bold]{plain(stack.verdict)}[/]"] if stack.verdict else []
        yield _stack_table(stack)
    if findings.costs:
        sizes = ", ".join(f"{run.name}: {run.images:,} images" for run in paper_runs())
        yield f"\n[bold]cost[/]; {sizes}; one pair is one source image"
        yield _cost_table(findings.costs)
    if findings.costs and not any(cost.usd_per_hour for cost in findings.costs):
        yield "for dollars give --price-per-hour 2.5, or NAME=2.5 for one machine"


def _scaling_table(scaling: Scaling) -> Table:
    table = _table()
    for header in ("ranks", "pairs/s", "ideal", "efficiency\n[dim]median of rounds[/]"):
        table.add_column(header, justify="right")
    table.add_column("")
    for point in scaling.points:
        cells = (
            f"{point.ranks:,}",
            number(point.rate),
            number(point.ideal),
            f"{100 * point.efficiency:.0f} %",
        )
        table.add_row(*cells, plain(point.record.note or "projection") if point.projected else "measured")
    return table


def _stack_table(stack: Stack) -> Table:
    table = _table()
    table.add_column("stage")
    table.add_column("time", justify="right")
    table.add_column("share", justify="right")
    total = sum(stack.stages.values())
    for stage, seconds in stack.stages.items():
        table.add_row(plain(stage), milliseconds(seconds), f"{100 * seconds / total:.1f} %")
    return table


def _cost_table(costs: tuple[Cost, ...]) -> Table:
    runs = paper_runs()
    table = _table()
    table.add_column("machine, rate of", overflow="fold")
    for header in ("pairs/s\n$/h", "images/$", *(f"{run.name}\nh, $" for run in runs)):
        table.add_column(header, justify="right")
    for cost in costs:
        smaller = "" if cost.paper_work else "; not ResNet-50 at 224 px"
        name = f"{cost.machine}\n{cost.record.name}: {cost.basis}{smaller}"
        table.add_row(
            f"[bold]{plain_lines(name)}[/]" if cost.chosen else plain_lines(name),
            f"{number(cost.pairs_per_s)}\n{usd(cost.usd_per_hour)}",
            number(cost.images_per_usd),
            *(f"{number(cost.hours(run))}\n{usd(cost.usd(run))}" for run in runs),
        )
    return table


def plain_lines(text: str) -> str:
    """As `plain`, of a text whose line ends are ours."""
    return "\n".join(map(plain, text.split("\n")))


def _table() -> Table:
    return Table(box=box.SIMPLE_HEAD, padding=(0, 1))


def report_json(findings: Findings) -> dict[str, Any]:
    """The findings as plain JSON types."""
    return {
        "machines": [
            {
                "name": machine.name,
                "facts": dict(machine.facts),
                "lines": len(machine.records),
                "newest": [
                    {**compact_json(r), "status": status(r), "noisy": is_noisy(r)} for r in machine.newest
                ],
            }
            for machine in findings.machines
        ],
        "tally": dict(findings.tally),
        "scaling": [
            {
                "machine": scaling.machine,
                "title": scaling.title,
                "points": [
                    {
                        "ranks": point.ranks,
                        "pairs_per_s": point.rate,
                        "ideal": point.ideal,
                        "efficiency": point.efficiency,
                        "projected": point.projected,
                    }
                    for point in scaling.points
                ],
            }
            for scaling in findings.scalings
        ],
        "stages": [
            {
                "machine": stack.machine,
                "name": stack.name,
                "work": stack.work,
                "stages": dict(stack.stages),
                "whole_s": stack.whole_s,
                "verdict": stack.verdict,
            }
            for stack in findings.stacks
        ],
        "cost": [cost_json(cost) for cost in findings.costs],
    }


def cost_json(cost: Cost) -> dict[str, Any]:
    """A cost as plain JSON types."""
    return {
        "machine": cost.machine,
        "name": cost.record.name,
        "work": cost.record.work,
        "basis": cost.basis,
        "chosen": cost.chosen,
        "paper_work": cost.paper_work,
        "pairs_per_s": cost.pairs_per_s,
        "usd_per_hour": cost.usd_per_hour,
        "images_per_usd": cost.images_per_usd,
        "runs": [
            {"name": run.name, "images": run.images, "hours": cost.hours(run), "usd": cost.usd(run)}
            for run in paper_runs()
        ],
    }
