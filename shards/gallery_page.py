"""The HTML of a page of thumbnails: one file, no request to anywhere, every name escaped."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from linerate.shards.html_page import THEME, escaped, head


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One sample on the page; all texts as they came."""

    key: str
    class_name: str
    facts: str
    more: str
    """Its id and its properties, shown when pointed at."""
    image: str
    """base64 of a JPEG."""
    trouble: str | None
    """Why there is no image."""
    note: str = ""
    """A line of its own under the others."""


@dataclass(frozen=True, kw_only=True)
class RejectGroup:
    """What was left out for one reason; all texts as they came."""

    reason: str
    count: int
    shown: Sequence[Cell]
    """Those of the examples that can be drawn."""
    listed: Sequence[str]
    """The others."""


_STYLE = """
body { margin: 0; background: var(--ground); color: var(--ink); font: 14px/1.45 system-ui, sans-serif }
header { position: sticky; top: 0; z-index: 1; background: var(--ground); padding: 14px 24px 10px;
  border-bottom: 1px solid var(--line) }
h1 { font-size: 19px; margin: 0 }
header p { margin: 2px 0 10px; color: var(--faint) }
.tools { display: flex; gap: 10px; align-items: center }
input { flex: 0 1 380px; font: inherit; padding: 6px 10px; color: inherit; background: var(--card);
  border: 1px solid var(--line); border-radius: 7px }
button { white-space: nowrap; font: inherit; padding: 6px 12px; color: inherit; cursor: pointer;
  background: var(--card); border: 1px solid var(--line); border-radius: 7px }
output { color: var(--faint) }
nav { display: flex; flex-wrap: wrap; gap: 6px; padding: 14px 24px 0 }
nav a { color: inherit; text-decoration: none; background: var(--card); border: 1px solid var(--line);
  border-radius: 12px; padding: 1px 10px; max-width: 260px; overflow: hidden; text-overflow: ellipsis;
  white-space: nowrap }
nav a:hover { border-color: var(--accent) }
small, .facts { color: var(--faint); font-size: 12px }
section { padding: 6px 24px 10px; scroll-margin-top: 120px }
h2 { font-size: 16px; margin: 14px 0 8px; overflow-wrap: anywhere }
.grid { display: grid; grid-template-columns: repeat(auto-fill, minmax(164px, 1fr)); gap: 12px }
figure { margin: 0; background: var(--card); border: 1px solid var(--line); border-radius: 9px;
  overflow: hidden; content-visibility: auto; contain-intrinsic-size: 164px 220px }
.image { height: 164px; display: grid; place-items: center; background: var(--line) }
.image img { display: block; max-width: 100%; max-height: 164px }
.broken { background: var(--bad); padding: 8px; text-align: center; overflow-wrap: anywhere }
figcaption { padding: 6px 9px 8px }
figcaption div { overflow: hidden; text-overflow: ellipsis; white-space: nowrap }
.key { direction: rtl; text-align: left }
details { background: var(--card); border: 1px solid var(--line); border-radius: 9px; padding: 8px 12px;
  margin-bottom: 8px }
details .grid { margin: 8px 0 4px }
summary { cursor: pointer; overflow-wrap: anywhere }
ul { margin: 6px 0 2px; padding-left: 20px; overflow-wrap: anywhere }
[hidden] { display: none !important }
"""
_SCRIPT = """
const box = document.querySelector("input"), said = document.querySelector("output");
const sections = [...document.querySelectorAll("section")];
function search() {
  const words = box.value.toLowerCase().split(/\\s+/).filter(Boolean);
  let found = 0;
  for (const section of sections) {
    let here = 0;
    for (const item of section.querySelectorAll("[data-text]")) {
      const fits = words.every(word => item.dataset.text.includes(word));
      item.hidden = !fits;
      here += fits;
    }
    section.hidden = !here;
    found += here;
  }
  for (const link of document.querySelectorAll("nav a"))
    link.hidden = document.querySelector(link.getAttribute("href")).hidden;
  said.textContent = words.length ? found + " found" : "";
}
box.addEventListener("input", search);
document.addEventListener("keydown", event => {
  if (event.key === "/" && event.target !== box) { event.preventDefault(); box.focus(); }
});
document.querySelector("button").addEventListener("click", () => {
  const style = document.documentElement.style;
  const dark = style.colorScheme ? style.colorScheme === "dark"
    : matchMedia("(prefers-color-scheme: dark)").matches;
  style.colorScheme = dark ? "light" : "dark";
});
search();
"""


def opening(*, title: str, facts: str, groups: Sequence[tuple[str, int]], num_rejected: int) -> str:
    """Everything above the first section. groups: (name, samples)."""
    places = [(f"g{number}", name, count) for number, (name, count) in enumerate(groups)]
    if num_rejected:
        places.append(("rejected", "rejected", num_rejected))
    links = "\n".join(
        f'<a href="#{place}" title="{escaped(name)}">{escaped(name)} <small>{count:,}</small></a>'
        for place, name, count in places
    )
    return f"""{head(title=title, style=THEME + _STYLE, script=_SCRIPT)}<header>
<h1>{escaped(title)}</h1>
<p>{escaped(facts)}</p>
<div class="tools"><input type="search" placeholder="search names, classes, properties" aria-label="search">
<button type="button">dark / light</button><output></output></div>
</header>
<nav>
{links}
</nav>
"""


def section(number: int, name: str, count: int, cells: Sequence[Cell]) -> str:
    """A group: its name, how many samples it holds, and some of them."""
    shown = f"{len(cells):,} of {count:,}" if len(cells) < count else f"{count:,}"
    figures = "\n".join(map(_figure, cells))
    return f"""<section id="g{number}">
<h2>{escaped(name)} <small>{shown}</small></h2>
<div class="grid">
{figures}
</div>
</section>
"""


def rejects_section(groups: Sequence[RejectGroup], *, note: str = "") -> str:
    """What was left out, by reason. note: why nothing could be drawn."""
    if not groups:
        return ""
    blocks = "\n".join(map(_reject_block, groups))
    total = sum(group.count for group in groups)
    told = f'<p class="facts">{escaped(note)}</p>\n' if note else ""
    return f"""<section id="rejected">
<h2>rejected <small>{total:,}</small></h2>
{told}{blocks}
</section>
"""


def _reject_block(group: RejectGroup) -> str:
    lines = [
        f'<li data-text="{escaped(f"{group.reason} {text}".lower())}">{escaped(text)}</li>'
        for text in group.listed
    ]
    if more := group.count - len(group.shown) - len(group.listed):
        lines.append(f"<li>and {more:,} more</li>")
    figures = "\n".join(_figure(cell, group.reason) for cell in group.shown)
    return (
        f"<details open><summary>{escaped(group.reason)} <small>{group.count:,}</small></summary>"
        + (f'\n<div class="grid">\n{figures}\n</div>' if figures else "")
        + ("<ul>\n" + "\n".join(lines) + "</ul>" if lines else "")
        + "</details>"
    )


def closing() -> str:
    return f"<script>{_SCRIPT}</script>\n</body>\n</html>\n"


def _figure(cell: Cell, group: str = "") -> str:
    text = " ".join((cell.key, cell.class_name, cell.more, cell.note, cell.trouble or "", group)).lower()
    name = escaped(cell.key)
    told = (cell.class_name, cell.facts, cell.note, cell.more)
    hover = "\n".join(filter(None, (name, *map(escaped, told))))
    note = f'<div class="facts">{escaped(cell.note)}</div>' if cell.note else ""
    image = (
        f'<div class="image broken">does not decode<br>{escaped(cell.trouble)}</div>'
        if cell.trouble is not None
        else f'<div class="image"><img alt="" loading="lazy" src="data:image/jpeg;base64,{cell.image}"></div>'
    )
    return (
        f'<figure data-text="{escaped(text)}" title="{hover}">{image}<figcaption>'
        f'<div class="key"><bdi>{name}</bdi></div><div class="facts">{escaped(cell.facts)}</div>'
        f"{note}</figcaption></figure>"
    )
