"""What `explore` tried, as text, table, page and plot."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from html import escape
from typing import Any

from effformer.arguments import checked
from effformer.notebook import html_table
from effformer.profile import Breakdown
from effformer.profile.html import breakdown_section, page
from effformer.profile.plots import Pareto
from effformer.profile.save import Saved
from effformer.profile.tables import table

from ..quant.control import Goal

__all__ = ["EXPLORATION", "Exploration", "Tried"]

EXPLORATION = "exploration"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Tried:
    """One candidate; ratios are to the dense model.

    Attributes:
        name: in words.
        steps: of its recipe.
        latency: ratio of times.
        seconds: of a forward of one sample.
        size: ratio of files.
        macs: ratio of multiply-adds.
        value: the quality.
        drop: by how much that is worse than the dense model's.
    """

    name: str
    steps: tuple[Mapping[str, Any], ...]
    latency: float
    seconds: float
    size: float
    macs: float
    value: float
    drop: float


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Exploration(Saved):
    """What was tried.

    Attributes:
        target: "latency", "size" or "macs".
        share: of the dense model's that is asked for.
        quality: name of the metric.
        goal: the dense model's, and how far it may fall.
        rows: the dense model and the candidates.
        refused: candidates that could not be made, and why.
        how: the times were measured.
        boxes: the dense model and the chosen one, module by module; None: none is chosen.
    """

    KIND = EXPLORATION

    target: str
    share: float
    quality: str
    goal: Goal
    rows: tuple[Tried, ...]
    refused: Mapping[str, str]
    how: str
    boxes: Breakdown | None = None

    @checked
    def cost(self, row: Tried) -> float:
        """The ratio that the target is about."""
        found: float = getattr(row, self.target)
        return found

    @property
    def front(self) -> tuple[Tried, ...]:
        """Candidates that no other one beats in both cost and drop, the cheapest first."""
        front: list[Tried] = []
        for row in sorted(self.rows, key=lambda r: (self.cost(r), r.drop)):
            if math.isfinite(row.drop) and (not front or row.drop < front[-1].drop):
                front.append(row)
        return tuple(front)

    @property
    def chosen(self) -> Tried | None:
        """The one of least drop among those that meet the target within the drop; None: none does."""
        able = [r for r in self.rows if self.cost(r) <= self.share and r.drop <= self.goal.max_drop]
        return min(able, key=lambda r: (r.drop, self.cost(r)), default=None)

    def verdict(self) -> str:
        """What is chosen, or how near the target the best comes."""
        asked = f"{self.target}={self.share:g} with a drop of at most {self.goal.max_drop:g} in {self.quality}"
        if self.chosen is not None:
            one = self.chosen
            return (
                f"{asked} is met by {one.name}: {self.target}={self.cost(one):.3g}, {self.quality} "
                f"{one.value:.4g} (dense: {self.goal.reference:.4g})"
            )
        good = [r for r in self.rows if r.drop <= self.goal.max_drop]
        near = min(good, key=self.cost)  # the dense model is always among them
        cheap = min(
            (r for r in self.rows if self.cost(r) <= self.share), key=lambda r: r.drop, default=None
        )
        further = (
            ""
            if cheap is None
            else f"; at the target the least drop is {cheap.drop:.4g} ({cheap.name})"
        )
        return (
            f"{asked} is met by none of {len(self.rows) - 1} candidates; within the drop the best reaches "
            f"{self.target}={self.cost(near):.3g} ({near.name}){further}"
        )

    def plot(self) -> Pareto:
        """Cost over drop of all candidates."""
        points = [(r.name, self.cost(r), r.drop) for r in self.rows if math.isfinite(r.drop)]
        return Pareto(
            tuple(points), f"{self.target}, of the dense model's", f"drop in {self.quality}"
        )

    def table(self) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
        """Header and cells."""
        front = {row.name for row in self.front}
        rows: list[tuple[str, ...]] = [
            (
                f"{'* ' if row is self.chosen else ''}{row.name}", f"{1e3 * row.seconds:.3g} ms",
                f"{row.latency:.3f}x", f"{row.size:.3f}x", f"{row.macs:.3f}x", f"{row.value:.4g}",
                f"{row.drop:+.4f}", "front" if row.name in front else "",
            )
            for row in self.rows
        ]  # fmt: skip
        header = ("candidate", "time", "latency", "size", "macs", self.quality, "drop", "Pareto")
        return header, rows

    def __str__(self) -> str:
        return "\n".join([table(*self.table()), *self._gone(), self.verdict(), self.how])

    def _gone(self) -> list[str]:
        return [f"{name}: not made, {why}" for name, why in self.refused.items()]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; numbers that are not finite are None."""
        plain = dataclasses.replace(self, boxes=None)
        data = dataclasses.asdict(plain) | {
            "boxes": None if self.boxes is None else self.boxes.to_dict(),
            "front": [row.name for row in self.front],
            "chosen": None if self.chosen is None else self.chosen.name,
            "verdict": self.verdict(),
        }
        for row in data["rows"]:
            row |= {k: None for k in ("value", "drop") if not math.isfinite(row[k])}
        return data

    def _body(self) -> str:
        said = [self.verdict(), *self._gone(), *self.how.splitlines()]
        words = "".join(f"<p>{escape(line)}</p>" for line in said)
        return f'<div class="plot">{self.plot().svg()}</div>{html_table(*self.table())}{words}'

    def _page(self) -> str:
        title = f"Compressed for {self.target}={self.share:g}"
        steps = "".join(
            f"<li>{escape(row.name)}: <code>{escape(str(list(row.steps)))}</code></li>"
            for row in self.rows
            if row.steps
        )
        body = [f"<h1>{escape(title)}</h1>", self._body()]
        if self.boxes is not None:
            body.append(breakdown_section(self.boxes))
        return page(title, "\n".join([*body, f"<h2>Recipes</h2><ul>{steps}</ul>"]), EXPLORATION)
