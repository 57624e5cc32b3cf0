"""The paper's ablations: what each varies, the values it tried, and what it reports for them.

A figure is the linear probe's top-1, in percent, of a ResNet-50 pretrained for 200 epochs on ImageNet-1M. Its
mark says how it was read: `read` in the paper's text, or `memory`, as are the bars of its figure 3, which is
a picture; such a figure is never shown without that word.
Source: MoCo, part 4.1 (figure 3, the table of m), part 3.3 and A.9 (shuffling BN).
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal, get_args

Over = Literal["K", "m", "dictionary", "shuffle-bn"]
OVERS: tuple[str, ...] = get_args(Over)
# In the order of figure 3's legend.
DICTIONARIES = ("end-to-end", "memory-bank", "queue")
PAPER_M_KEYS = 4096
"""K of the paper's sweep of m."""


@dataclass(frozen=True, kw_only=True)
class PaperCell:
    """What the paper reports for one value of one ablation."""

    over: Over
    value: str
    """As --values takes it."""
    dictionary: str | None = None
    """Of K alone, which figure 3 sweeps for each of the three."""
    top1: float | None = None
    """Linear top-1, percent; None: the paper gives no such figure."""
    says: str = ""
    """What the paper says in words, or where its figure stands."""
    mark: Literal["read", "memory"] = "read"

    @property
    def text(self) -> str:
        """As a table shows it."""
        figure = "" if self.top1 is None else f"{self.top1:.1f}"
        memory = "memory" if self.mark == "memory" else ""
        return " ".join(filter(None, (figure, memory, self.says)))


def _figure_3() -> list[PaperCell]:
    sizes = (256, 512, 1024, 4096, 16384, 65536)
    bars = {
        "end-to-end": (54.9, 56.5, 57.3),
        "memory-bank": (50.0, 52.0, 54.1, 56.5, 57.8, 58.0),
        "queue": (54.7, 56.4, 57.5, 59.0, 60.4, 60.6),
    }
    in_text = {("memory-bank", 65536), ("queue", 4096), ("queue", 65536)}
    return [
        PaperCell(
            over="K",
            value=str(num_keys),
            dictionary=dictionary,
            top1=top1,
            mark="read" if (dictionary, num_keys) in in_text else "memory",
        )
        for dictionary in DICTIONARIES
        for num_keys, top1 in zip(sizes, bars[dictionary], strict=False)
    ]


CELLS: tuple[PaperCell, ...] = (
    *_figure_3(),
    PaperCell(over="m", value="0", says="fails: the loss oscillates"),
    PaperCell(over="m", value="0.9", top1=55.2),
    PaperCell(over="m", value="0.99", top1=57.8),
    PaperCell(over="m", value="0.999", top1=59.0),
    PaperCell(over="m", value="0.9999", top1=58.9),
    PaperCell(over="dictionary", value="end-to-end", top1=57.3, says="at K 1,024", mark="memory"),
    PaperCell(over="dictionary", value="memory-bank", top1=58.0, says="at K 65,536"),
    PaperCell(over="dictionary", value="queue", top1=60.6, says="at K 65,536"),
    PaperCell(over="shuffle-bn", value="on", top1=60.6),
    PaperCell(over="shuffle-bn", value="off", says="pretext > 99.9 %, kNN falls"),
)


def paper_cells(over: Over, *, dictionaries: Collection[str]) -> list[PaperCell]:
    """The paper's cells of one ablation, in its order; of K those of the dictionaries that are swept."""
    return [c for c in CELLS if c.over == over and (over != "K" or c.dictionary in dictionaries)]


def paper_cell(over: Over, value: str, *, dictionary: str) -> PaperCell | None:
    """The paper's cell of one value, or None where it has none."""
    found = [c for c in paper_cells(over, dictionaries=(dictionary,)) if c.value == value]
    return found[0] if found else None
