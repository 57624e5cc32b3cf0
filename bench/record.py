"""One measurement as one JSON line."""

import dataclasses
import datetime
import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from linerate.shards.errors import UserError

# Kinds of measurement: rates of two sides over time, rates of ours alone, exact numbers.
Kind = Literal["time", "count"]
# What `views` once called its peer, our side in front, and what it calls it now.
_FORMER_PEERS = {r"\w+, against (torch)": r"\1", r"(\w+)'s \w+, against all of it": r"all of \1's time"}
# Name, peer, work, unit and ranks.
Key = tuple[str, str, str, str, int]


@dataclass(frozen=True, kw_only=True)
class Record:
    """A line of results. Rates and counts are in `unit`; a ratio above 1 means that ours is better."""

    name: str
    """the benchmark; a row of the table of bars"""
    peer: str | None
    """what ours is held against; None where ours is measured alone"""
    work: str
    """what one measurement does, with its sizes"""
    unit: str
    kind: Kind = "time"
    ours: float | None = None
    """median rate, or the count; None where nothing was measured"""
    theirs: float | None = None
    ratio: float | None = None
    """median over rounds of ours over theirs; for counts theirs over ours"""
    ratio_low: float | None = None
    ratio_high: float | None = None
    bar: float | None = None
    bar_reads: str | None = None
    """the bar in words, such as `ratio >= 3.0`"""
    met: bool | None = None
    """None where there is no bar, or where the work is smaller than the bar's"""
    ours_p10: float | None = None
    ours_p90: float | None = None
    theirs_p10: float | None = None
    theirs_p90: float | None = None
    ours_s: tuple[float, ...] = ()
    """seconds per call, round by round; the same rounds as theirs_s"""
    theirs_s: tuple[float, ...] = ()
    amount: float = 1.0
    """units of work in one call"""
    equal: str | None = None
    """what was found equal before the clock started"""
    ceiling: str | None = None
    """what could not be beaten on this machine; `none: ...` says why there is no such thing"""
    ceiling_rate: float | None = None
    """of its fastest round"""
    ceiling_share: float | None = None
    """`ours` over `ceiling_rate`; see `Ceiling` in contest.py for what a share over 1 says"""
    missing: str | None = None
    """the peer that is not installed, and how to bring it"""
    refused: str | None = None
    """why nothing was timed: the sides disagree, or the benchmark failed or ran past its limit"""
    note: str | None = None
    ranks: int | None = None
    """processes that worked together; None where that is not what varies"""
    stages: Mapping[str, float] = dataclasses.field(default_factory=dict)
    """stage -> median seconds of one call, in the order of a batch's way; {} where nobody looked inside"""
    verdict: str | None = None
    """what bounds the rate, in one sentence"""
    suite: str = "cpu"
    measured_at: str = ""
    """UTC, ISO 8601"""
    machine: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def key(self) -> Key:
        """What two records must share to be compared."""
        return (self.name, self.peer or "", self.work, self.unit, self.ranks or 0)

    @property
    def measured(self) -> datetime.datetime:
        """When, in UTC; long ago where the record does not say."""
        try:
            when = datetime.datetime.fromisoformat(self.measured_at)
        except ValueError:
            return datetime.datetime.min.replace(tzinfo=datetime.UTC)
        return when if when.tzinfo else when.replace(tzinfo=datetime.UTC)

    def to_json(self) -> dict[str, Any]:
        """The line as plain JSON types."""
        plain = dataclasses.asdict(dataclasses.replace(self, stages=dict(self.stages)))
        return {**plain, "ours_s": list(self.ours_s), "theirs_s": list(self.theirs_s)}


def append_jsonl(path: Path, record: Record) -> None:
    """Add one line to `path`, making it and its folder where they are missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(record.to_json(), allow_nan=False) + "\n")


def compact_json(record: Record) -> dict[str, Any]:
    """What a record found, without where and when and its single rounds; what is empty is left out."""
    left_out = {"machine", "ours_s", "theirs_s", "measured_at", "suite", "amount"}
    fields = {name: value for name, value in record.to_json().items() if name not in left_out}
    return {
        name: float(f"{value:.5g}") if isinstance(value, float) else value
        for name, value in fields.items()
        if value not in (None, "", {})
    }


def load_jsonl(path: Path) -> list[Record]:
    """The records of a results file, in order. Fields that a newer version added are dropped.

    Raises UserError for a file that is missing or is not one of ours.
    """
    if path.is_dir():
        files = sorted(path.glob("*.jsonl"))
        found = f"its last by name is {files[-1]}" if files else "it holds no file NAME.jsonl"
        raise UserError(f"{path} is a folder, and results are a file of JSON lines; {found}")
    if not path.is_file():
        raise UserError(f"there is no results file {path}; `linerate bench run --out {path}` writes one")
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError:
        raise UserError(f"{path} is no text; give a file that `linerate bench run --out` wrote") from None
    records = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            records.append(from_json(json.loads(line)))
        except (ValueError, TypeError, AttributeError) as error:
            raise UserError(
                f"{path}, line {number}, is no benchmark record ({error}); "
                "give a file that `linerate bench run --out` wrote"
            ) from None
    if not records:
        raise UserError(f"{path} holds no records; `linerate bench run --out {path}` writes some")
    return records


def from_json(fields: Mapping[str, Any]) -> Record:
    """The inverse of `to_json`; fields that a newer version added are dropped, what an older one named
    otherwise is named as now.

    Raises TypeError or AttributeError for what is no record.
    """
    known = {field.name for field in dataclasses.fields(Record)}
    record = Record(**{key: value for key, value in fields.items() if key in known})
    _require_types(record)
    return dataclasses.replace(
        record,
        peer=_peer_now(record.peer) if record.name == "views" else record.peer,
        ours_s=tuple(record.ours_s),
        theirs_s=tuple(record.theirs_s),
    )


def _peer_now(peer: str | None) -> str | None:
    found = ((re.fullmatch(pattern, peer or ""), now) for pattern, now in _FORMER_PEERS.items())
    return next((match.expand(now) for match, now in found if match), peer)


def _require_types(record: Record) -> None:
    """Raise TypeError for a field that holds something else than it is there for."""
    numbers: list[Any] = [*record.ours_s, *record.theirs_s, *record.stages.values()]
    for field in dataclasses.fields(record):
        value = getattr(record, field.name)
        if value is None and field.type in (str | None, float | None, int | None, bool | None):
            continue
        if field.type in (str, str | None) and not isinstance(value, str):
            raise TypeError(f"{field.name} {value!r} is no text")
        if field.type in (float, float | None, int | None):
            numbers.append(value)
    for value in numbers:
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise TypeError(f"{value!r} is no finite number")
    if not isinstance(record.machine, dict):
        raise TypeError(f"machine {record.machine!r} is no object")


def latest(records: Iterable[Record]) -> dict[Key, Record]:
    """The last record of each key: a results file is appended to, and the newest line counts."""
    return {record.key: record for record in records}


def is_noisy(record: Record) -> bool:
    """The machine was too unquiet while this was measured."""
    noise = record.machine.get("noise")
    return isinstance(noise, Mapping) and bool(noise.get("noisy"))


def lacking(record: Record) -> str | None:
    """What a measurement went without, in two words: `no peer`, or what ours itself needs, as `no GPU`."""
    if not record.missing:
        return None
    if record.ours is not None:
        return "no peer"
    if "CUDA device" in record.missing:
        return "no GPU"
    # As missing_peer and missing_backend tell it: `nvidia.dali is not installed; bring it with ...`.
    module, told, _ = record.missing.partition(" is not installed")
    return f"no {module.split()[-1].rpartition('.')[2]}" if told else "not run"


def more_is_better(record: Record) -> bool:
    """Rates and accuracies; other counts are costs, such as bytes or launches."""
    return record.kind == "time" or "top-1" in record.unit


def is_projection(record: Record) -> bool:
    """By formula from what was measured on fewer ranks; no measurement."""
    return (record.note or "").startswith("projection")
