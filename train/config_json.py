"""A config as JSON, there and back: beside every checkpoint, and compared before a run goes on."""

from __future__ import annotations

import dataclasses
import json
import os
import types
import typing
from pathlib import Path
from typing import Any, Literal

from linerate.shards.errors import UserError
from linerate.shards.terminal import nearest
from linerate.train.config import TrainConfig

CONFIG_VERSION = 1


def to_plain(config: TrainConfig) -> dict[str, Any]:
    """The config as JSON holds it: dicts, lists, numbers, strings."""
    plain: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(config)))
    return plain


def results_part(config: TrainConfig) -> dict[str, Any]:
    """The part that changes results, as plain data; a checkpoint continues only under an equal one."""
    return {name: value for name, value in to_plain(config).items() if name not in ("speed", "watch")}


def from_plain(plain: dict[str, Any]) -> TrainConfig:
    """The inverse of to_plain. Raises UserError for a field that this version does not know."""
    return typing.cast(TrainConfig, _build(TrainConfig, plain, where="config"))


def write_config(config: TrainConfig, path: Path) -> None:
    """Write the config as readable JSON, with the version of its layout: whole, or not at all."""
    text = json.dumps({"config_version": CONFIG_VERSION, **to_plain(config)}, indent=1)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_text(text + "\n", encoding="utf-8")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def load_config(path: Path) -> TrainConfig:
    """The config in a JSON file. Raises UserError where it is missing, newer, or no config."""
    if not path.is_file():
        raise UserError(f"{path} is missing; a run folder is what `linerate train ... --run DIR` made")
    try:
        plain = json.loads(path.read_text(encoding="utf-8"))
        version = plain.pop("config_version")
    except (ValueError, AttributeError, KeyError):
        raise UserError(f"{path} holds no config of a run; name another run folder") from None
    if version > CONFIG_VERSION:
        raise UserError(
            f"{path} has config version {version}, this linerate reads {CONFIG_VERSION}; update linerate"
        )
    return from_plain(plain)


def first_difference(ours: dict[str, Any], theirs: dict[str, Any], prefix: str = "") -> str | None:
    """The first field in which two plain configs differ, as `optim.lr=0.03 (there 0.06)`; None: equal."""
    for name in sorted(ours.keys() | theirs.keys()):
        a, b = ours.get(name), theirs.get(name)
        if isinstance(a, dict) and isinstance(b, dict):
            if found := first_difference(a, b, f"{prefix}{name}."):
                return found
        elif a != b:
            return f"{prefix}{name}={a} (there {b})"
    return None


def _build(kind: type[Any], plain: Any, *, where: str) -> Any:
    if not isinstance(plain, dict):
        raise UserError(f"{where} is {plain!r}, not a table of fields; it was not written by linerate")
    hints = typing.get_type_hints(kind)
    known = {f.name for f in dataclasses.fields(kind)}
    for name in plain:
        if name not in known:
            raise nearest(name, sorted(known), what=f"field in {where}")
    values = {}
    for name, value in plain.items():
        hint = hints[name]
        if isinstance(hint, type) and dataclasses.is_dataclass(hint):
            values[name] = _build(hint, value, where=f"{where}.{name}")
        elif typing.get_origin(hint) is tuple:
            values[name] = tuple(value)
        else:
            if not (name == "compile" and isinstance(value, bool)):  # Speed's own old form
                _check_literal(name, value, hint)
            values[name] = value
    return kind(**values)


def _check_literal(name: str, value: Any, hint: Any) -> None:
    choices = typing.get_args(hint)
    is_literal = typing.get_origin(hint) is Literal
    if is_literal and value not in choices:
        raise UserError(f"{name}={value!r} is not one of {', '.join(choices)}")
    assert is_literal or isinstance(hint, type | types.UnionType), hint
