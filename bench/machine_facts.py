"""What the record of a machine says, as people read it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from linerate.bench.fleet import gpu_of, number_or
from linerate.bench.record import Record

# Endings of a name that are its unit.
UNITS = {
    "gb_per_s": "GB/s",
    "mb_per_s": "MB/s",
    "gb_s": "GB/s",
    "mb_s": "MB/s",
    "gib": "GiB",
    "mhz": "MHz",
    "w": "W",
    "ms": "ms",
    "s": "s",
}
SAID_ELSEWHERE = {"libraries", "code", "noise", "python"}
SAID = {"cpu", "arch", "cores", "cores_installed", "cpu_mhz", "memory_gib", "system", "gpu"}
SAID_OF_GPU = {
    "name",
    "count",
    "memory_gib",
    "sms",
    "compute_capability",
    "cuda",
    "driver_version",
    "clocks_sm",
    "clocks_mem",
    "clocks_max_sm",
    "power_draw",
    "power_limit",
}


def machine_facts(facts: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Name and value of what is known of a machine, without versions; what a newer version adds as it is."""
    cores, installed = (number_or(facts.get(key), 0) for key in ("cores", "cores_installed"))
    gpu = gpu_of(facts)
    rows = [
        ("CPU", _joined(facts.get("cpu"), facts.get("arch"), _with(facts.get("cpu_mhz"), "{} MHz"))),
        # One core is what a benchmark pinned itself to.
        ("cores", f"{cores:g} of {installed:g}" if 1 < cores < installed else f"{installed or cores:g}"),
        ("memory", _with(facts.get("memory_gib"), "{} GiB")),
        *_gpu_facts(gpu),
        ("system", _joined(facts.get("system"))),
        *_others(facts, SAID | SAID_ELSEWHERE),
        *((f"GPU {name}", value) for name, value in _others(gpu, SAID_OF_GPU)),
    ]
    return [(name, value) for name, value in rows if value and value != "0"]


def _gpu_facts(gpu: Mapping[str, Any]) -> list[tuple[str, str]]:
    if not gpu:
        return [("GPU", "none")]
    count = number_or(gpu.get("count"), 1)
    size = (_with(gpu.get("memory_gib"), "{} GiB"), _with(gpu.get("sms"), "{} SMs"))
    clocks = (_with(gpu.get("clocks_sm"), "SM {}"), _with(gpu.get("clocks_max_sm"), "of at most {}"))
    memory = _with(gpu.get("clocks_mem"), "memory {} MHz")
    power = (_with(gpu.get("power_draw"), "{}"), _with(gpu.get("power_limit"), "of {} W"))
    driver = (_with(gpu.get("driver_version"), "driver {}"), _with(gpu.get("cuda"), "CUDA {}"))
    return [
        ("GPU", f"{f'{count:g} x ' if count > 1 else ''}{_joined(gpu.get('name'), *size)}"),
        ("", _joined(*driver, _with(gpu.get("compute_capability"), "compute capability {}"))),
        ("clocks", _joined(" ".join(filter(None, clocks)), memory)),
        ("power", " ".join(filter(None, power))),
    ]


def _others(facts: Mapping[str, Any], said: set[str]) -> list[tuple[str, str]]:
    rows = []
    for name, value in facts.items():
        if name in said or value is None:
            continue
        if isinstance(value, Mapping):
            words = [" ".join(_named(key, one)) for key, one in value.items() if one is not None]
            rows.append((_plain(name), ", ".join(words)))
        else:
            rows.append(_named(name, value))
    return rows


def _named(name: str, value: Any) -> tuple[str, str]:
    """`read_gb_s`, 6.1 -> `read`, `6.1 GB/s`"""
    for ending, unit in UNITS.items():
        if str(name).endswith(f"_{ending}"):
            return _plain(name.removesuffix(f"_{ending}")), f"{value} {unit}"
    return _plain(name), str(value)


def _plain(name: str) -> str:
    return str(name).replace("_", " ")


def _joined(*words: Any) -> str:
    return ", ".join(str(word) for word in words if word)


def _with(value: Any, words: str) -> str:
    return words.format(value) if value else ""


def unrest(records: Sequence[Record]) -> str:
    """How unquiet the machine was while these records were measured, at most."""
    probes = [record.machine["noise"] for record in records]
    spread = max((number_or(probe.get("spread"), 0) for probe in probes), default=0)
    others = max((number_or(probe.get("others_cores"), 0) for probe in probes), default=0)
    words = [f"a fixed kernel varied by up to {100 * spread:.0f} %"] if spread else []
    words += [f"others used up to {others:.2g} cores"] if others else []
    return ", ".join(words) or "unquiet"
