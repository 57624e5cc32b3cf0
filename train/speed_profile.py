"""What `linerate tune` found for a machine, as a file that `linerate train --profile FILE` takes over.

Only fields of config.Speed that may not change results; a file that names another is refused.
"""

from __future__ import annotations

import dataclasses
import json
import os
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from linerate.pipeline.cores import usable_cores
from linerate.shards.errors import UserError
from linerate.shards.terminal import make_parent
from linerate.train.config import Speed, TrainConfig

PROFILE_VERSION = 1
# Speed's other field, precision, changes results by more than rounding: it is the user's to choose.
TUNABLE = tuple(f.name for f in dataclasses.fields(Speed) if f.name != "precision")


@dataclass(frozen=True, kw_only=True)
class SpeedProfile:
    """Switches and what they were measured for."""

    speed: dict[str, Any]
    """Fields of config.Speed that differ from the recipe's."""
    made_for: dict[str, Any]
    """What the time of a step follows from: encoder, size, batch, backend, device, cores, ranks."""
    report: dict[str, Any] = field(default_factory=dict)
    """How the switches were found; for people."""

    def flags(self) -> list[str]:
        """The switches as words of `linerate train`: what they are is checked together with all others."""
        words = []
        for name, value in self.speed.items():
            flag = name.replace("_", "-")
            on_or_off = f"--{flag}" if value else f"--no-{flag}"
            words += [on_or_off] if isinstance(value, bool) else [f"--{flag}", str(value)]
        return words

    def notes(self, config: TrainConfig, *, world_size: int | None = None) -> list[str]:
        """A line where the profile was made for something else than this run on this machine."""
        here = made_for(config, world_size=world_size)
        other = [
            f"{name} {there} (here {here[name]})"
            for name, there in self.made_for.items()
            if name in here and here[name] != there
        ]
        if not other:
            return []
        return [
            f"the profile was tuned for {', '.join(other)}: it holds, but `linerate tune` may find better"
        ]

    def save(self, path: Path) -> None:
        """Write it as readable JSON: whole, or not at all."""
        make_parent(path)
        text = json.dumps({"profile_version": PROFILE_VERSION, **dataclasses.asdict(self)}, indent=1)
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            temporary.write_text(text + "\n", encoding="utf-8")
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)


def load_profile(path: Path, *, flag: str = "--profile") -> SpeedProfile:
    """The profile in a file. Raises UserError where it is missing, newer, or holds what may not be tuned."""
    if not path.is_file():
        raise UserError(
            f"{flag} {path} is not there; make one with `linerate tune RECIPE --shards S --out {path}`"
        )
    try:
        plain = json.loads(path.read_text(encoding="utf-8"))
        version, speed = int(plain["profile_version"]), dict(plain["speed"])
        profile = SpeedProfile(speed=speed, made_for=dict(plain["made_for"]), report=plain.get("report", {}))
    except (ValueError, TypeError, KeyError):
        raise UserError(f"{flag} {path} is no profile of `linerate tune`; make it anew") from None
    if version > PROFILE_VERSION:
        raise UserError(
            f"{flag} {path} has version {version}, this linerate reads {PROFILE_VERSION}; update linerate"
        )
    if strange := sorted(speed.keys() - set(TUNABLE)):
        raise UserError(
            f"{flag} {path} sets {', '.join(strange)}, which may change results; "
            f"a profile may set {', '.join(TUNABLE)}"
        )
    hints = typing.get_type_hints(Speed)
    for name, value in speed.items():
        if not _is_of(value, hints[name]):
            raise UserError(f"{flag} {path} sets {name}={value!r}, which is no value for it; make it anew")
    return profile


def _is_of(value: Any, hint: Any) -> bool:
    if typing.get_origin(hint) is Literal:
        return value in typing.get_args(hint)
    if isinstance(value, bool):
        return hint is bool
    return isinstance(value, float | int if hint is float else hint)


def made_for(config: TrainConfig, *, world_size: int | None = None) -> dict[str, Any]:
    """What a profile depends on, of this config on this machine.

    world_size: ranks of the run; None: those that the launcher started.
    """
    import torch

    cuda = torch.cuda.is_available()
    return {
        "encoder": config.model.encoder,
        "size": config.views.size,
        "global_batch": config.optim.global_batch,
        "backend": config.views.backend,
        "precision": config.speed.precision,
        "device": torch.cuda.get_device_name() if cuda else "cpu",
        "cores": usable_cores(),
        "ranks": int(os.environ.get("WORLD_SIZE", "1")) if world_size is None else world_size,
    }
