"""The curves of a sweep as one picture: loss, pretext accuracy and kNN over the images seen."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from linerate.train.sweep_plan import SweepPlan
from linerate.train.sweep_results import CellResult

_STYLES = {"queue": "-", "end-to-end": "--", "memory-bank": ":"}


def write_plot(path: Path, plan: SweepPlan, results: Sequence[CellResult]) -> None:
    """PNG: one colour a value, one line style a dictionary where several have it, one line a seed."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 3.8), layout="constrained", dpi=110)
    loss, pretext, knn = figure.subplots(1, 3)
    colours = _colours(plan)
    told: set[str] = set()
    for cell, result in zip(plan.cells, results, strict=True):
        label = None if cell.label in told else cell.label
        told.add(cell.label)
        line: dict[str, Any] = {"color": colours[cell.value], "ls": _STYLES[cell.dictionary], "lw": 1.4}
        batch, curve, judged = result.global_batch, result.curve, result.knn_curve
        images = [step * batch for step in curve["step"]]
        # Against chance, so that dictionaries of several sizes fit on one axis.
        loss.plot(images, [value / result.chance_loss for value in curve["loss"]], label=label, **line)
        pretext.plot(images, [100 * value for value in curve["pretext_top1"]], **line)
        seen, top1 = [step * batch for step in judged["step"]], [100 * value for value in judged["knn_top1"]]
        knn.plot(seen, top1, marker="o", ms=3, **line)
    loss.axhline(1.0, color="gray", lw=0.8)
    loss.set_title("loss / chance, ln(K + 1)")
    pretext.set_title("pretext top-1, %")
    knn.set_title("kNN top-1, %")
    for axis in (loss, pretext, knn):
        axis.set_xlabel("images seen")
        axis.spines[["top", "right"]].set_visible(False)
    pretext.set_ylim(bottom=0)
    figure.legend(loc="outside right upper", fontsize=8, frameon=False)
    temporary = path.with_name(f".{path.name}")
    figure.savefig(temporary, format="png", metadata={"Software": None})
    temporary.replace(path)


def _colours(plan: SweepPlan) -> dict[str, Any]:
    """A colour for each value: along a scale where values have an order."""
    import matplotlib as mpl

    values = list(dict.fromkeys(cell.value for cell in plan.cells))
    if plan.over not in ("K", "m"):
        return {value: f"C{number}" for number, value in enumerate(values)}
    values.sort(key=float)
    scale = mpl.colormaps["viridis"]
    return {value: scale(0.9 * place / max(1, len(values) - 1)) for place, value in enumerate(values)}
