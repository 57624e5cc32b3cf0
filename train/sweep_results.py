"""What a sweep found: each cell's figures and curves out of its run folder, beside the paper's cells."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

from linerate.train.run_folder import RunFolder
from linerate.train.sweep_cells import PaperCell, paper_cells
from linerate.train.sweep_plan import Cell, SweepPlan, label_of

Status = Literal["finished", "failed", "not run"]
NUM_POINTS = 60
KNN = "knn_top1"


@dataclass(frozen=True, kw_only=True)
class CellResult:
    """One line of results.jsonl."""

    over: str
    value: str
    dictionary: str
    num_negatives: int
    """Negatives of a query: K, of end-to-end K - 1."""
    ema_momentum: float
    shuffle: bool
    global_batch: int
    bn_group: int
    lr: float
    encoder: str
    size: int
    recipe: str
    seed: int
    run: str
    """The name of its run folder."""
    status: Status
    reason: str | None
    """Why it failed."""
    step: int
    """Steps done."""
    images: int
    """Images seen."""
    chance_loss: float
    """The loss where no key is told from another, nats."""
    loss: float | None
    """Mean over the last point of its curve, nats."""
    pretext_top1: float | None
    """Share of queries that find their key, of the same steps."""
    knn_top1: float | None
    """The monitor's last figure, in [0, 1]."""
    curve: dict[str, list[float]]
    """step, loss, pretext_top1: means over equal runs of logged steps, the step being the last of each."""
    knn_curve: dict[str, list[float]]
    """step, knn_top1."""
    paper: dict[str, Any] | None
    """The paper's cell of this value; None: it has none."""

    @property
    def finished(self) -> bool:
        return self.status == "finished"


def read_cell(cell: Cell, folder: RunFolder, *, reason: str | None = None) -> CellResult:
    """What the log of a cell's run tells; reason: why it ended before its end, if it was started."""
    config, ends = cell.config, folder.load_log("end")
    steps, judged = folder.load_log("step"), folder.load_log("knn")
    is_finished = bool(ends) and bool(ends[-1]["finished"])
    curve = thinned(steps, ("loss", "pretext_top1"))
    step = steps[-1]["step"] if steps else 0
    return CellResult(
        over=cell.over,
        value=cell.value,
        dictionary=cell.dictionary,
        num_negatives=config.num_negatives,
        ema_momentum=config.model.ema_momentum,
        shuffle=config.bn.shuffle,
        global_batch=config.optim.global_batch,
        bn_group=config.bn.bn_group,
        lr=config.optim.lr,
        encoder=config.model.encoder,
        size=config.views.size,
        recipe=config.recipe,
        seed=cell.seed,
        run=folder.root.name,
        status="finished" if is_finished else "failed" if reason else "not run",
        reason=None if is_finished else reason,
        step=step,
        images=step * config.optim.global_batch,
        chance_loss=config.chance_loss,
        loss=_last(curve["loss"]),
        pretext_top1=_last(curve["pretext_top1"]),
        knn_top1=judged[-1][KNN] if judged else None,
        curve=curve,
        knn_curve={"step": [line["step"] for line in judged], KNN: [line[KNN] for line in judged]},
        paper=asdict(cell.paper) if cell.paper else None,
    )


def thinned(lines: Sequence[dict[str, Any]], names: Sequence[str]) -> dict[str, list[float]]:
    """At most NUM_POINTS means over equal runs of a log's lines, each with the step that ends it."""
    width = max(1, math.ceil(len(lines) / NUM_POINTS))
    runs = [lines[start : start + width] for start in range(0, len(lines), width)]
    means = {name: [round(fmean(line[name] for line in run), 5) for run in runs] for name in names}
    return {"step": [run[-1]["step"] for run in runs], **means}


def write_results(path: Path, results: Sequence[CellResult]) -> None:
    """One JSON line a cell: the whole file, or the one from before."""
    temporary = path.with_name(f".{path.name}")
    text = "".join(json.dumps(asdict(result)) + "\n" for result in results)
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


@dataclass(frozen=True, kw_only=True)
class Row:
    """One value of a sweep over all its seeds, or a cell that only the paper has."""

    label: str
    paper: PaperCell | None
    results: list[CellResult]

    @property
    def state(self) -> str:
        """As `finished`, `1 of 3 finished`, or why it failed."""
        done = sum(result.finished for result in self.results)
        if not self.results:
            return "not in this sweep"
        if done == len(self.results):
            return "finished"
        reasons = [result.reason for result in self.results if result.reason]
        if len(self.results) == 1:
            return f"failed: {reasons[0]}" if reasons else "not run"
        return f"{done} of {len(self.results)} finished"

    def figures(self, name: str) -> list[float]:
        """That figure of every seed that has it."""
        found = [getattr(result, name) for result in self.results]
        return [value for value in found if value is not None]


def rows_of(plan: SweepPlan, results: Sequence[CellResult]) -> list[Row]:
    """The paper's cells and ours as one table, in the order of the values."""
    ours: dict[tuple[str | None, str], list[CellResult]] = {}
    for cell, result in zip(plan.cells, results, strict=True):
        ours.setdefault(cell.key, []).append(result)
    swept = {cell.dictionary for cell in plan.cells}
    papers = {(c.dictionary, c.value): c for c in paper_cells(plan.over, dictionaries=swept)}
    keys = list(dict.fromkeys([*papers, *ours]))
    if plan.over in ("K", "m"):
        keys.sort(key=lambda key: (key[0] or "", float(key[1])))
    return [
        Row(label=label_of(plan.over, key), paper=papers.get(key), results=ours.get(key, [])) for key in keys
    ]


def mean_and_range(values: Sequence[float], *, scale: float = 1.0, digits: int = 1) -> str:
    """As `31.2`, of several `31.2 (30.1 to 32.3)`; nothing: empty."""
    if not values:
        return ""
    told = [f"{scale * value:.{digits}f}" for value in (fmean(values), min(values), max(values))]
    return told[0] if len(values) == 1 else f"{told[0]} ({told[1]} to {told[2]})"


def _last(values: Sequence[float]) -> float | None:
    return values[-1] if values else None
