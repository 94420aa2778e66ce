"""`--report` of the verbs that make one model of another: both, module by module."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .common import check_report

if TYPE_CHECKING:
    from effformer.models.base import Model

__all__ = ["Report", "check_place", "write_report"]

Report = Annotated[
    Path | None,
    typer.Option(
        help="Write what it was and what it became as a tree: work, bytes, time and error of every module, as "
        ".html, .json or .txt.",
        metavar="FILE",
    ),
]


def check_place(report: Path | None, *, force: bool) -> None:
    """Refuse the place of a report before anything is done.

    Raises:
        ValueError: a suffix that reports are not written as.
        FormatError: something else is there.
    """
    from ..profile.save import BREAKDOWN

    check_report(report, BREAKDOWN, force=force, option="--report")


def write_report(report: Path | None, before: Model, after: Model, *, force: bool) -> list[str]:
    """Measure and write, if it was asked for; what there is to say of it."""
    from ..profile import breakdown

    if report is None:
        return []
    given = before.example_inputs()
    breakdown([before, after], given, names=["before", "after"]).save(report, force=force)
    return [f"module by module: {report}"]
