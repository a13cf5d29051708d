"""A self-contained HTML page of pictures, each with a table of its numbers; for light and dark screens, and paper."""

from collections.abc import Sequence
from dataclasses import dataclass

from moempi.observe.svg import text_of

STYLE = """
:root { color-scheme: light dark; --back: #ffffff; --text: #1a1a1a; --grid: #d9d9d9;
  --c0: #0b61a4; --c1: #d1600a; --c2: #b8bcc2; --c3: #2d7d46; }
@media (prefers-color-scheme: dark) { :root { --back: #16181c; --text: #e6e6e6; --grid: #3a3f47;
  --c0: #5aa9e6; --c1: #f2994a; --c2: #5b626c; --c3: #6fcf97; } }
@media print { :root { --back: #ffffff; --text: #000000; --grid: #cccccc;
  --c0: #0b61a4; --c1: #d1600a; --c2: #b8bcc2; --c3: #2d7d46; } section { break-inside: avoid; } }
* { print-color-adjust: exact; -webkit-print-color-adjust: exact; }
body { background: var(--back); color: var(--text); font: 15px/1.45 system-ui, sans-serif; margin: 2em auto;
  max-width: 1240px; padding: 0 1em; }
h1 { font-size: 1.5em; } h2 { font-size: 1.15em; margin: 2em 0 .3em; }
.note { border-left: 4px solid var(--c1); padding: .4em .8em; overflow-wrap: anywhere; }
.pair { display: flex; flex-wrap: wrap; gap: 1em 2em; align-items: flex-start; }
.pair svg { flex: 1 1 560px; max-width: 760px; width: 100%; height: auto; }
.table { flex: 1 1 320px; overflow-x: auto; }
svg text { fill: var(--text); font: 13px system-ui, sans-serif; }
svg .grid { stroke: var(--grid); stroke-width: 1; fill: none; }
svg .line { fill: none; stroke-width: 2; }
.s0 { stroke: var(--c0); } .s1 { stroke: var(--c1); } .s2 { stroke: var(--c2); } .s3 { stroke: var(--c3); }
.f0 { fill: var(--c0); } .f1 { fill: var(--c1); } .f2 { fill: var(--c2); } .f3 { fill: var(--c3); }
table { border-collapse: collapse; font-size: .88em; font-variant-numeric: tabular-nums; }
th, td { padding: .15em .7em .15em 0; text-align: left; border-bottom: 1px solid var(--grid); vertical-align: top; }
"""

NOTHING_LOADED = "<meta http-equiv='Content-Security-Policy' content=\"default-src 'none'; style-src 'unsafe-inline'\">"
"""A browser runs no script of the page and loads nothing."""


@dataclass(frozen=True, slots=True)
class Picture:
    """A chart (SVG), the heads and rows of its numbers, and a sentence about it."""

    title: str
    svg: str
    heads: Sequence[str]
    rows: Sequence[Sequence[str]]
    caption: str


def html_page(title: str, notes: Sequence[str], pictures: Sequence[Picture]) -> str:
    """The page; all texts are escaped, and nothing is loaded from elsewhere."""
    head = f"<meta charset='utf-8'>{NOTHING_LOADED}<meta name='viewport' content='width=device-width'>"
    head += f"<title>{text_of(title)}</title>"
    body = [f"<h1>{text_of(title)}</h1>", *(f"<p class='note'>{text_of(note)}</p>" for note in notes)]
    body += [_section(picture) for picture in pictures]
    head += f"<style>{STYLE}</style>"
    return f"<!doctype html>\n<html lang='en'><head>{head}</head>\n<body>{''.join(body)}</body></html>\n"


def _section(picture: Picture) -> str:
    rows = "".join(f"<tr>{_cells('td', row)}</tr>" for row in picture.rows)
    table = f"<table><thead><tr>{_cells('th', picture.heads)}</tr></thead><tbody>{rows}</tbody></table>"
    return (
        f"\n<section><h2>{text_of(picture.title)}</h2><p>{text_of(picture.caption)}</p>"
        f"<div class='pair'>{picture.svg}<div class='table'>{table}</div></div></section>"
    )


def _cells(kind: str, cells: Sequence[str]) -> str:
    return "".join(f"<{kind}>{text_of(cell)}</{kind}>" for cell in cells)
