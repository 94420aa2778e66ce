"""Profiles and comparisons as text, JSON and files."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from effformer.files import atomic_path

from .parts import PART_LABELS
from .tree import Node, module_tree

if TYPE_CHECKING:
    from .compare import Comparison
    from .profiler import Profile

__all__ = [
    "SUFFIXES",
    "amount",
    "comparison_dict",
    "comparison_table",
    "comparison_text",
    "profile_dict",
    "profile_text",
    "save_report",
    "size",
    "table",
    "tree_text",
]

SUFFIXES = (".json", ".html", ".txt")


def amount(n: float) -> str:
    """A count in words of three to four digits: ``23.01 G``."""
    for unit, scale in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(n) >= scale:
            return f"{n / scale:.4g} {unit}"
    return f"{n:.4g}"


def size(n: float) -> str:
    """Bytes in words: ``9.5 MB`` (1 MB = 10^6 bytes)."""
    return f"{amount(n)}B" if abs(n) >= 1e3 else f"{n:.0f} B"


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Plain text columns; the first is left-aligned, the others right-aligned."""
    lines = [list(header), *(list(row) for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    lines.insert(1, ["-" * width for width in widths])
    return "\n".join(
        "  ".join(
            c.ljust(w) if i == 0 else c.rjust(w)
            for i, (c, w) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def tree_text(profile: Profile, depth: int) -> str:
    """Modules with their MACs and shares, indented, down to ``depth`` levels below the model."""
    rows: list[tuple[str, str, str]] = []

    def visit(node: Node, level: int, times: int) -> None:
        label = (
            node.label if node.count == 1 else f"{node.label} ({node.count} x {amount(node.each)})"
        )
        share = node.macs * times / profile.total if profile.total else 0.0
        rows.append(("  " * level + label, amount(node.macs * times), f"{share:.1%}"))
        if level < depth:
            for child in node.children:
                visit(child, level + 1, times * node.count)

    visit(module_tree(profile.by_module, profile.name), 0, 1)
    return table(("module", "MACs", "share"), rows)


def profile_text(profile: Profile) -> str:
    """Everything about a profile, for a terminal."""
    p = profile
    total = p.total or 1
    lines = [f"{p.name}: {p.total:,} MACs ({amount(p.flops)}FLOPs), {p.params:,} parameters"]
    if p.executed is not None and p.executed != p.total:
        lines.append(f"executed: {p.executed:,} MACs ({p.executed / total:.1%} of the dense work)")
    lines.append(
        f"inputs: {', '.join(str(shape) for shape in p.inputs)}; trainable: {p.trainable:,}"
    )
    if p.memory is not None:
        saved = "" if p.memory.saved is None else f", {size(p.memory.saved)} saved for backward"
        lines.append(
            f"activations: {size(p.memory.peak)} at the peak{saved}; "
            f"weights {size(p.memory.weights)} ({p.memory.method})"
        )
    parts = ((PART_LABELS[k], f"{n:,}", f"{n / total:.1%}") for k, n in p.by_part.items())
    lines += ["", table(("part", "MACs", "share"), parts), "", tree_text(p, 4), ""]
    ops = ((op, str(p.calls.get(op, "")), f"{n:,}") for op, n in p.by_op.items())
    lines += [table(("operator", "calls", "MACs"), ops), ""]
    lines.append(f"elementwise: {amount(sum(p.elements.values()))} elements, 0 MACs by convention")
    listed = ", ".join(f"{op} x {n}" for op, n in p.uncounted.items())
    lines.append(f"uncounted: {listed or 'nothing'}")
    lines += [f"note: {note}" for note in p.notes]
    lines.append(f"convention: {p.convention}")
    if p.cross_check:
        lines += ["", _cross_check_text(p)]
    return "\n".join(lines)


def _cross_check_text(profile: Profile) -> str:
    lines = []
    for row in profile.cross_check:
        if row.total is None:
            lines.append(f"{row.counter}: failed ({row.error})")
            continue
        lines.append(f"{row.counter}: {row.total:,} MACs, {row.difference:+,} against ours")
        lines += [f"  {e.macs:+,}  {e.reason}" for e in row.explanations]
        if row.unexplained:
            lines.append(f"  {row.unexplained:+,}  UNEXPLAINED")
    return "\n".join(lines)


def profile_dict(profile: Profile) -> dict[str, Any]:
    """Plain JSON values of a profile."""
    return asdict(profile) | {"flops": profile.flops, "inputs": [list(s) for s in profile.inputs]}


def comparison_text(comparison: Comparison) -> str:
    """The table of a comparison, for a terminal."""
    lines = [table(*comparison_table(comparison))]
    first = comparison.rows[0].latency
    if first is not None:
        lines.append(f"{first.runs} runs each in turns after {first.warmup}, {first.machine}")
    return "\n".join(lines)


def comparison_table(comparison: Comparison) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Header and cells of a comparison."""
    columns: dict[str, list[str]] = {
        name: []
        for name in (
            "model",
            "parameters",
            "MACs",
            "executed",
            "peak",
            "latency",
            "p10",
            "p90",
            "ratio",
        )
    }
    for row in comparison.rows:
        p, t = row.profile, row.latency
        times = ["-"] * 3 if t is None else [f"{1e3 * s:.4g} ms" for s in (t.median, t.p10, t.p90)]
        cells = [
            row.name,
            amount(p.params),
            amount(p.total),
            "-" if p.executed is None else amount(p.executed),
            "-" if p.memory is None else size(p.memory.peak),
            *times,
            "-" if row.ratio is None else f"{row.ratio:.3f}x",
        ]
        for column, cell in zip(columns.values(), cells, strict=True):
            column.append(cell)
    if columns["executed"] == columns["MACs"]:
        del columns["executed"]
    return tuple(columns), list(zip(*columns.values(), strict=True))


def comparison_dict(comparison: Comparison) -> dict[str, Any]:
    """Plain JSON values of a comparison."""
    return {
        "rows": [
            {
                "name": row.name,
                "profile": profile_dict(row.profile),
                "latency": None if row.latency is None else asdict(row.latency),
                "ratio": row.ratio,
            }
            for row in comparison.rows
        ]
    }


def save_report(
    path: str | Path, profiles: Sequence[Profile], comparison: Comparison | None = None
) -> None:
    """Write a report; the suffix decides: .json, .html or .txt.

    Raises:
        ValueError: another suffix.
        FormatError: the file cannot be written; an existing one is intact.
    """
    from .html import report_page

    subject = profiles[0] if comparison is None else comparison
    suffix = Path(path).suffix
    if suffix == ".json":
        text = json.dumps(subject.to_dict(), indent=2) + "\n"
    elif suffix == ".txt":
        text = f"{subject}\n"
    elif suffix == ".html":
        text = report_page(profiles, comparison)
    else:
        raise ValueError(
            f"save: {str(path)!r} must end in {', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]}"
        )
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
