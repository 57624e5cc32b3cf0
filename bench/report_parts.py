"""Pieces of the report's page: rows against bars and ceilings, stacks of stages, curves."""

from __future__ import annotations

from collections.abc import Sequence

from linerate.bench.findings import ScalePoint, Scaling, Stack, reach, status
from linerate.bench.line_chart import Line, Point, line_chart
from linerate.bench.record import Record, is_noisy
from linerate.bench.record_table import number
from linerate.shards.html_page import escaped

MARKS = {
    "met": "&#10003; met",
    "not met": "&#10007; not met",
    "refused": "&#10007; refused",
    "other size": "other size",
    "no bar": "no bar",
    "not measured": "not measured",
}
COLOURS = {"met": "met", "not met": "unmet", "refused": "unmet"}


def chips(record: Record) -> str:
    """Where a record stands, and whether the machine was too busy to believe it."""
    found = status(record)
    noisy = '<span class="chip noisy">~ noisy</span>' if is_noisy(record) else ""
    return f'<span class="chip {COLOURS.get(found, "")}">{MARKS[found]}</span>{noisy}'


def bar_row(record: Record) -> str:
    """A record as bars: against its bar or its peer, and against its ceiling."""
    peer = f' <span class="faint">against {escaped(record.peer)}</span>' if record.peer else ""
    note = f"<br><small>{escaped(record.note)}</small>" if record.note else ""
    theirs = (
        f'<small class="theirs">theirs {number(record.theirs)}</small>' if record.theirs is not None else ""
    )
    ours = "-" if record.ours is None else f"{number(record.ours)} <small>{escaped(record.unit)}</small>"
    return (
        f'<div class="row"><div class="what"><b>{escaped(record.name)}</b>{peer}<br>'
        f"<small>{escaped(record.work)}</small>{note}</div>"
        f'<div class="rate">{ours}{theirs}</div>'
        f'<div class="bar">{_against_bar(record)}</div>'
        f'<div class="ceiling">{_against_ceiling(record)}</div>'
        f'<div class="verdicts">{chips(record)}</div></div>'
    )


BAR_HEAD = (
    '<div class="row top"><div>benchmark, and what it did</div><div class="rate">ours</div>'
    "<div>against the mark: the bar, or (dotted) the peer</div>"
    "<div>share of the ceiling</div><div></div></div>"
)


def _against_bar(record: Record) -> str:
    refused = f"refused: {record.refused}" if record.refused else None
    why = [f"<small>{escaped(text)}</small>" for text in (refused, record.missing) if text]
    found = reach(record)
    if found is None:
        bar = f"<small>bar: {escaped(record.bar_reads)}</small>" if record.bar_reads else ""
        return "<br>".join([*why, bar] if bar else why)
    colour = COLOURS.get(status(record), "") if found.of == "bar" else ""
    tick = "tick" if found.of == "bar" else "tick peer"
    bar = _track(found.value / 2, colour, span=(found.low / 2, found.high / 2), tick=tick)
    return f"{bar}{_in_words(record)}{''.join(f'<br>{line}' for line in why)}"


def _in_words(record: Record) -> str:
    """`2.29x (1.83 to 2.69), bar 3`, or of a bar on our own value that alone."""
    words = []
    if record.ratio is not None:
        exact = record.kind == "count" or record.ratio_low is None or record.ratio_high is None
        interval = "" if exact else f" <small>({record.ratio_low:.2f} to {record.ratio_high:.2f})</small>"
        words.append(f"{number_x(record.ratio)}{interval}")
    if record.bar_reads:
        words.append(f'<small class="whole">bar: {escaped(record.bar_reads)}</small>')
    return " ".join(words)


def number_x(ratio: float) -> str:
    """A ratio: two decimals, none where it is large."""
    return f"{ratio:.2f}x" if ratio < 100 else f"{ratio:,.0f}x"


def _against_ceiling(record: Record) -> str:
    if record.ceiling_share is None:
        reason = (record.ceiling or "").removeprefix("none: ")
        return f"<small>no ceiling: {escaped(reason)}</small>" if reason else ""
    most = f"{number(record.ceiling_rate)} {escaped(record.unit)}" if record.ceiling_rate is not None else ""
    return (
        f"{_track(record.ceiling_share, 'ceiling')}{100 * record.ceiling_share:.0f} % "
        f"<small>of {escaped(record.ceiling or 'its ceiling')}, {most}</small>"
    )


def _track(share: float, colour: str, *, span: tuple[float, float] | None = None, tick: str = "") -> str:
    over = " over" if share > 1 else ""
    parts = [f'<i class="fill {colour}{over}" style="width:{_percent(share)}"></i>']
    if span is not None and span[1] > span[0] and span[0] < 1:
        low, high = (min(1.0, max(0.0, edge)) for edge in span)
        parts.append(f'<i class="span" style="left:{_percent(low)};width:{_percent(high - low)}"></i>')
    if tick:
        parts.append(f'<i class="{tick}"></i>')
    return f'<div class="track">{"".join(parts)}</div>'


def _percent(share: float) -> str:
    return f"{100 * min(1.0, max(0.0, share)):.1f}%"


# A word of a stage's name, and its colour: data in blues, forwards in greens, the rest apart.
STAGE_COLOURS = {
    "read": "#1f4e8c",
    "decode": "#2f6db5",
    "augment": "#4a86c5",
    "device": "#5b78a8",
    "wait": "#68707a",
    "query": "#1f7a55",
    "key": "#3b8f6a",
    "shuffle": "#a06a12",
    "loss": "#b4531f",
    "backward": "#9c3535",
    "optim": "#6747ab",
    "sgd": "#6747ab",
    "ema": "#8662c4",
    "enqueue": "#a83a78",
    "log": "#5f6b7a",
}
OTHER_COLOURS = ("#4d7d86", "#7d6b4d", "#6b7d4d", "#7d4d6b")


def stack_card(stack: Stack, *, with_machine: bool) -> str:
    """The stages of one batch as a bar, with each one's time and share, and the verdict."""
    total = sum(stack.stages.values())
    colours = {stage: _stage_colour(stage, number) for number, stage in enumerate(stack.stages)}
    segments = "".join(
        f'<span class="{_label_class(stage, seconds / total)}" '
        f'style="flex:{seconds / total:.4f} 0 0;background:{colours[stage]}" '
        f'title="{escaped(f"{stage}: {milliseconds(seconds)}, {100 * seconds / total:.1f} %")}">'
        f"{escaped(stage)}</span>"
        for stage, seconds in stack.stages.items()
    )
    legend = "".join(
        f'<li><i style="background:{colours[stage]}"></i>{escaped(stage)}'
        f"<span>{milliseconds(seconds)} <small>{100 * seconds / total:.1f} %</small></span></li>"
        for stage, seconds in stack.stages.items()
    )
    verdict = f'<p class="verdict">{escaped(stack.verdict)}</p>' if stack.verdict else ""
    machine = f" <small>{escaped(stack.machine)}</small>" if with_machine else ""
    note = f"<p><small>{escaped(stack.note)}</small></p>" if stack.note else ""
    return (
        f'<div class="card"><h3>{escaped(stack.name)}{machine}</h3>{verdict}'
        f"<small>{escaped(stack.work)}</small>"
        f'<div class="stack">{segments}</div><ul class="legend">{legend}</ul>'
        f"<p><small>{_sum_words(stack, total)}</small></p>{note}</div>"
    )


def _label_class(stage: str, share: float) -> str:
    """Whether a stage's name fits its segment: always, on a wide screen, or nowhere."""
    if share > 0.026 * len(stage) + 0.04:
        return "named"
    return "named-wide" if share > 0.0075 * len(stage) + 0.015 else "unnamed"


def _sum_words(stack: Stack, total: float) -> str:
    overlap = "; stages overlap" if stack.whole_s < 0.98 * total else ""
    return f"stages added up: {milliseconds(total)}, one batch: {milliseconds(stack.whole_s)}{overlap}"


def _stage_colour(stage: str, place: int) -> str:
    name = stage.lower()
    found = next((colour for word, colour in STAGE_COLOURS.items() if word in name), None)
    return found or OTHER_COLOURS[place % len(OTHER_COLOURS)]


def milliseconds(seconds: float) -> str:
    """A duration in the unit that fits."""
    if seconds >= 10:
        return f"{seconds:,.1f} s"
    return f"{1e3 * seconds:,.1f} ms" if seconds >= 1e-3 else f"{1e6 * seconds:,.0f} us"


def scaling_card(scaling: Scaling, *, with_machine: bool) -> str:
    """Ranks against pairs/s: measured, ideal and projected; below it each point with its efficiency."""
    machine = f" <small>{escaped(scaling.machine)}</small>" if with_machine else ""
    rows = "".join(_scale_row(point) for point in scaling.points)
    notes = [f"{p.ranks} ranks: {p.record.note}" for p in scaling.points if p.projected]
    told = "".join(f"<p><small>{escaped(note)}</small></p>" for note in notes)
    return (
        f'<div class="card"><h3>{escaped(scaling.title)}{machine}</h3>{_scale_chart(scaling)}'
        f'<div class="wide"><table><tr><th class="n">ranks<th class="n">pairs/s<th class="n">ideal'
        f'<th class="n">efficiency<br><small>median of rounds</small><th></tr>{rows}</table></div>'
        f"{told}</div>"
    )


def _scale_row(point: ScalePoint) -> str:
    told = "projected" if point.projected else "measured"
    noisy = ' <span class="chip noisy">~ noisy</span>' if is_noisy(point.record) else ""
    return (
        f'<tr{" class=old" if point.projected else ""}><td class="n">{point.ranks:,}'
        f'<td class="n">{number(point.rate)}<td class="n">{number(point.ideal)}'
        f'<td class="n">{100 * point.efficiency:.0f} %<td><small>{told}</small>{noisy}'
    )


def _scale_chart(scaling: Scaling) -> str:
    def points(of: Sequence[ScalePoint]) -> list[Point]:
        return [
            Point(
                x=p.ranks,
                y=p.rate,
                low=p.low,
                high=p.high,
                hollow=p.projected,
                told=f"{p.ranks} ranks: {number(p.rate)} pairs/s, {100 * p.efficiency:.0f} % of ideal",
            )
            for p in of
        ]

    measured = [p for p in scaling.points if not p.projected]
    projected = [p for p in scaling.points if p.projected]
    ideal = [Point(x=p.ranks, y=p.ideal) for p in scaling.points]
    lines = [Line(points=ideal, style="ideal", marks=False), Line(points=points(measured))]
    if projected:
        start = measured[-1:] if measured else []
        lines.insert(1, Line(points=points([*start, *projected]), style="projected"))
    ranks = sorted({p.ranks for p in scaling.points})
    shown = ranks if len(ranks) <= 8 else ranks[:: (len(ranks) + 7) // 8]
    return line_chart(
        [line for line in lines if line.points],
        x_ticks=[(rank, f"{rank}") for rank in shown],
        caption="pairs/s over ranks; dotted: ideal" + ("; dashed: projection" if projected else ""),
        y_title=f"pairs/s over ranks: {scaling.title}",
        logarithmic=max(ranks) > 8 * min(ranks),
    )
