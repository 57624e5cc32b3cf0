"""What one training of a classifier leaves on the disk, so that the same command goes on where it stopped.

FOLDER/config.json says what it is of, state.pt continues it, log.jsonl has a line for each epoch. One process
writes, rank 0.
"""

from __future__ import annotations

import io
import json
import os
import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from linerate.shards.errors import UserError
from linerate.train.config_json import first_difference

FORMAT_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class ClassifierState:
    """What continues a training: plain data and tensors only, so that no code runs when it is loaded."""

    step: int
    """Steps that are done."""
    module: dict[str, torch.Tensor]
    """The classifier, with the backbone where that learns."""
    optimizer: dict[str, Any]
    sums: torch.Tensor
    """(4,) float64 of the epoch so far: loss, hits at 1 and at 5, images; mean over the ranks."""
    history: list[dict[str, Any]]
    """The lines of the log, one for each epoch that is done."""


@dataclass(frozen=True)
class ClassifierFolder:
    """The paths of a training and what may be done to them."""

    root: Path

    @property
    def state(self) -> Path:
        return self.root / "state.pt"

    def load(self, about: Mapping[str, Any]) -> ClassifierState | None:
        """Where it stands; None: it has not begun.

        about: what it is of. Raises UserError where the folder holds another one, or a damaged state.
        """
        config = self.root / "config.json"
        if not config.exists():
            if self.root.exists() and (not self.root.is_dir() or any(self.root.iterdir())):
                raise UserError(f"{self.root} holds something that is no evaluation; name another --out")
            return None
        try:
            before = json.loads(config.read_text(encoding="utf-8"))
        except ValueError:
            raise UserError(f"{config} is damaged; remove {self.root} to begin anew") from None
        if difference := first_difference(_plain(about), before):
            raise UserError(
                f"{self.root} holds another evaluation: {difference}; name another --out, or give the value "
                "it has there"
            )
        return self._load_state() if self.state.exists() else None

    def start(self, about: Mapping[str, Any]) -> None:
        """Make the folder and write down what it is of."""
        self.root.mkdir(parents=True, exist_ok=True)
        _replace(self.root / "config.json", json.dumps(_plain(about), indent=1).encode() + b"\n")

    def save(self, state: ClassifierState) -> None:
        """Write the state, whole or not at all, and then the log, which follows from it."""
        buffer = io.BytesIO()
        torch.save({"format_version": FORMAT_VERSION, **vars(state)}, buffer)
        _replace(self.state, buffer.getbuffer())
        lines = "".join(json.dumps(line) + "\n" for line in state.history)
        _replace(self.root / "log.jsonl", lines.encode())

    def _load_state(self) -> ClassifierState:
        damage = (RuntimeError, EOFError, pickle.UnpicklingError, ValueError, KeyError, TypeError)
        try:
            with self.state.open("rb") as file:
                state = torch.load(file, map_location="cpu", weights_only=True)
            version = int(state.pop("format_version"))
            found = ClassifierState(**state) if version == FORMAT_VERSION else None
        except damage as error:
            raise UserError(
                f"{self.state} is damaged ({type(error).__name__}); remove it to begin anew"
            ) from None
        if found is None:
            raise UserError(
                f"{self.state} has format {version}, this linerate reads {FORMAT_VERSION}; update linerate"
            )
        return found


def _plain(about: Mapping[str, Any]) -> dict[str, Any]:
    plain: dict[str, Any] = json.loads(json.dumps(about))
    return plain


def _replace(path: Path, data: bytes | memoryview) -> None:
    """Write under a temporary name, fsync, rename. Raises UserError with the file of before untouched."""
    # One name: what a killed process leaves is overwritten by the next.
    temporary = path.with_name(f".{path.name}.new")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        raise UserError(
            f"{path} cannot be written ({error.strerror or error}); mend that: the same command goes on from "
            "what is there"
        ) from None
    finally:
        temporary.unlink(missing_ok=True)
