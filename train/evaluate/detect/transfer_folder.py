"""OUT of a transfer: settings.json, run-0/{checkpoint.pt, log.jsonl, result.json}, run-1/ ..., result.json.

A killed command goes on from run-N/checkpoint.pt when it is given again.
"""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from linerate.shards.errors import UserError

_FORMAT = 1


@dataclass(frozen=True)
class TransferFolder:
    """The paths of a transfer and what may be done to them."""

    root: Path

    def open(self, settings: Mapping[str, Any]) -> None:
        """Write the settings, or find the same ones. Raises UserError for other ones, or another's folder."""
        path = self.root / "settings.json"
        mine = json.loads(json.dumps(settings, default=str))
        if path.exists():
            theirs = json.loads(path.read_text(encoding="utf-8"))
            if other := [key for key in mine | theirs if mine.get(key) != theirs.get(key)]:
                told = ", ".join(f"{key} {theirs.get(key)} (now {mine.get(key)})" for key in other[:3])
                raise UserError(
                    f"{self.root} holds another transfer: {told}; name another --out, or give its values"
                )
            return
        if self.root.exists() and (not self.root.is_dir() or any(self.root.iterdir())):
            raise UserError(
                f"--out {self.root} holds something that is no transfer; name an empty or new folder"
            )
        write_whole(path, json.dumps(mine, indent=1).encode())

    def run(self, number: int) -> Path:
        """The folder of one of --runs."""
        return self.root / f"run-{number}"


def save_state(folder: Path, state: Mapping[str, Any]) -> None:
    """Write FOLDER/checkpoint.pt: a temporary name, fsync, rename. Raises UserError; the old one stays."""
    path = folder / "checkpoint.pt"
    temporary = _temporary(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            torch.save({"format": _FORMAT, **state}, file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except (OSError, RuntimeError) as error:
        raise _unwritable(path, error) from None
    finally:
        temporary.unlink(missing_ok=True)


def load_state(folder: Path) -> dict[str, Any] | None:
    """What save_state wrote, on the CPU; None: nothing yet. Raises UserError where it is no whole one."""
    path = folder / "checkpoint.pt"
    if not path.exists():
        return None
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(state, dict) or state.get("format") != _FORMAT:
            raise ValueError("another format")
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError, ValueError, KeyError) as error:
        raise UserError(
            f"{path} is cut short or no checkpoint of a transfer ({type(error).__name__}); remove it: "
            "the same command starts this run anew"
        ) from None
    return state


def cut_log(folder: Path, *, done: int) -> None:
    """Drop what a killed run logged past its last checkpoint: those iterations are done again."""
    path = folder / "log.jsonl"
    if not path.exists():
        return
    kept = []
    for text in path.read_text(encoding="utf-8").splitlines():
        try:
            line = json.loads(text)
        except ValueError:
            continue  # the line that a kill cut short
        if line["iteration"] <= done:
            kept.append(text + "\n")
    write_whole(path, "".join(kept).encode())


def append_log(folder: Path, line: Mapping[str, Any]) -> None:
    """Add one line to FOLDER/log.jsonl. Raises UserError where it cannot be written."""
    path = folder / "log.jsonl"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
    except OSError as error:
        raise _unwritable(path, error) from None


def write_whole(path: Path, data: bytes) -> None:
    """Write under a temporary name and rename. Raises UserError where it cannot be written."""
    temporary = _temporary(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(data)
        temporary.replace(path)
    except OSError as error:
        raise _unwritable(path, error) from None


def _temporary(path: Path) -> Path:
    """One name for each file: what a killed process leaves is overwritten by the next."""
    return path.with_name(f".{path.name}.new")


def _unwritable(path: Path, error: Exception) -> UserError:
    why = getattr(error, "strerror", None) or str(error).splitlines()[0]
    return UserError(f"{path} cannot be written ({why}); mend that: the same command goes on")
