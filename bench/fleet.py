"""Which records belong to which machine, what it is called, and what is the newest of each benchmark."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from linerate.bench.record import Key, Record, latest, load_jsonl


@dataclass(frozen=True, kw_only=True)
class Machine:
    """One machine and all that was measured on it."""

    name: str
    """short, and no other machine at hand has it: `H200, 16 cores`"""
    facts: Mapping[str, Any]
    """the record's machine, the newest value of each"""
    records: tuple[Record, ...]
    """oldest first"""

    @property
    def newest(self) -> list[Record]:
        """The last record of each key, in the order in which the keys first came."""
        return list(latest(self.records).values())

    @property
    def histories(self) -> list[list[Record]]:
        """Of each key that was measured more than once, its records that have a value, oldest first."""
        by_key: dict[Key, list[Record]] = {}
        for record in self.records:
            if record.ours is not None and record.refused is None:
                by_key.setdefault(record.key, []).append(record)
        return [records for records in by_key.values() if len(records) > 1]


def load_files(paths: Sequence[Path]) -> list[Record]:
    """The records of all files, oldest first; a line that stands in several is one record.

    Raises UserError for a file that is missing, empty or not one of ours.
    """
    records = sorted((record for path in paths for record in load_jsonl(path)), key=lambda r: r.measured)
    # By their text, as a record holds dicts.
    return list({repr(record): record for record in records}.values())


def machines_of(records: Iterable[Record]) -> list[Machine]:
    """The machines in the order in which they first came, each with its records in the order given."""
    alike: dict[Any, list[Record]] = {}
    for record in records:
        alike.setdefault(_hardware(record.machine), []).append(record)
    groups = [group for members in alike.values() for group in _by_cores(members)]
    names = _distinct([short_name(_facts(group)) for group in groups])
    return [
        Machine(name=name, facts=_facts(group), records=tuple(group))
        for name, group in zip(names, groups, strict=True)
    ]


def short_name(facts: Mapping[str, Any]) -> str:
    """What people call a machine: its GPU, or its CPU where it has none, and its cores."""
    gpu = gpu_of(facts)
    count = int(number_or(gpu.get("count"), 1))
    chip = str(gpu.get("name") or facts.get("cpu") or "unknown machine")
    chip = re.sub(r"\((R|TM|r|tm)\)|\b(NVIDIA|CPU|Processor|\d+-Core)\b|@.*", " ", chip)
    chip = " ".join(chip.split()) or "unknown machine"
    cores, installed = (number_or(facts.get(key), 0) for key in ("cores", "cores_installed"))
    if not (cores or installed):
        return chip
    # One core is what a benchmark pinned itself to, not what the machine has.
    shown = f"{cores:g} of {installed:g}" if 1 < cores < installed else f"{installed or cores:g}"
    return f"{f'{count}x ' if count > 1 else ''}{chip}, {shown} core{'' if shown == '1' else 's'}"


def gpu_of(facts: Mapping[str, Any]) -> Mapping[str, Any]:
    """What is known of the GPU; {} without one."""
    gpu = facts.get("gpu")
    return gpu if isinstance(gpu, Mapping) else {}


def number_or(value: Any, default: float) -> float:
    """The value where it is a number."""
    return value if isinstance(value, int | float) and not isinstance(value, bool) else default


def settled_work(record: Record) -> str:
    """The work without what only says how large the machine is: as many threads as it has cores."""
    found = re.search(r", (\d+) threads?\b", record.work)
    sizes = (record.machine.get("cores"), record.machine.get("cores_installed"))
    if found is None or int(found[1]) not in sizes:
        return record.work
    return f"{record.work[: found.start()]}, all threads{record.work[found.end() :]}"


def same_hardware(a: Record, b: Record) -> bool:
    """Whether two records may be of one machine; one core is what a benchmark pinned itself to."""
    cores = {number_or(record.machine.get("cores"), 0) for record in (a, b)}
    return _hardware(a.machine) == _hardware(b.machine) and len({size for size in cores if size > 1}) < 2


def _hardware(facts: Mapping[str, Any]) -> tuple[str, ...]:
    gpu = gpu_of(facts)
    parts = (facts.get("cpu"), facts.get("arch"), facts.get("cores_installed"), gpu.get("name"))
    return tuple(str(part) for part in (*parts, gpu.get("count", 1)))


def _by_cores(records: list[Record]) -> list[list[Record]]:
    """The same hardware with other shares of its cores (a container's quota) is another machine.

    A benchmark of one core pins itself to it, and its record says `cores` 1: such a line is of the machine
    that the others are of.
    """
    sizes = dict.fromkeys(number_or(record.machine.get("cores"), 0) for record in records)
    whole = [size for size in sizes if size > 1]
    if len(whole) <= 1:
        return [records]
    groups: dict[float, list[Record]] = {size: [] for size in whole}
    for record in records:
        size = number_or(record.machine.get("cores"), 0)
        groups[size if size > 1 else max(whole)].append(record)
    return list(groups.values())


def _facts(records: Sequence[Record]) -> dict[str, Any]:
    merged: dict[str, Any] = {}
    for record in records:
        merged.update({name: value for name, value in record.machine.items() if value is not None})
    cores = [number_or(record.machine.get("cores"), 0) for record in records]
    if max(cores, default=0):
        merged["cores"] = max(cores)
    return merged


def _distinct(names: Sequence[str]) -> list[str]:
    seen: dict[str, int] = {}
    distinct = []
    for name in names:
        seen[name] = seen.get(name, 0) + 1
        distinct.append(name if seen[name] == 1 else f"{name} ({seen[name]})")
    return distinct
