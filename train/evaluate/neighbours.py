"""Images beside their nearest ones in feature space, as a page: people look rather than read.

Legend: Q queries, N samples, D dimensions, k neighbours.
"""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.nn.functional import normalize

from linerate.pipeline.evaluation_views import decode_rgb
from linerate.pipeline.reader import ShardReader
from linerate.shards.catalog import Catalog
from linerate.shards.errors import UserError
from linerate.shards.html_page import escaped
from linerate.shards.terminal import make_parent
from linerate.train.evaluate.knn import nearest_rows

SIDE_PX = 132
_STYLE = """
:root { color-scheme: light dark; --ink: light-dark(#1b1f24, #e6e9ee); --faint: light-dark(#667, #9aa3b0);
  --paper: light-dark(#fff, #14171b); --card: light-dark(#f4f5f6, #1e2227);
  --same: light-dark(#1a7f37, #4cc26a); --other: light-dark(#c04a1a, #f0884a) }
body { font: 14px/1.4 system-ui, sans-serif; color: var(--ink); background: var(--paper); margin: 2rem }
h1 { font-size: 1.3rem; margin: 0 } p { color: var(--faint); margin: .3rem 0 1.4rem; max-width: 60rem }
.scroll { overflow-x: auto; padding: 3px }
.row { display: flex; gap: 10px; margin-bottom: 14px; width: max-content }
figure { margin: 0; width: 140px; background: var(--card); border-radius: 8px; overflow: hidden;
  border-bottom: 4px solid transparent }
figure div { height: 140px; display: grid; place-items: center }
img { width: 132px; height: 132px; object-fit: contain }
figcaption { padding: 4px 8px 6px; font-size: 12px; overflow: hidden; text-overflow: ellipsis;
  white-space: nowrap } figcaption span { color: var(--faint) }
.query { margin-right: 18px; outline: 2px solid var(--ink) }
.same { border-bottom-color: var(--same) } .other { border-bottom-color: var(--other) }
"""


@dataclass(frozen=True, kw_only=True)
class Neighbours:
    """Q queries and the k nearest other samples of each."""

    query: NDArray[np.int64]
    """(Q,) positions."""
    neighbour: NDArray[np.int64]
    """(Q, k) positions, nearest first."""
    cosine: NDArray[np.float32]
    """(Q, k)."""


def find_neighbours(
    features: Tensor, positions: NDArray[np.int64], queries: NDArray[np.int64], *, k: int
) -> Neighbours:
    """The nearest rows of each query row, itself left out.

    features: (N, D) of any scale, row i is the sample at positions[i]. queries: (Q,) rows of features.
    Raises UserError where there are not k others.
    """
    if not 1 <= k < len(features):
        raise UserError(
            f"--k {k} neighbours of {len(features)} images; give --k between 1 and {len(features) - 1}"
        )
    rows = torch.from_numpy(queries).to(features.device)
    cosine, found = nearest_rows(normalize(features[rows].float(), dim=1), features, k=k + 1)
    # Its own row is nearly always first; an equal image may stand before it.
    own = found == rows[:, None]
    own[:, -1] |= ~own.any(dim=1)
    kept = ~own
    shape = (len(queries), k)
    return Neighbours(
        query=positions[queries],
        neighbour=positions[found[kept].reshape(shape).cpu().numpy()],
        cosine=cosine[kept].reshape(shape).cpu().numpy(),
    )


def same_class_share(found: Neighbours, catalog: Catalog) -> float | None:
    """The share of neighbours of the query's class, over queries that have one; None: none has."""
    label = _labels(catalog)
    query = label[found.query]
    known = query >= 0
    if not known.any():
        return None
    return float((label[found.neighbour[known]] == query[known][:, None]).mean())


def write_page(path: Path, found: Neighbours, catalog: Catalog, *, title: str, facts: str) -> None:
    """An HTML page that needs no other file: a row a query, its neighbours from left to right."""
    make_parent(path)
    label = _labels(catalog)
    shown = np.unique(np.concatenate([found.query, found.neighbour.ravel()]))
    pictures = _pictures(catalog, shown)
    rows = []
    for query, neighbours, cosines in zip(found.query, found.neighbour, found.cosine, strict=True):
        cells = [_figure(pictures[query], _name(catalog, label[query]), "query", f"{query}")]
        for position, cosine in zip(neighbours, cosines, strict=True):
            mark = "" if label[query] < 0 else "same" if label[position] == label[query] else "other"
            cells.append(_figure(pictures[position], _name(catalog, label[position]), mark, f"{cosine:.3f}"))
        rows.append(f"<div class=row>{''.join(cells)}</div>")
    page = (
        f"<!doctype html>\n<html lang=en><meta charset=utf-8><title>{html.escape(title)}</title>"
        f"<meta name=viewport content='width=device-width'><style>{_STYLE}</style>\n"
        f"<h1>{html.escape(title)}</h1><p>{html.escape(facts)}</p>\n<div class=scroll>\n"
    )
    path.write_text(page + "\n".join(rows) + "\n</div>\n</html>\n", encoding="utf-8")


def _labels(catalog: Catalog) -> NDArray[np.int32]:
    return np.concatenate([catalog.shard_index(shard).label for shard in range(catalog.num_shards)])


def _name(catalog: Catalog, label: int) -> str:
    return catalog.class_names[label] if label >= 0 else ""


def _figure(picture: str, name: str, mark: str, number: str) -> str:
    return (
        f"<figure class='{mark}'><div>{picture}</div>"
        f"<figcaption title='{escaped(name)}'><span>{number}</span> {escaped(name)}</figcaption></figure>"
    )


def _pictures(catalog: Catalog, positions: NDArray[np.int64]) -> dict[int, str]:
    """position -> an <img> of its thumbnail, or why there is none."""
    reader = ShardReader(catalog)
    pictures = {}
    try:
        for chunk in np.array_split(positions, range(256, len(positions), 256)):
            for position, jpeg in zip(chunk.tolist(), reader.read(chunk).jpegs, strict=True):
                pictures[position] = _picture(jpeg)
    finally:
        reader.close()
    return pictures


def _picture(jpeg: NDArray[np.uint8]) -> str:
    try:
        image = Image.fromarray(decode_rgb(jpeg))
    except ValueError as error:
        return escaped(f"does not decode ({error})")
    image.thumbnail((SIDE_PX, SIDE_PX))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=85)
    return f"<img alt='' src='data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}'>"


def pick_queries(label: Sequence[int] | NDArray[np.int32], num: int, *, seed: int) -> NDArray[np.int64]:
    """(num,) rows: one of every class in turn, so that small classes are seen too; without classes, any."""
    generator = np.random.default_rng(seed)
    order = generator.permutation(len(label))
    classes = np.asarray(label)[order]
    turn = np.zeros(len(order), dtype=np.int64)
    for value in np.unique(classes):
        of_class = np.flatnonzero(classes == value)
        turn[of_class] = np.arange(len(of_class))
    return np.sort(order[np.argsort(turn, kind="stable")[:num]])
