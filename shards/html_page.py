"""The shell of a page in one file: no request to anywhere, light and dark, every text escaped."""

from __future__ import annotations

import base64
import hashlib
import html
from pathlib import Path

from linerate.shards.terminal import visible

# The colours that our pages share.
THEME = """
:root { color-scheme: light dark;
  --ground: light-dark(#fbfbfa, #16181b); --card: light-dark(#ffffff, #202327);
  --ink: light-dark(#1d2126, #e7e9ec); --faint: light-dark(#68707a, #98a1ab);
  --line: light-dark(#dcdfe3, #343a41); --accent: light-dark(#1f6feb, #6ea8fe);
  --bad: light-dark(#f6dcdc, #4a2528) }
* { box-sizing: border-box }
"""


def escaped(text: str) -> str:
    """A name as HTML text or attribute value; characters that cannot be seen are spelled out."""
    return html.escape(visible(text), quote=True)


def head(*, title: str, style: str, script: str = "") -> str:
    """Everything up to <body>. script: the only one that the page may run; the caller puts it in.

    A name that came through unescaped could load and run nothing: the page's own script is known by its hash.
    """
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    scripts = f"'sha256-{digest}'" if script else "'none'"
    policy = (
        "default-src 'none'; img-src data:; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'; "
        f"script-src {scripts}"
    )
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="referrer" content="no-referrer">
<title>{escaped(title)}</title>
<style>{style}</style>
</head>
<body>
"""


def write_whole(path: Path, page: str) -> None:
    """Write a page; an interrupted write leaves what was there before."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(page, encoding="utf-8")
    temporary.replace(path)
