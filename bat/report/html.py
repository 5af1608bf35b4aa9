"""Builds HTML elements that escape the text they are given, and one style sheet.

Text comes from users' files, tables and paths, so only the result of ``tag`` is treated as markup.
The page has no scripts, and its content security policy forbids loading external resources.
"""

from __future__ import annotations

import base64
from collections.abc import Collection, Iterable, Mapping, Sequence
from html import escape
from pathlib import Path

STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --soft: #57606a; --paper: #fff; --line: #d8dee4;
  --band: #f6f8fa; --tint: #0072b2; --share: 38%; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6edf3; --soft: #9da7b1; --paper: #0d1117;
  --line: #30363d; --band: #161b22; --tint: #56b4e9; --share: 34%; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.2rem clamp(.8rem, 4vw, 2rem) 3rem; max-width: 72rem;
  font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper);
  overflow-wrap: anywhere; }
h1 { font-size: 1.6rem; line-height: 1.2; margin: .4rem 0; }
h2 { font-size: 1.3rem; margin: 2.2rem 0 .4rem; padding-top: .8rem;
  border-top: 2px solid var(--line); }
h3 { font-size: 1.05rem; margin: 1.6rem 0 .3rem; }
p, li { max-width: 46rem; } p { margin: .4rem 0; }
.lead { font-size: 1.08rem; } .soft, figcaption, caption { color: var(--soft); }
.warn { border-left: 4px solid #d55e00; padding-left: .7rem; }
.scroll { overflow-x: auto; margin: .5rem 0; }
table { border-collapse: collapse; font-size: .92rem; font-variant-numeric: tabular-nums; }
caption { text-align: left; padding: .2rem 0; caption-side: bottom; font-size: .85rem; }
th, td { padding: .28rem .6rem; border-bottom: 1px solid var(--line); text-align: right;
  white-space: nowrap; }
thead th { border-bottom: 2px solid var(--line); background: var(--band); white-space: normal;
  min-width: 4.2rem; vertical-align: bottom; }
thead th:first-child { min-width: 0; }
thead th:first-child, tbody th { position: sticky; left: 0; }
tbody th { background: var(--paper); }
th.word, td.word { text-align: left; font-weight: normal; } tbody th.word { font-weight: 600; }
td.long { white-space: normal; min-width: 14rem; }
td.best { font-weight: 700; }
td.tint { background: color-mix(in srgb, var(--tint) calc(var(--v) * var(--share)), transparent); }
details { margin: .5rem 0; border: 1px solid var(--line); border-radius: 6px;
  padding: .1rem .8rem; }
summary { cursor: pointer; padding: .35rem 0; font-weight: 600; }
.figures { display: grid; gap: 1rem;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 30rem), 1fr)); }
figure { margin: .4rem 0; break-inside: avoid; }
figure img { max-width: 100%; height: auto; background: #fff; border: 1px solid var(--line);
  border-radius: 6px; display: block; }
figcaption { font-size: .88rem; padding-top: .2rem; }
a { color: var(--tint); }
@media print { :root { color-scheme: light; --ink: #000; --soft: #444; --paper: #fff;
  --band: #f4f4f4; --line: #bbb; --tint: #0072b2; }
  body { max-width: none; padding: 0; font-size: 10pt; }
  .scroll { overflow: visible; } table { font-size: 8pt; } tr { break-inside: avoid; }
  h2, h3 { break-after: avoid; }
  details::details-content { content-visibility: visible; block-size: auto; } }
"""
VOID = frozenset({"meta", "img", "br"})


class Html(str):
    """Markup made in this module; any other text is escaped."""

    __slots__ = ()


def tag(name: str, /, *children: str, **attributes: str | None) -> Html:
    """Returns an element. ``class_`` is ``class``; attributes that are None are omitted."""
    words = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{escape(value)}"'
        for key, value in attributes.items()
        if value is not None
    )
    if name in VOID:
        assert not children
        return Html(f"<{name}{words}>")
    inner = "".join(c if isinstance(c, Html) else escape(c) for c in children)
    return Html(f"<{name}{words}>{inner}</{name}>")


def joined(parts: Iterable[str]) -> Html:
    """Joins elements, one per line."""
    return Html("\n".join(p if isinstance(p, Html) else escape(p) for p in parts))


def table(
    header: Sequence[str],
    cells: Iterable[Sequence[str]],
    *,
    words: int = 1,
    best: Collection[tuple[int, int]] = (),
    tints: Mapping[tuple[int, int], float] | None = None,
    long: Collection[int] = (),
    caption: str = "",
) -> Html:
    """Returns a table that scrolls horizontally on narrow screens.

    The first ``words`` columns are text, the first of them is the row header; cells in ``best``
    (row, column) are bold; ``tints`` in [0, 1] colour a cell; columns in ``long`` may wrap.
    """
    tints = tints or {}

    def cell(i: int, j: int, text: str) -> Html:
        kind = "word" if j < words else ""
        kind += " best" if (i, j) in best else ""
        kind += " tint" if (i, j) in tints else ""
        kind += " long" if j in long else ""
        style = f"--v:{min(1.0, max(0.0, tints[i, j])):.3f}" if (i, j) in tints else None
        if j == 0 and words:
            return tag("th", text, scope="row", class_=kind)
        return tag("td", text, class_=kind.strip() or None, style=style)

    heads = [
        tag("th", name, scope="col", class_="word" if j < words else None)
        for j, name in enumerate(header)
    ]
    body = [
        tag("tr", *(cell(i, j, text) for j, text in enumerate(line)))
        for i, line in enumerate(cells)
    ]
    parts = [tag("caption", caption)] if caption else []
    parts += [tag("thead", tag("tr", *heads)), tag("tbody", joined(body))]
    # a scrollable region must be reachable by keyboard
    return tag("div", tag("table", *parts), class_="scroll", tabindex="0")


def details(summary: str, *children: str) -> Html:
    """Returns a collapsible section."""
    return tag("details", tag("summary", summary), *children)


def picture(path: Path, caption: str) -> Html:
    """Returns a PNG embedded in the page. Raises ``OSError``."""
    data = base64.b64encode(path.read_bytes()).decode("ascii")
    image = tag("img", src=f"data:image/png;base64,{data}", alt=caption)
    return tag("figure", image, tag("figcaption", caption))


def page(title: str, *body: str) -> str:
    """Returns the whole document."""
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", http_equiv="Content-Security-Policy", content=policy),
        tag("title", title),
        tag("style", Html(STYLE)),
    )
    return f'<!DOCTYPE html>\n<html lang="en">\n{head}\n{tag("body", joined(body))}\n</html>\n'
