"""One self-contained page: no scripts, no external files, light and dark."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

from effformer.files import mark
from effformer.notebook import DARK, LIGHT, RULES, branch, html_table

from .parts import PART_LABELS
from .save import COMPARISON, PROFILE
from .tables import amount, size
from .tree import Node, module_tree

if TYPE_CHECKING:
    from .breakdown import Breakdown
    from .compare import Comparison
    from .crosscheck import Row
    from .result import Profile

__all__ = [
    "breakdown_section",
    "comparison_section",
    "gallery",
    "page",
    "profile_section",
    "report_page",
    "tiles",
]

_STYLE = f""":root {{ color-scheme: light dark; {LIGHT} }}
@media (prefers-color-scheme: dark) {{ :root {{ {DARK} }} }}
body {{ margin: 0; background: var(--page); color: var(--ink);
  font: 15px/1.5 system-ui, sans-serif; }}
main {{ max-width: 60rem; margin: 0 auto; padding: 2rem 1.25rem 4rem; }}
{RULES}"""


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
    missing = html_table(("operator", "calls"), ((op, f"{n:,}") for op, n in p.uncounted.items()))
    pieces = [
        _tiles(p),
        f"<p>One forward on inputs {escape(' '.join(str(shape) for shape in p.inputs))}",
        f"; memory from {escape(p.memory.method)}.</p>" if p.memory is not None else ".</p>",
        f"<h3>By part</h3>{_bars(p)}",
        f'<h3>By module</h3><div class="tree">{tree}</div>',
        f"<h3>By operator</h3>{html_table(('operator', 'calls', 'MACs', 'share'), ops)}",
        f"<h3>Not counted</h3>{missing}" if p.uncounted else "",
        _elementwise(p),
        f"<h3>Other counters</h3>{_cross_check(p.cross_check)}" if p.cross_check else "",
        *(f"<p>Note: {escape(note)}</p>" for note in p.notes),
    ]
    return f"<section>{''.join(pieces)}</section>"


def comparison_section(comparison: Comparison, title: str = "Side by side") -> str:
    """The table of all models and, where latency was measured, the Pareto plot."""
    pieces = [f"<section><h2>{escape(title)}</h2>", html_table(*comparison.table())]
    if comparison.how:
        pieces.append(f"<p>{escape(comparison.how)}</p>")
        pieces.append(f'<div class="plot">{comparison.pareto(y=comparison.against()).svg()}</div>')
    return "\n".join(pieces) + "</section>"


def breakdown_section(found: Breakdown, title: str = "Module by module") -> str:
    """Models side by side as one tree that opens and closes."""
    inside: dict[str, list[str]] = {}
    for path in found.boxes:
        if path:
            inside.setdefault(path.rpartition(".")[0], []).append(path)

    def row(path: str, level: int) -> str:
        kinds = dict.fromkeys(box.kind for box in found.boxes[path] if box is not None)
        line = _box(path.rpartition(".")[2] or "model", " → ".join(kinds), found.cells(path))
        below = "".join(row(child, level + 1) for child in inside.get(path, []))
        return branch(line, below, opened=level < 2)

    head = _box(" → ".join(found.names), "", {column: column for column in found.cells("")})
    said = f"<p>{escape(found.how)}</p>" if found.how else ""
    tree = f'<div class="tree"><div class="head">{head}</div>{row("", 0)}</div>'
    return f"<section><h2>{escape(title)}</h2>{tree}{said}</section>"


def _box(name: str, kind: str, cells: Mapping[str, str]) -> str:
    numbers = "".join(
        f'<span title="{escape(column)}">{escape(words)}</span>' for column, words in cells.items()
    )
    return f'<span class="box"><b>{escape(name)} <i>{escape(kind)}</i></b>{numbers}</span>'


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


def _elementwise(p: Profile) -> str:
    head = f"Elementwise work: {amount(sum(p.elements.values()))} elements, 0 MACs by convention"
    if not p.uncounted:
        head = "Every operator has a formula or is elementwise. " + head
    rows = ((op, f"{n:,}") for op, n in p.elements.items())
    inside = html_table(("operator", "elements"), rows)
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
    inside = "".join(_tree(child, total, times * node.count, level + 1) for child in node.children)
    return branch(line, inside, opened=level < 1)


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
