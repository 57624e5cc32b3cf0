"""The parts of README.md that follow from other files: tables of speed and accuracy, and the tree.

Command: make readme
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

from linerate.bench.fleet import machines_of
from linerate.bench.record import Record, is_noisy, load_jsonl
from linerate.bench.record_table import number
from linerate.train.anchors import ANCHORS
from linerate.train.anchors_cli import shown_status, shown_value

FOLDERS = ("shards", "pipeline", "train", "bench")
# The way of an image: packed, read, seen, compared, learnt from, and all of it together.
HEADLINES = ("pack", "read", "views", "infonce", "step", "train")
HEADER = (
    "| benchmark | against | ours | ratio (95 %) | bar | share of ceiling |",
    "|---|---|---|---|---|---|",
)


def headline_table(results: Path, *, relative_to: Path) -> str:
    """Markdown: the first contest of each part of the way; all others stand further down."""
    rows, shown = [*HEADER], set()
    for record, link in _measured(results, relative_to=relative_to):
        if record.name in HEADLINES and record.name not in shown and record.kind == "time" and record.ratio:
            shown.add(record.name)
            rows.append(_row(record, link))
    return "\n".join(rows)


def results_table(results: Path, *, relative_to: Path) -> str:
    """Markdown: the newest record of every benchmark on every machine, each linked to its line.

    Sweeps judge accuracy, which docs/sweep.md tells with what they were made by.
    """
    measured = _measured(results, relative_to=relative_to)
    return "\n".join([*HEADER, *(_row(record, link) for record, link in measured)])


def _measured(results: Path, *, relative_to: Path) -> Iterator[tuple[Record, str]]:
    """The newest record of each benchmark on each machine, with where its line stands."""
    links, records = {}, []
    for path in sorted(results.glob("*.jsonl")):
        for line, record in enumerate(load_jsonl(path), start=1):
            if record.name != "sweep":
                links[id(record)] = f"{path.relative_to(relative_to).as_posix()}#L{line}"
                records.append(record)
    for machine in machines_of(records):
        yield from ((record, links[id(record)]) for record in machine.newest)


def _row(record: Record, link: str) -> str:
    unmeasured = record.missing or record.refused
    ours = unmeasured or f"{number(record.ours)} {record.unit}"
    ratio = "" if record.ratio is None else f"{'~' if is_noisy(record) else ''}{record.ratio:.2f}"
    if record.ratio_low is not None and record.ratio_high is not None:
        ratio += f" ({record.ratio_low:.2f} to {record.ratio_high:.2f})"
    verdict = {True: "met", False: "not met", None: ""}[record.met]
    bar = f"{record.bar_reads or ''} {verdict}".strip()
    share = "" if record.ceiling_share is None else f"{record.ceiling_share:.0%} of {record.ceiling}"
    cells = (f"[{record.name}]({link}): {record.work}", record.peer or "", ours, ratio, bar, share)
    return f"| {' | '.join(cells)} |"


def accuracy_table() -> str:
    """Markdown: the ledger's published accuracies that a command here is held against, and what was run.

    Only those that were read in their source; `linerate anchors` has all.
    """
    rows = ["| what | metric | published | command | here |", "|---|---|---|---|---|"]
    for anchor in ANCHORS:
        if anchor.mark == "read" and anchor.command is not None:
            cells = (
                anchor.what,
                anchor.metric,
                shown_value(anchor),
                f"`{anchor.command}`",
                shown_status(anchor),
            )
            rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


def tree(root: Path) -> str:
    """One line per module of the package: its path and what its docstring says first."""
    lines = []
    for folder in FOLDERS:
        files = sorted((root / folder).rglob("*.py"))
        names = [path.relative_to(root).as_posix() for path in files]
        width = max(map(len, names))
        lines += [
            f"{name:<{width}}  {_first_words(path)}"
            for name, path in zip(names, files, strict=True)
            if path.stat().st_size
        ]
        lines.append("")
    return "```text\n" + "\n".join(lines).rstrip() + "\n```"


def _first_words(path: Path) -> str:
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    return " ".join(text.partition("\n\n")[0].split())


def filled(readme: str, *, root: Path) -> str:
    """The text of README.md with all parts made anew."""
    for name, body in (
        ("headline", headline_table(root / "bench" / "results", relative_to=root)),
        ("table", results_table(root / "bench" / "results", relative_to=root)),
        ("accuracy", accuracy_table()),
        ("tree", tree(root)),
    ):
        part = re.compile(rf"(<!-- {name}\b[^>]*-->\n).*?(<!-- /{name} -->)", re.DOTALL)
        # Backslashes in the body would be taken for references to groups.
        readme, count = part.subn(r"\1" + body.replace("\\", r"\\") + r"\n\2", readme)
        if count != 1:
            raise ValueError(f"README.md needs one <!-- {name} --> ... <!-- /{name} -->, it has {count}")
    return readme


def main() -> int:
    """Write README.md in the current folder."""
    path = Path("README.md")
    path.write_text(filled(path.read_text(encoding="utf-8"), root=Path.cwd()), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
