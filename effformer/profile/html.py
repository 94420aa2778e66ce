"""One self-contained page: no scripts, no external files, light and dark."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

from effformer.files import mark

from .parts import PART_LABELS
from .save import COMPARISON, PROFILE
from .tables import amount, size
from .tree import Node, module_tree

if TYPE_CHECKING:
    from .compare import Comparison
    from .crosscheck import Row
    from .result import Profile

__all__ = [
    "comparison_section",
    "gallery",
    "page",
    "profile_section",
    "report_page",
    "table_of",
    "tiles",
]

_STYLE = """
:root { color-scheme: light dark; --ink: #1d2129; --soft: #667080; --line: #e1e4ea;
  --bar: #0072b2; --card: #fff; --page: #f6f7f9; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e8ec; --soft: #9aa3b2; --line: #343a46;
  --bar: #56b4e9; --card: #1c2028; --page: #14171d; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink);
  font: 15px/1.5 system-ui, sans-serif; }
main { max-width: 60rem; margin: 0 auto; padding: 2rem 1.25rem 4rem; }
h1 { font-size: 1.6rem; margin: 0 0 1rem; }
h2 { font-size: 1.25rem; margin: 2.5rem 0 .75rem; }
h3 { font-size: 1rem; margin: 1.5rem 0 .5rem; }
section > h2 { margin-top: 0; }
summary { cursor: pointer; }
details.model { border-top: 1px solid var(--line); padding: .6rem 0; }
details.model > summary { color: var(--soft); }
details.model h2 { display: inline; font-size: 1.1rem; color: var(--ink); margin-right: .5rem; }
section + details.model { margin-top: 2rem; }
p, .soft { color: var(--soft); }
p { margin: .4rem 0; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(9rem, 1fr)); gap: .75rem; }
.tile { background: var(--card); border: 1px solid var(--line); border-radius: .5rem;
  padding: .7rem .9rem; }
.tile b { display: block; font-size: 1.3rem; font-weight: 600; white-space: nowrap; }
.tile span { color: var(--soft); font-size: .85rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: .9rem;
  font-variant-numeric: tabular-nums; }
th { color: var(--soft); font-weight: 500; }
th, td { text-align: right; padding: .28rem .6rem; border-bottom: 1px solid var(--line);
  white-space: nowrap; }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
td.wrap { white-space: normal; }
.bars { display: grid; grid-template-columns: max-content 1fr max-content; gap: .3rem .8rem;
  align-items: center; font-size: .9rem; }
.bars i { display: block; height: .8rem; background: var(--bar); border-radius: .15rem;
  min-width: 1px; }
.bars span { font-variant-numeric: tabular-nums; color: var(--soft); }
.tree { font-size: .9rem; }
.tree details, .tree div { margin-left: 1.1rem; }
.tree > details { margin-left: 0; }
.tree summary, .tree div { padding: .12rem 0; }
.tree em { font-style: normal; color: var(--soft); font-variant-numeric: tabular-nums;
  margin-left: .6rem; }
.plot { background: #fff; border: 1px solid var(--line); border-radius: .5rem; padding: .5rem;
  margin-top: 1rem; }
.plot svg { width: 100%; height: auto; display: block; }
details.more { margin-top: 1rem; }
details.more > summary { color: var(--soft); }
.bad { color: #d55e00; font-weight: 600; }
.grids { display: grid; gap: 1.25rem;
  grid-template-columns: repeat(auto-fill, minmax(13rem, 1fr)); }
.grids figure { margin: 0; } .grids figcaption { font-size: .9rem; margin-top: .4rem; }
.grids figcaption span { color: var(--soft); }
.grids img { width: 100%; display: block; image-rendering: pixelated; border-radius: .35rem; }
code { font-size: .95em; }
"""


def page(title: str, body: str, kind: str) -> str:
    """A complete document around a body; ``kind`` is that of `effformer.files.mark`."""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta name="generator" content="{mark(kind)}">'
        f"<title>{escape(title)}</title>"
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<style>{_STYLE}</style></head>\n<body><main>\n{body}\n</main></body></html>\n"
    )


def report_page(profiles: Sequence[Profile], comparison: Comparison | None = None) -> str:
    """The page of one or several profiles, with their comparison first."""
    shown = [(p.name, p) for p in profiles]
    names = [p.name for p in profiles]
    if comparison is not None:  # a file that is compared has no profile
        names = [row.name for row in comparison.rows]
        shown = [(row.name, row.profile) for row in comparison.rows if row.profile is not None]
    title = "Cost of " + ", ".join(names)
    body = [f"<h1>{escape(title)}</h1>"]
    if comparison is not None:
        body.append(comparison_section(comparison))
    for name, profile in shown:
        section = profile_section(profile)
        if len(profiles) > 1:
            head = f"<summary><h2>{escape(name)}</h2> {amount(profile.total)} MACs</summary>"
            section = f'<details class="model">{head}{section}</details>'
        body.append(section)
    body += [f"<p>Convention: {escape(profile.convention)}.</p>" for _, profile in shown[:1]]
    return page(title, "\n".join(body), PROFILE if comparison is None else COMPARISON)


def profile_section(profile: Profile) -> str:
    """Headline numbers, parts, modules, operators, what was not counted, notes."""
    p = profile
    tree = _tree(module_tree(p.by_module, p.name), p.total, 1, 0)
    ops = [
        (op, str(p.calls.get(op, "")), f"{n:,}", _share(n, p.total)) for op, n in p.by_op.items()
    ]
    missing = table_of(("operator", "calls"), ((op, f"{n:,}") for op, n in p.uncounted.items()))
    pieces = [
        _tiles(p),
        f"<p>One forward on inputs {escape(' '.join(str(shape) for shape in p.inputs))}",
        f"; memory from {escape(p.memory.method)}.</p>" if p.memory is not None else ".</p>",
        f"<h3>By part</h3>{_bars(p)}",
        f'<h3>By module</h3><div class="tree">{tree}</div>',
        f"<h3>By operator</h3>{table_of(('operator', 'calls', 'MACs', 'share'), ops)}",
        f"<h3>Not counted</h3>{missing}" if p.uncounted else "",
        _elementwise(p),
        f"<h3>Other counters</h3>{_cross_check(p.cross_check)}" if p.cross_check else "",
        *(f"<p>Note: {escape(note)}</p>" for note in p.notes),
    ]
    return f"<section>{''.join(pieces)}</section>"


def comparison_section(comparison: Comparison, title: str = "Side by side") -> str:
    """The table of all models and, where latency was measured, the Pareto plot."""
    pieces = [f"<section><h2>{escape(title)}</h2>", table_of(*comparison.table())]
    if comparison.how:
        pieces.append(f"<p>{escape(comparison.how)}</p>")
        pieces.append(f'<div class="plot">{comparison.pareto(y=comparison.against()).svg()}</div>')
    return "\n".join(pieces) + "</section>"


def _tiles(p: Profile) -> str:
    shown = [(amount(p.total), "MACs")]
    if p.executed is not None and p.executed != p.total:
        shown.append((amount(p.executed), f"MACs executed ({_share(p.executed, p.total)})"))
    shown += [(amount(p.flops), "FLOPs = 2 x MACs"), (amount(p.params), "parameters")]
    if p.memory is not None:
        shown.append((size(p.memory.peak), "peak activations"))
        if p.memory.saved is not None:
            shown.append((size(p.memory.saved), "saved for backward"))
    return tiles(shown)


def tiles(shown: Iterable[tuple[str, str]]) -> str:
    """Headline numbers, each with what it is."""
    inside = (f'<div class="tile"><b>{a}</b><span>{escape(b)}</span></div>' for a, b in shown)
    return f'<div class="tiles">{"".join(inside)}</div>'


def gallery(pictures: Iterable[tuple[Path, str, str]]) -> str:
    """Small PNG pictures side by side, inside the page: file, title, note."""
    figures = []
    for file, title, note in pictures:
        data = base64.b64encode(file.read_bytes()).decode()
        figures.append(
            f'<figure><img alt="{escape(title)}" src="data:image/png;base64,{data}">'
            f"<figcaption>{escape(title)}<br><span>{escape(note)}</span></figcaption></figure>"
        )
    return f'<div class="grids">{"".join(figures)}</div>'


def table_of(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Cells in rows; a wide table scrolls."""
    head = "".join(f"<th>{escape(cell)}</th>" for cell in header)
    body = "".join("<tr>" + "".join(f"<td>{escape(c)}</td>" for c in row) + "</tr>" for row in rows)
    return f'<div class="scroll"><table><tr>{head}</tr>{body}</table></div>'


def _elementwise(p: Profile) -> str:
    head = f"Elementwise work: {amount(sum(p.elements.values()))} elements, 0 MACs by convention"
    if not p.uncounted:
        head = "Every operator has a formula or is elementwise. " + head
    rows = ((op, f"{n:,}") for op, n in p.elements.items())
    inside = table_of(("operator", "elements"), rows)
    return f'<details class="more"><summary>{head}</summary>{inside}</details>'


def _share(n: int, total: int) -> str:
    return f"{n / total:.1%}" if total else "-"


def _bars(profile: Profile) -> str:
    most = max([1, *profile.by_part.values()])
    rows = (
        f'<div>{escape(PART_LABELS[part])}</div><i style="width:{100 * max(n, 0) / most:.2f}%"></i>'
        f"<span>{amount(n)} &middot; {_share(n, profile.total)}</span>"
        for part, n in profile.by_part.items()
    )
    return f'<div class="bars">{"".join(rows)}</div>'


def _tree(node: Node, total: int, times: int, level: int) -> str:
    each = f" ({node.count} x {amount(node.each)})" if node.count > 1 else ""
    count = node.macs * times
    line = f"{escape(node.label)}{each}<em>{amount(count)} &middot; {_share(count, total)}</em>"
    if not node.children:
        return f"<div>{line}</div>"
    inside = "".join(_tree(child, total, times * node.count, level + 1) for child in node.children)
    return f"<details{' open' if level < 1 else ''}><summary>{line}</summary>{inside}</details>"


def _cross_check(rows: Sequence[Row]) -> str:
    def line(text: str, number: str, style: str = "wrap") -> str:
        return f'<tr><td class="{style}">{escape(text)}</td><td>{number}</td></tr>'

    lines: list[str] = []
    for row in rows:
        if row.total is None:
            lines.append(line(f"{row.counter} failed: {row.error}", "-"))
            continue
        lines.append(line(row.counter, f"<b>{row.total:,}</b>"))
        lines.append(line("difference to ours", f"{row.difference:+,}"))
        lines += [line(e.reason, f"{e.macs:+,}", "wrap soft") for e in row.explanations]
        style = "wrap bad" if row.unexplained else "wrap soft"
        lines.append(line("unexplained", f"{row.unexplained:+,}", style))
    head = "<tr><th>counter</th><th>MACs</th></tr>"
    return f'<div class="scroll"><table>{head}{"".join(lines)}</table></div>'
