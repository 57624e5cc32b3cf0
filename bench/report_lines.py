"""The last part of the report's page: every line of every file, with its work, versions and commit."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from linerate.bench.findings import Findings
from linerate.bench.record import Record, is_noisy, is_projection
from linerate.bench.record_table import number
from linerate.bench.report_parts import chips, number_x
from linerate.shards.html_page import escaped

HEADS = (
    "measured",
    "benchmark",
    "work",
    "ours",
    "theirs",
    "ratio (95 %)",
    "bar",
    "ceiling",
    "code",
    "versions",
)
NUMBERS = ("ours", "theirs", "ratio (95 %)")


def lines_section(findings: Findings) -> str:
    """A table of each machine's records, the newest first; those that a newer one replaced are faint."""
    versions: dict[str, str] = {}
    many = len(findings.machines) > 1
    parts = []
    for machine in findings.machines:
        newest = {id(record) for record in machine.newest}
        rows = "".join(
            _row(record, replaced=id(record) not in newest, versions=versions)
            for record in sorted(machine.records, key=lambda record: record.measured, reverse=True)
        )
        heads = "".join(f"<th{' class=n' if name in NUMBERS else ''}>{name}" for name in HEADS)
        title = f"<h3>{escaped(machine.name)}</h3>" if many else ""
        parts.append(f'{title}<div class="wide"><table class="lines"><tr>{heads}</tr>{rows}</table></div>')
    told = "".join(f"<dt>{letter}<dd>{escaped(text)}" for text, letter in versions.items())
    return f'{"".join(parts)}<h3>Versions</h3><dl class="versions">{told}</dl>'


def _row(record: Record, *, replaced: bool, versions: dict[str, str]) -> str:
    letter = versions.setdefault(versions_of(record.machine), _letter(len(versions)))
    work = [escaped(record.work)]
    for word in ("note", "verdict", "equal", "missing", "refused"):
        text = getattr(record, word)
        work += [f"<small>{'' if word == 'note' else f'{word}: '}{escaped(text)}</small>"] if text else []
    peer = f"<br><small>against {escaped(record.peer)}</small>" if record.peer else ""
    ranks = f"<br><small>{record.ranks} ranks</small>" if record.ranks else ""
    bar = f"<br><small>{escaped(record.bar_reads)}</small>" if record.bar_reads else ""
    share = "" if record.ceiling_share is None else f"{100 * record.ceiling_share:.0f} %"
    share = share or ("-" if record.ceiling else "")
    ceiling = f"{share}<br><small>{escaped(record.ceiling or '')}</small>" if share else ""
    unit = f"<br><small>{escaped(record.unit)}</small>"
    stands = chips(record) if bar or record.refused or record.missing or is_noisy(record) else ""
    cells = [
        f'<td class="short">{escaped(record.measured_at[:16].replace("T", " "))}',
        f'<td class="short"><b>{escaped(record.name)}</b>{peer}{ranks}',
        f'<td class="work">{"<br>".join(work)}',
        f'<td class="n">{number(record.ours)}{unit}',
        f'<td class="n">{number(record.theirs)}',
        f'<td class="n">{_ratio(record)}',
        f"<td>{stands}{bar}",
        f"<td>{ceiling}",
        f'<td class="code">{escaped(code_of(record.machine))}',
        f"<td>{letter}",
    ]
    faint = replaced or is_projection(record)
    return f"<tr{' class=old' if faint else ''}>{''.join(cells)}</tr>"


def _ratio(record: Record) -> str:
    if record.ratio is None:
        return "-"
    if record.ratio_low is None or record.ratio_high is None or record.kind == "count":
        return number_x(record.ratio)
    return f"{number_x(record.ratio)}<br><small>{record.ratio_low:.2f} to {record.ratio_high:.2f}</small>"


def _letter(place: int) -> str:
    """A, B, ... Z, AA, AB, ..."""
    more, place = divmod(place, 26)
    return (_letter(more - 1) if more else "") + chr(ord("A") + place)


def versions_of(machine: Mapping[str, Any]) -> str:
    """Python, driver and libraries in one line."""
    libraries = machine.get("libraries")
    gpu = machine.get("gpu")
    parts = [f"Python {machine['python']}"] if machine.get("python") else []
    if isinstance(gpu, Mapping):
        parts += [
            f"{word} {gpu[key]}"
            for word, key in (("driver", "driver_version"), ("CUDA", "cuda"))
            if gpu.get(key)
        ]
    if isinstance(libraries, Mapping):
        parts += [f"{name} {version}" for name, version in libraries.items()]
    code = machine.get("code")
    if isinstance(code, Mapping) and code.get("path"):
        parts.append(f"code from {code['path']}")
    return ", ".join(parts) or "unknown"


def code_of(machine: Mapping[str, Any]) -> str:
    """Commit, a plus where files had been changed since, or the hash of the sources where there is none."""
    code = machine.get("code")
    if not isinstance(code, Mapping):
        return "-"
    if code.get("commit"):
        return f"{code['commit']}{'+' if code.get('dirty') else ''}"
    return f"{code.get('version', '-')}, sources {code.get('sources_xxh3', '-')}"
