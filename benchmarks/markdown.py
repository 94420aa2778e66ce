"""Results as Markdown: command, machine, table, and where we lose."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from effformer.io import atomic_path
from effformer.profile import Machine

__all__ = ["Row", "write"]


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of a result: a number beside the number that was aimed at.

    Attributes:
        what: what was measured.
        value: the number, with its unit.
        spread: 10th to 90th percentile, or empty.
        ratio: measured ratio, None if the row is only a reference.
        target: the ratio aimed at, None if there is none.
    """

    what: str
    value: str
    spread: str = ""
    ratio: float | None = None
    target: float | None = None

    def line(self) -> str:
        ratio = "" if self.ratio is None else f"{self.ratio:.3f}"
        target = "" if self.target is None else f"<= {self.target:g}"
        met = ""
        if self.ratio is not None and self.target is not None:
            met = "yes" if self.ratio <= self.target else "**no**"
        return f"| {self.what} | {self.value} | {self.spread} | {ratio} | {target} | {met} |"


def write(
    topic: str,
    title: str,
    rows: Sequence[Row],
    machine: Machine,
    notes: Sequence[str],
    *,
    keep: bool = True,
) -> None:
    """Print the table and write ``benchmarks/results/<topic>.md`` (not with ``keep=False``: small
    sizes show that a script runs, and nothing else).
    """
    lines = [
        f"# {title}",
        "",
        f"- command: `python benchmarks/{Path(sys.argv[0]).name}`",
        f"- date: {datetime.now(UTC):%Y-%m-%d}",
        f"- machine: {machine}",
        "- times are medians; ratios are medians over rounds in which all candidates took turns",
        "",
        "| what | median | p10 to p90 | ratio | aim | met |",
        "|---|---|---|---|---|---|",
        *(row.line() for row in rows),
        "",
        *(f"- {note}" for note in notes),
    ]
    text = "\n".join(lines).rstrip() + "\n"
    print(text)
    if not keep:
        return
    with atomic_path(Path(__file__).parent / "results" / f"{topic}.md") as path:
        path.write_text(text, encoding="utf-8")
