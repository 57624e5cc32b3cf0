"""Checks that several parts of a config share."""

from __future__ import annotations

from linerate.shards.errors import UserError


def at_least(name: str, value: int | None, least: int) -> None:
    """Raise UserError where a value that is given is smaller."""
    if value is not None and value < least:
        raise UserError(f"{name}={value} is too small; the least is {least}")


def divides(name: str, part: int, whole_name: str, whole: int) -> None:
    """Raise UserError, with the nearest that do, where the part does not divide the whole."""
    if 1 <= part <= whole and whole % part == 0:
        return
    fits = [d for d in range(1, whole + 1) if whole % d == 0]
    below = [d for d in fits if d < part][-1:]
    above = [d for d in fits if d > part][:1]
    raise UserError(
        f"{name}={part} does not divide {whole_name}={whole}; "
        f"the nearest that do: {', '.join(map(str, below + above))}"
    )
