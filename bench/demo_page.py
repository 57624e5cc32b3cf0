"""`report.html`: what the demo made, in one file that needs nothing else."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from linerate.bench.demo import throughput_rows
from linerate.pipeline.draws import Draw
from linerate.pipeline.preview import SeenSample
from linerate.shards.html_page import head, write_whole

_STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --faint: #667; --paper: #fff;
  --line: #d8dce2; --mark: #1f5fbf }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e9ee; --faint: #9aa3b0; --paper: #14171b; --line: #333a44; --mark: #7fb0ff } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper);
  max-width: 62rem; margin: 2rem auto; padding: 0 1rem }
h1 { font-size: 1.5rem; margin-bottom: .2rem } h2 { font-size: 1.1rem; margin-top: 2.2rem }
p.lead { font-size: 1.1rem } .faint { color: var(--faint) }
table { border-collapse: collapse } td, th { padding: .25rem .9rem .25rem 0; text-align: left;
  border-bottom: 1px solid var(--line); vertical-align: top }
td.number { text-align: right; font-variant-numeric: tabular-nums }
.sheet { display: grid; grid-template-columns: repeat(auto-fill, minmax(17rem, 1fr)); gap: 1rem }
.sheet figure { margin: 0 } .sheet img { width: 32%; image-rendering: pixelated; vertical-align: top }
figcaption { font-size: .8rem; color: var(--faint) }
.plot { background: #fff; border-radius: 4px; max-width: 100%; height: auto }
.best { font-weight: 600; color: var(--mark) }
code { font-size: .9em }
"""


def write_page(
    path: Path, *, result: Mapping[str, Any], seen: Sequence[SeenSample], log: Sequence[Any]
) -> None:
    """Write the page. result: the demo's JSON object; seen: samples with views; log: the run's events."""
    parts = [
        f"<h1>linerate demo: {html.escape(result['images']['name'])}</h1>",
        f"<p class=lead>{html.escape(headline(result))}</p>",
        _section("kNN against the controls", _knn_table(result)),
        _section(
            "Learning",
            _picture(_curves(log, result)),
            "Loss and pretext top-1 at every logged step; kNN after epochs.",
        ),
        _section(
            "Two views",
            _sheet(seen, result["images"]["class_names"]),
            "Stored image, query view, key view, as training saw them.",
        ),
        _section("Throughput", _rows_table(throughput_rows(result["throughput"]))),
        _section("What ran", _rows_table(_run_rows(result))),
        _section("The machine", _rows_table(_machine_rows(result["machine"]))),
    ]
    page = f"{head(title='linerate demo', style=_STYLE)}{''.join(parts)}\n</body>\n</html>\n"
    write_whole(path, page)


def headline(result: Mapping[str, Any]) -> str:
    """One sentence: the trained encoder beside the better control."""
    knn = result["knn"]
    control = max(("raw_pixels", "untrained"), key=lambda name: knn[name])
    gain = 100 * (knn["trained"] - knn[control])
    return (
        f"kNN top-1 {100 * knn['trained']:.1f} % after {result['train']['step']:,} steps of MoCo, "
        f"{abs(gain):.1f} points {'above' if gain >= 0 else 'below'} the better control "
        f"({control.replace('_', ' ')}, {100 * knn[control]:.1f} %)."
    )


def _section(title: str, body: str, note: str = "") -> str:
    note = f"<p class=faint>{html.escape(note)}</p>" if note else ""
    return f"<h2>{html.escape(title)}</h2>{note}{body}"


def _knn_table(result: Mapping[str, Any]) -> str:
    knn = result["knn"]
    names = {"trained": "trained encoder", "untrained": "untrained encoder", "raw_pixels": "raw pixels"}
    best = max(names, key=lambda name: knn[name])
    rows = "".join(
        f"<tr{' class=best' if name == best else ''}><td>{label}<td class=number>{100 * knn[name]:.1f} %"
        f"<td><svg width=300 height=14><rect width={300 * knn[name]:.0f} height=14 fill=currentColor /></svg>"
        for name, label in names.items()
    )
    chance = f"<tr><td>chance<td class=number>{100 / knn['num_classes']:.1f} %<td>"
    split = (
        f"<p class=faint>k = {knn['k']}, T = {knn['temperature']}; {knn['num_train']:,} images vote, "
        f"{knn['num_test']:,} others are judged, {knn['num_classes']} classes. "
        "All three on the same images, resized and centre-cropped alike.</p>"
    )
    return f"<table><tr><th><th>top-1<th>{rows}{chance}</table>{split}"


def _rows_table(rows: Sequence[tuple[str, str]]) -> str:
    return (
        "<table>"
        + "".join(f"<tr><td>{html.escape(name)}<td>{html.escape(value)}" for name, value in rows)
        + "</table>"
    )


def _run_rows(result: Mapping[str, Any]) -> list[tuple[str, str]]:
    rows = [(f"{name}", f"{seconds:.1f} s") for name, seconds in result["seconds"].items()]
    return [("command", result["command"]), ("recipe", result["recipe"]), *rows]


def _machine_rows(machine: Mapping[str, Any]) -> list[tuple[str, str]]:
    rows = []
    for name, value in machine.items():
        if isinstance(value, Mapping):
            value = ", ".join(f"{k} {v}" for k, v in value.items() if v is not None)
        if value not in (None, "", []):
            rows.append((name.replace("_", " "), str(value)))
    return rows


def _sheet(seen: Sequence[SeenSample], class_names: Sequence[str]) -> str:
    figures = []
    for sample in seen:
        name = class_names[sample.label] if sample.label >= 0 else "no label"
        pictures = (sample.image, Image.fromarray(sample.query), Image.fromarray(sample.key))
        words = ("stored image", "query view", "key view")
        images = " ".join(_picture(p, alt=f"{w} of a {name}") for p, w in zip(pictures, words, strict=True))
        crops = ", ".join(_share(d, sample.image) for d in (sample.query_draws, sample.key_draws))
        figures.append(
            f"<figure>{images}<figcaption>{html.escape(name)}; crops {crops}</figcaption></figure>"
        )
    return f'<div class="sheet">{"".join(figures)}</div>'


def _share(draws: Any, image: Image.Image) -> str:
    area = (draws[Draw.BOTTOM] - draws[Draw.TOP]) * (draws[Draw.RIGHT] - draws[Draw.LEFT])
    return f"{area / (image.width * image.height):.0%}"


def _picture(image: Image.Image | bytes, *, alt: str = "curves of loss, pretext accuracy and kNN") -> str:
    if isinstance(image, bytes):
        data = base64.b64encode(image).decode()
        return f'<img class="plot" alt="{alt}" src="data:image/svg+xml;base64,{data}">'
    image = image.copy()
    image.thumbnail((192, 192))
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    data = base64.b64encode(buffer.getvalue()).decode()
    return f'<img alt="{html.escape(alt)}" src="data:image/png;base64,{data}">'


def _curves(log: Sequence[Mapping[str, Any]], result: Mapping[str, Any]) -> bytes:
    """SVG: loss with its chance level; pretext top-1; kNN with the two controls."""
    from matplotlib.figure import Figure

    steps = [event for event in log if event["event"] == "step"]
    judged = [event for event in log if event["event"] == "knn"]
    figure = Figure(figsize=(10.5, 3.2), layout="constrained")
    loss, pretext, knn = figure.subplots(1, 3)
    loss.plot([e["step"] for e in steps], [e["loss"] for e in steps])
    loss.axhline(result["chance_loss"], ls=":", color="gray")
    loss.annotate("chance ln(K+1)", (0, result["chance_loss"]), va="bottom", color="gray", fontsize=8)
    loss.set_title("InfoNCE loss")
    pretext.plot([e["step"] for e in steps], [100 * e["pretext_top1"] for e in steps])
    pretext.set_title("pretext top-1, %")
    knn.plot([e["step"] for e in judged], [100 * e["knn_top1"] for e in judged], marker="o", ms=3)
    for name, colour in (("raw_pixels", "tab:orange"), ("untrained", "tab:green")):
        knn.axhline(100 * result["knn"][name], ls="--", color=colour, label=name.replace("_", " "))
    knn.legend(fontsize=8)
    knn.set_title("kNN top-1, %")
    for axis in (loss, pretext, knn):
        axis.set_xlabel("step")
        axis.spines[["top", "right"]].set_visible(False)
    knn.set_ylim(bottom=0)
    pretext.set_ylim(bottom=0)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()
