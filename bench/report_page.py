"""The report as one HTML file: opens from disk, asks nobody for anything, light and dark, prints."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from linerate.bench.cost import Cost, paper_runs, usd
from linerate.bench.findings import Findings, judged
from linerate.bench.fleet import Machine
from linerate.bench.line_chart import Line, Point, line_chart
from linerate.bench.machine_facts import machine_facts, unrest
from linerate.bench.record import Record, is_noisy
from linerate.bench.record_table import number
from linerate.bench.report_lines import code_of, lines_section
from linerate.bench.report_parts import BAR_HEAD, COLOURS, MARKS, bar_row, scaling_card, stack_card
from linerate.bench.report_style import STYLE
from linerate.shards.html_page import escaped, head, write_whole

TITLE = "linerate bench report"


def write_report(path: Path, findings: Findings, *, sources: Sequence[str]) -> None:
    """Write the page. sources: names of the files, as shown."""
    sections = [
        ("machines", "Machines", _machines(findings)),
        ("bars", "Against bars and ceilings", _bars(findings)),
        ("stages", "Where the time goes", _stacks(findings)),
        ("scaling", "Scaling", _scalings(findings)),
        ("cost", "What training costs", _costs(findings)),
        ("history", "History", _histories(findings)),
        ("lines", "Every line", lines_section(findings)),
    ]
    links = "".join(f'<a href="#{place}">{title}</a>' for place, title, _ in sections)
    body = "".join(
        f'<section><h2 id="{place}">{title}</h2>{html}</section>' for place, title, html in sections
    )
    write_whole(
        path, f"{head(title=TITLE, style=STYLE)}{_header(findings, sources, links)}{body}</body>\n</html>\n"
    )


def _header(findings: Findings, sources: Sequence[str], links: str) -> str:
    records = [record for machine in findings.machines for record in machine.records]
    newest = sum(len(machine.newest) for machine in findings.machines)
    days = sorted({record.measured_at[:10] for record in records if record.measured_at})
    span = f", {days[0]} to {days[-1]}" if len(days) > 1 else "".join(f", {day}" for day in days)
    facts = f"{counted(newest, 'benchmark')} of {counted(len(records), 'line')}{span}; {', '.join(sources)}"
    noisy = sum(is_noisy(record) for machine in findings.machines for record in machine.newest)
    tally = "".join(
        f'<div><b>{count}</b><span class="chip {COLOURS.get(name, "")}">{MARKS[name]}</span></div>'
        for name in MARKS
        if (count := findings.tally.get(name))  # type: ignore[call-overload]
    )
    busy = f'<div><b>{noisy}</b><span class="chip noisy">~ noisy</span></div>' if noisy else ""
    return (
        f'<header><h1>{TITLE}</h1><p class="faint">{escaped(facts)}</p>'
        f'<div class="tally">{tally}{busy}</div><nav>{links}</nav></header>'
    )


def counted(count: int, noun: str) -> str:
    """`1 line`, `2 lines`"""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def _machines(findings: Findings) -> str:
    return f'<div class="columns">{"".join(map(_machine_card, findings.machines))}</div>'


def _machine_card(machine: Machine) -> str:
    rows = machine_facts(machine.facts)
    noisy = [record for record in machine.newest if is_noisy(record)]
    if noisy:
        rows.append(("noise", f"{len(noisy)} of {len(machine.newest)} newest lines: {unrest(noisy)}"))
    chip = ' <span class="chip noisy">~ noisy</span>' if noisy else ""
    facts = "".join(f"<dt>{escaped(name)}<dd>{escaped(value)}" for name, value in rows)
    card = f'<div class="card"><h3>{escaped(machine.name)}{chip}</h3><dl>{facts}</dl></div>'
    ceilings = [record for record in machine.newest if record.name == "ceilings"]
    if not ceilings:
        return card
    title = f"Ceilings of {escaped(machine.name)}"
    return f'{card}<div class="card"><h3>{title}</h3><dl>{"".join(map(_ceiling, ceilings))}</dl></div>'


def _ceiling(record: Record) -> str:
    what, _, how = record.work.partition(": ")
    value = f"{number(record.ours)} {record.unit}{' ~' if is_noisy(record) else ''}"
    if record.ours is None:
        value = record.refused or record.missing or "not measured"
    small = f"<br><small>{escaped(how)}</small>" if how else ""
    return f"<dt>{escaped(what)}<dd>{escaped(value)}{small}"


def _bars(findings: Findings) -> str:
    parts = []
    for machine in findings.machines:
        records = judged(machine)
        if records:
            # What is held against a bar first; among them the order of the files.
            records.sort(key=lambda record: record.bar_reads is None)
            name = f"<h3>{escaped(machine.name)}</h3>"
            parts.append(f"{name}{BAR_HEAD}{''.join(map(bar_row, records))}")
    return "".join(parts) or _nothing("held against a bar, a peer or a ceiling")


def _stacks(findings: Findings) -> str:
    many = len(findings.machines) > 1
    cards = [stack_card(stack, with_machine=many) for stack in findings.stacks]
    return "".join(f"{card}<br>" for card in cards) or _nothing("named pipeline or step-stages")


def _scalings(findings: Findings) -> str:
    many = len(findings.machines) > 1
    cards = [scaling_card(scaling, with_machine=many) for scaling in findings.scalings]
    return f'<div class="cards">{"".join(cards)}</div>' if cards else _nothing("named scale")


def _nothing(what: str) -> str:
    return f'<p class="faint">These files hold no record {what}.</p>'


def _costs(findings: Findings) -> str:
    if not findings.costs:
        return _nothing("of training in pairs/s (train, pipeline or step)")
    runs = paper_runs()
    heads = "".join(f'<th class="n">{run.name}<br>hours<th class="n"><br>$' for run in runs)
    rows = "".join(_cost_row(cost) for cost in findings.costs)
    sizes = "; ".join(f"{run.name}: {run.images:,} images" for run in runs)
    price = "" if any(cost.usd_per_hour for cost in findings.costs) else " Give --price-per-hour for dollars."
    return (
        f"<p>One pair is one source image in two views. {escaped(sizes)}. Training alone, no evaluation; "
        f"bold: the rate to quote of a machine.{price}</p>"
        '<div class="wide"><table class="cost"><tr><th>machine<th>rate of<th class="n">pairs/s'
        f'<th class="n">$/h<th class="n">images/$ {heads}</tr>{rows}</table></div>'
    )


def _cost_row(cost: Cost) -> str:
    smaller = (
        "" if cost.paper_work else "<br><small>not ResNet-50 at 224 px: hours of this smaller work</small>"
    )
    cells = [f'<td class="n">{number(cost.pairs_per_s)}', f'<td class="n">{usd(cost.usd_per_hour)}']
    cells.append(f'<td class="n">{number(cost.images_per_usd)}')
    for run in paper_runs():
        cells.append(f'<td class="n">{number(cost.hours(run))}<td class="n">{usd(cost.usd(run))}')
    noisy = ' <span class="chip noisy">~ noisy</span>' if is_noisy(cost.record) else ""
    return (
        f"<tr{' class=chosen' if cost.chosen else ''}><td>{escaped(cost.machine)}"
        f"<td>{escaped(cost.record.name)}: {cost.basis}{noisy}<br>"
        f"<small>{escaped(cost.record.work)}</small>{smaller}{''.join(cells)}</tr>"
    )


def _histories(findings: Findings) -> str:
    many = len(findings.machines) > 1
    cards = [
        _history_card(records, machine.name if many else "")
        for machine in findings.machines
        for records in machine.histories
    ]
    return f'<div class="cards">{"".join(cards)}</div>' if cards else _nothing("measured more than once")


def _history_card(records: Sequence[Record], machine: str) -> str:
    newest = records[-1]
    peer = f' <span class="faint">against {escaped(newest.peer)}</span>' if newest.peer else ""
    where = f"{escaped(machine)}<br>" if machine else ""
    points = [
        Point(
            x=place,
            y=record.ours or 0.0,
            low=record.ours_p10,
            high=record.ours_p90,
            hollow=is_noisy(record),
            told=f"{number(record.ours)} {record.unit}, {record.measured_at}, {code_of(record.machine)}",
        )
        for place, record in enumerate(records)
    ]
    every = max(1, (len(records) + 4) // 5)
    shown = [(place, record.measured_at[5:10]) for place, record in enumerate(records) if place % every == 0]
    hollow = "; hollow: noisy machine" if any(map(is_noisy, records)) else ""
    chart = line_chart(
        [Line(points=points)],
        x_ticks=shown,
        caption=f"{newest.unit}, 10th to 90th percentile{hollow}",
        y_title=f"{newest.name} over time",
    )
    steps = " &rarr; ".join(
        f"{number(record.ours)} <small>{escaped(code_of(record.machine)[:7])}</small>"
        for record in records[-6:]
    )
    return (
        f'<div class="card"><h3>{escaped(newest.name)}{peer}</h3>'
        f"<small>{where}{escaped(newest.work)}</small>{chart}<p>{steps}</p></div>"
    )
