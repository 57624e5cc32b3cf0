"""A run's folder: config.json, log.jsonl, checkpoints/. One process writes it, rank 0.

Each rank adds a file of its own about samples that it had to replace.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from linerate.pipeline.bad_samples import BadSample, log_bad_sample
from linerate.shards.catalog import Catalog
from linerate.shards.errors import UserError
from linerate.train.checkpoint import (
    Checkpoint,
    checkpoint_name,
    list_checkpoints,
    load_newest,
    require_same_run,
)
from linerate.train.config import TrainConfig
from linerate.train.config_json import write_config


@dataclass(frozen=True, kw_only=True)
class Damage:
    """What was bad in one shard for one reason."""

    shard: str
    """The tar's name."""
    reason: str
    num_samples: int | None
    """Different samples; None: the whole shard could not be had."""


@dataclass(frozen=True)
class RunFolder:
    """The paths of a run and what may be done to them."""

    root: Path

    @property
    def checkpoints(self) -> Path:
        return self.root / "checkpoints"

    @property
    def config(self) -> Path:
        return self.root / "config.json"

    @property
    def log(self) -> Path:
        return self.root / "log.jsonl"

    def checkpoint_path(self, step: int) -> Path:
        """Where the checkpoint after that many steps lies."""
        return self.checkpoints / checkpoint_name(step)

    def resume(self, config: TrainConfig, catalog: Catalog) -> tuple[Checkpoint | None, list[str]]:
        """The newest whole checkpoint, None for a run that has none yet, and lines that people should read.

        Raises UserError where the folder holds another run, one on other shards, or something that is no run.
        """
        self._require_run_or_nothing()
        found = load_newest(self.checkpoints)
        if found is None:
            return None, []
        checkpoint, notes = found
        require_same_run(checkpoint, config, catalog, run_dir=self.root)
        if checkpoint.trained_on is None:
            notes = [
                *notes,
                f"the checkpoint does not say what it was trained on; {catalog.root} is taken for it",
            ]
        return checkpoint, notes

    def require_unused(self) -> None:
        """Raise UserError where a run began here already, or something else lies here."""
        self._require_run_or_nothing()
        if list_checkpoints(self.checkpoints) or self.log.exists():
            raise UserError(
                f"{self.root} holds a run already; --resume continues it, another --run starts a new one"
            )

    def require_writable(self) -> None:
        """Raise UserError where the folder, or the one that it will be made in, cannot be written to."""
        present = self.root
        while not present.exists():
            present = present.parent
        for folder in (present, self.checkpoints):
            if not folder.is_dir():
                continue
            try:
                # On most systems the file never has a name: nothing is left behind by a kill.
                with tempfile.TemporaryFile(dir=folder) as file:
                    file.write(b"x")
                    file.flush()
            except OSError as error:
                raise UserError(
                    f"--run {self.root} cannot be written: {folder}: {error.strerror or error}; "
                    f"name a folder that you may write to"
                ) from None

    def start(self, config: TrainConfig, *, done_steps: int) -> None:
        """Make the folder, write the config, and cut the log back to the steps that are done.

        A killed run's log reaches past its last checkpoint: those steps are done again and logged again.
        """
        self.checkpoints.mkdir(parents=True, exist_ok=True)
        write_config(config, self.config)
        kept = self.load_log_until(done_steps)
        temporary = self.log.with_name(".log.jsonl")
        temporary.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
        temporary.replace(self.log)

    def append(self, event: Mapping[str, Any]) -> None:
        """Add one line to the log; it is on its way to the disk when this returns. Raises UserError."""
        try:
            with self.log.open("a", encoding="utf-8") as file:
                file.write(json.dumps(event) + "\n")
        except OSError as error:
            raise UserError(
                f"{self.log} cannot be written ({error.strerror or error}); mend that, then --resume "
                f"continues from the last checkpoint"
            ) from None

    def bad_sample_log(self, *, rank: int) -> Callable[[BadSample], None]:
        """What takes a rank's findings: a line of its own file for each, and one on stderr."""

        def take(found: BadSample) -> None:
            log_bad_sample(found)
            self.root.mkdir(parents=True, exist_ok=True)
            with (self.root / f"bad_samples-rank{rank:05d}.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps({"rank": rank, **asdict(found)}) + "\n")

        return take

    def damage(self) -> list[Damage]:
        """What the ranks found bad, restarts included: one line for each shard and reason, in order."""
        found: dict[tuple[str, str], set[int | None]] = {}
        for path in self.bad_sample_logs():
            for line in _json_lines(path):
                reason = re.sub(rf"\S*{re.escape(line['shard'])}: ", "", line["reason"])
                found.setdefault((line["shard"], reason), set()).add(line["sample_id"])
        return [
            Damage(shard=shard, reason=reason, num_samples=None if None in ids else len(ids))
            for (shard, reason), ids in sorted(found.items())
        ]

    def bad_sample_logs(self) -> list[Path]:
        """The files in which the ranks told of each sample that they replaced."""
        return sorted(self.root.glob("bad_samples-rank*.jsonl"))

    def load_log(self, kind: str = "step") -> list[dict[str, Any]]:
        """The log's lines of one kind (step, knn, ...), oldest first."""
        return [line for line in self._log_lines() if line["event"] == kind]

    def load_log_until(self, done_steps: int) -> list[dict[str, Any]]:
        """The log's lines of the steps that are done, oldest first."""
        return [line for line in self._log_lines() if line["step"] <= done_steps]

    def _log_lines(self) -> list[dict[str, Any]]:
        return _json_lines(self.log) if self.log.exists() else []

    def _require_run_or_nothing(self) -> None:
        if self.root.exists() and not self.root.is_dir():
            raise UserError(f"{self.root} is a file; --run names a folder")
        if self.root.is_dir() and any(self.root.iterdir()) and not self.config.exists():
            raise UserError(f"{self.root} holds something that is no run; name an empty or new --run folder")


def _json_lines(path: Path) -> list[dict[str, Any]]:
    lines = []
    for text in path.read_text(encoding="utf-8").splitlines():
        try:
            lines.append(json.loads(text))
        except ValueError:
            continue  # the line that a kill cut short
    return lines
