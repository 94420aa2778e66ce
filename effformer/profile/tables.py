"""Numbers in words, and columns of text."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

__all__ = ["amount", "size", "table"]


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
