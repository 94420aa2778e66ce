"""What a notebook shows of results, data and models, and how they become tables."""

from __future__ import annotations

import base64
import dataclasses
import struct
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING, Any

from .checks import need

if TYPE_CHECKING:
    from torch import Tensor, nn

__all__ = [
    "RULES", "Shown", "branch", "fragment", "html_table", "model_tree", "picture_grid", "tables",
]  # fmt: skip

LIGHT = """--ink: #1d2129; --soft: #667080; --line: #e1e4ea; --bar: #0072b2; --card: #fff; --page: #f6f7f9;"""
DARK = """--ink: #e6e8ec; --soft: #9aa3b2; --line: #343a46; --bar: #56b4e9; --card: #1c2028; --page: #14171d;"""
RULES = """
* { box-sizing: border-box; }
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
.box { display: inline-grid; width: calc(100% - 1.2em); gap: 0 .6rem; vertical-align: top;
  grid-template-columns: minmax(8rem, 1fr) repeat(4, 9.5rem); }
.box b { font-weight: 400; overflow-wrap: anywhere; } .box b i { color: var(--soft); font-style: normal; }
.box span { text-align: right; font-variant-numeric: tabular-nums; }
.tree div > .box { margin-left: 1.2em; }
.tree summary:has(> .box), .tree div:has(> .box) { border-bottom: 1px solid var(--line); }
.head .box span, .box span::before { color: var(--soft); }
@media (max-width: 48rem) {
  .box { display: inline-flex; flex-wrap: wrap; gap: 0 .8rem; } .box b { flex-basis: 100%; }
  .box span { white-space: nowrap; } .box span::before { content: attr(title) " "; }
  .head .box span { display: none; }
  .tree details, .tree div { margin-left: .5rem; }
}
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
.grids img, img.grid { width: 100%; display: block; image-rendering: pixelated; border-radius: .35rem; }
img.grid { max-width: 24rem; }
code { font-size: .95em; }
"""
"""How tables, bars, trees and pictures look, in pages and in notebooks."""
_MOST = 200  # rows of a table that a notebook shows
_PICTURES = 16


def fragment(body: str) -> str:
    """A body for a notebook, in colours of its own: the style reaches nothing around it."""
    own = f"{LIGHT} color: var(--ink); background: var(--page); padding: 1rem; max-width: 60rem;"
    dark = f"@media (prefers-color-scheme: dark) {{ & {{ {DARK} }} }}"
    style = f".effformer {{ {own} {dark} {RULES} }}"
    return f'<div class="effformer"><style>{style}</style>{body}</div>'


def html_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table that scrolls where it is too wide."""
    head = "".join(f"<th>{escape(cell)}</th>" for cell in header)
    body = "".join("<tr>" + "".join(f"<td>{escape(c)}</td>" for c in row) + "</tr>" for row in rows)
    return f'<div class="scroll"><table><tr>{head}</tr>{body}</table></div>'


class Shown:
    """Base of results that a notebook shows and that become a table. What a class does not say itself
    follows from its ``to_dict`` or its fields: single values are one table, lists of records further
    ones, and the first of these are the rows.
    """

    __slots__ = ()

    def to_frame(self) -> Any:
        """The rows as a pandas ``DataFrame``.

        Raises:
            MissingExtra: pandas is not installed.
        """
        return need("pandas", "notebook").DataFrame(self._rows())

    def _rows(self) -> list[dict[str, Any]]:
        facts = self._facts()
        lists = [value for value in facts.values() if _records(value)]
        return list(lists[0]) if lists else [facts]

    def _body(self) -> str:
        return f"<h3>{escape(type(self).__name__)}</h3>{''.join(tables(self._facts()))}"

    def _facts(self) -> dict[str, Any]:
        made: Any = getattr(self, "to_dict", None)
        return dict(made() if made is not None else dataclasses.asdict(self))  # type: ignore[call-overload]

    def _repr_html_(self) -> str:
        return fragment(self._body())


def _records(value: Any) -> bool:
    """A list of rows."""
    return (
        isinstance(value, (list, tuple)) and bool(value) and all(isinstance(v, dict) for v in value)
    )


def tables(facts: Mapping[str, Any]) -> Iterator[str]:
    """Of facts by name: single values first, then a table for every list of records and every mapping."""
    inside = {k: v for k, v in facts.items() if _records(v) or (isinstance(v, dict) and v)}
    single = [(k, _words(v)) for k, v in facts.items() if k not in inside]
    if single:
        yield html_table(("", ""), single)
    for name, value in inside.items():
        rows = value if _records(value) else [{"": k, "value": v} for k, v in value.items()]
        yield f"<h3>{escape(name)}</h3>{_cells(rows)}"


def _cells(rows: Sequence[Mapping[str, Any]]) -> str:
    header = list(dict.fromkeys(key for row in rows for key in row))
    cells = [[_words(row.get(key)) for key in header] for row in rows[:_MOST]]
    more = f"<p>and {len(rows) - _MOST:,} more</p>" if len(rows) > _MOST else ""
    return html_table(header, cells) + more


def _words(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        text = str(value)
        return text if len(text) <= 120 else f"{text[:117]}..."
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def model_tree(model: nn.Module, title: str) -> str:
    """Modules with their parameters, equal numbered neighbours in one line."""
    return f'<div class="tree">{_module(title, model, 1, 0)}</div>'


def _module(label: str, module: nn.Module, count: int, level: int) -> str:
    each = sum(p.numel() for p in module.parameters())
    times = f" ({count} x {each:,})" if count > 1 else ""
    line = f"{escape(label)}: {escape(type(module).__name__)}{times}<em>{count * each:,}</em>"
    inside = "".join(
        _module(name, child, number, level + 1) for name, child, number in _children(module)
    )
    return branch(line, inside, opened=level < 1)


def branch(line: str, inside: str, *, opened: bool) -> str:
    """A line of a tree, which opens and closes what is inside."""
    if not inside:
        return f"<div>{line}</div>"
    return f"<details{' open' if opened else ''}><summary>{line}</summary>{inside}</details>"


def _children(module: nn.Module) -> Iterator[tuple[str, nn.Module, int]]:
    """Name, module and number of equal neighbours that it stands for."""
    run: list[tuple[str, nn.Module]] = []

    def merged() -> Iterator[tuple[str, nn.Module, int]]:
        if run:
            first, last = run[0][0], run[-1][0]
            yield (first if first == last else f"{first}-{last}"), run[0][1], len(run)

    for name, child in module.named_children():
        alike = run and name.isdigit() and repr(child) == repr(run[-1][1])
        if not alike:
            yield from merged()
            run = []
        run.append((name, child))
    yield from merged()


def picture_grid(x: Tensor, value_range: tuple[float, float], title: str) -> str:
    """The first pictures of a batch (B, C, H, W), C = 1 or 3, black and white at ``value_range``, as one
    PNG inside the page; empty if they are no pictures.
    """
    if x.dim() != 4 or x.shape[1] not in (1, 3) or x.is_meta:
        return ""
    low, high = value_range
    shown = x[:_PICTURES].detach().float().cpu().nan_to_num(low).clamp(low, high)
    cells = ((shown - low) * (255 / (high - low))).round().byte()
    from torch.nn.functional import pad

    padded = pad(cells, (1, 1, 1, 1), value=255)
    columns = next(n for n in (1, 2, 4, 8, 16) if n * n >= len(cells) or n == 4)
    blank = (-len(padded)) % columns
    padded = pad(padded, (0, 0, 0, 0, 0, 0, 0, blank), value=255)
    channels, width = padded.shape[1], padded.shape[3]
    rows = padded.unflatten(0, (-1, columns)).permute(0, 3, 1, 4, 2)
    grid = rows.reshape(-1, columns * width * channels)
    lines = b"".join(b"\0" + line.tobytes() for line in grid.numpy())
    kind = 0 if channels == 1 else 2
    head = struct.pack(">IIBBBBB", columns * width, len(grid), 8, kind, 0, 0, 0)
    chunks = ((b"IHDR", head), (b"IDAT", zlib.compress(lines)), (b"IEND", b""))
    png = b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + tag + data + struct.pack(">I", zlib.crc32(tag + data))
        for tag, data in chunks
    )
    source = base64.b64encode(png).decode()
    return f'<img class="grid" alt="{escape(title)}" src="data:image/png;base64,{source}">'
