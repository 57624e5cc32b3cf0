"""Views over the epochs, to look at what the augmentation does: an animation, or a page of its own."""

from __future__ import annotations

import base64
import html
import io
import itertools
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from linerate.pipeline.preview import SeenSample, caption, draw_sheet

FRAME_MS = 800
_STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --faint: #667; --paper: #fff;
  --query: #1f5fbf; --key: #c85a0a }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e9ee; --faint: #9aa3b0; --paper: #14171b;
  --query: #7fb0ff; --key: #f0a060 } }
body { font: 15px/1.45 system-ui, sans-serif; color: var(--ink); background: var(--paper);
  max-width: 72rem; margin: 2rem auto; padding: 0 1rem }
h1 { font-size: 1.4rem } h2 { font-size: 1.1rem; margin-top: 2rem } .faint, figcaption { color: var(--faint) }
figure { margin: 0 } figcaption { font-size: .78rem } img { max-width: 100%; display: block }
.epochs { display: grid; grid-template-columns: repeat(auto-fill, minmax(19rem, 1fr)); gap: 1rem }
.pair { display: grid; grid-template-columns: 1fr 1fr; gap: .4rem }
.pair img { width: 100%; border: 2px solid var(--query); box-sizing: border-box }
.pair figure + figure img { border-color: var(--key) }
.stored img { max-height: 16rem }
"""


def write_animation(
    path: Path, seen: Sequence[SeenSample], *, title: str, class_names: Sequence[str]
) -> None:
    """A GIF whose frames are the epochs, each a contact sheet of all samples. seen: epoch after epoch."""
    frames = [
        draw_sheet(list(group), title=f"{title}, epoch {epoch}", class_names=class_names).quantize(256)
        for epoch, group in itertools.groupby(seen, key=lambda sample: sample.epoch)
    ]
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=FRAME_MS, loop=0)


def write_gallery(path: Path, seen: Sequence[SeenSample], *, title: str, class_names: Sequence[str]) -> None:
    """An HTML page that needs no other file: per sample the stored image, then both views of every epoch."""
    by_sample: dict[int, list[SeenSample]] = {}
    for sample in seen:
        by_sample.setdefault(sample.position, []).append(sample)
    parts = [f"<h1>{html.escape(title)}</h1>"]
    parts += [_section(epochs, class_names) for epochs in by_sample.values()]
    page = (
        f"<!doctype html>\n<html lang=en><meta charset=utf-8><title>{html.escape(title)}</title>"
        f"<meta name=viewport content='width=device-width'><style>{_STYLE}</style>\n"
    )
    path.write_text(page + "\n".join(parts) + "\n</html>\n", encoding="utf-8")


def _section(epochs: Sequence[SeenSample], class_names: Sequence[str]) -> str:
    first = epochs[0]
    class_name = class_names[first.label] if first.label >= 0 else "no label"
    stored = first.image.copy()
    stored.thumbnail((512, 512))
    return (
        f"<h2>{first.sample_id:012d} <span class=faint>{html.escape(class_name)}, "
        f"{first.image.width}x{first.image.height}</span></h2>"
        f"<figure class=stored>{_picture(np.asarray(stored), 'stored image')}</figure>"
        f"<p class=faint>Query view (blue) and key view (orange) of each epoch.</p>"
        f"<div class=epochs>{''.join(map(_pair, epochs))}</div>"
    )


def _pair(sample: SeenSample) -> str:
    figures = [
        f"<figure>{_picture(view, f'{name} view of epoch {sample.epoch}')}"
        f"<figcaption>{_caption(sample, draws)}</figcaption></figure>"
        for name, view, draws in (
            ("query", sample.query, sample.query_draws),
            ("key", sample.key, sample.key_draws),
        )
    ]
    return f"<div><b>epoch {sample.epoch}</b><div class=pair>{''.join(figures)}</div></div>"


def _caption(sample: SeenSample, draws: NDArray[np.float32]) -> str:
    lines = caption(draws, height=sample.image.height, width=sample.image.width)
    # A hyphen that breaks no line: `h-0.08` is one number.
    return "<br>".join(html.escape(line) for line in lines).replace("-", "&#8209;")


def _picture(pixels: NDArray[np.uint8], alt: str) -> str:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=88)
    data = base64.b64encode(buffer.getvalue()).decode()
    return f"<img alt='{html.escape(alt)}' src='data:image/jpeg;base64,{data}'>"
