"""Records for the tests of reports: rates of machines that never were."""

import dataclasses
from typing import Any

import numpy as np

from linerate.bench.record import Record

DESK: dict[str, Any] = {"cpu": "AMD Ryzen 9 7950X 16-Core Processor", "cores": 32.0, "cores_installed": 32}
NODE: dict[str, Any] = {
    "cpu": "INTEL(R) XEON(R) PLATINUM 8558",
    "cores": 16.0,
    "cores_installed": 192,
    "python": "3.12.3",
    "gpu": {"name": "NVIDIA H200", "count": 1, "sms": 132, "driver_version": "580.65", "cuda": "13.0"},
    "libraries": {"torch": "2.15.0"},
    "code": {"version": "0.1.0", "commit": "aabbccddeeff", "dirty": False},
}


def made(rate: float | None, *, name: str = "step", amount: float = 256.0, **changes: Any) -> Record:
    """A record of `rate` pairs/s on NODE; its seven rounds lie evenly around it."""
    seconds = () if not rate else amount / rate * (1 + 0.02 * np.linspace(-1, 1, 7))
    record = Record(
        name=name,
        peer=None,
        work="compiled: resnet50, 224 px, b256, K=65536, bf16, groups=1",
        unit="pairs/s",
        ours=rate,
        ours_p10=None if rate is None else 0.99 * rate,
        ours_p90=None if rate is None else 1.01 * rate,
        ours_s=tuple(map(float, seconds)),
        amount=amount,
        measured_at="2026-11-28T10:00:00+00:00",
        machine=NODE,
    )
    return dataclasses.replace(record, **changes)


def versus(rate: float, ratio: float, bar: float | None = None, **changes: Any) -> Record:
    """A record with a peer that is `ratio` times as slow."""
    about: dict[str, Any] = {"peer": "plain torch", "theirs": rate / ratio, "ratio": ratio}
    about |= {"ratio_low": 0.95 * ratio, "ratio_high": 1.05 * ratio}
    if bar is not None:
        about |= {"bar": bar, "bar_reads": f"ratio >= {bar:g}", "met": ratio >= bar}
    return made(rate, **{**about, **changes})


def scaled(mode: str, ranks: int, rate: float, *, one: float = 100.0, **changes: Any) -> Record:
    """A point of a scaling curve. one: pairs/s of one rank."""
    about: dict[str, Any] = {"name": "scale", "work": f"{mode}: resnet50, {ranks} ranks", "ranks": ranks}
    if ranks > 1:
        about |= {"theirs": ranks * one, "ratio": rate / (ranks * one)}
    return made(rate, **{**about, **changes})


HOSTILE = "</td><script>alert(1)</script>\"'&[red]\x1b[31m|"
