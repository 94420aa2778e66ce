"""Comparisons at several values of one option: who is faster where, and from where on."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from html import escape
from typing import Any

from effformer.arguments import checked
from effformer.checks import unknown
from effformer.values import Natural

from .compare import Comparison, ComparisonRow
from .html import comparison_section, page
from .plots import Curves
from .save import COMPARISON, Saved
from .tables import size, table

__all__ = ["Sweep", "crossover"]


def crossover(first: Mapping[float, float], other: Mapping[float, float]) -> float | None:
    """Where another cost falls below the first one, for good, None if it does not.

    Args:
        first: position -> cost, of at least one positive position.
        other: the same for the other one, at the same positions.

    Returns:
        The smallest position if it is cheaper everywhere; between two positions both are taken to
        grow as powers.
    """
    dearer = [x for x in sorted(first) if other[x] >= first[x]]
    if not dearer:
        return min(first)
    if dearer[-1] == max(first):
        return None
    low = dearer[-1]
    high = min(x for x in first if x > low)
    a, b = (math.log(other[x] / first[x]) for x in (low, high))
    return math.exp(math.log(low) + a / (a - b) * math.log(high / low))


@dataclass(frozen=True, slots=True)
class Sweep(Saved):
    """The same models at several values of one option.

    Attributes:
        option: what was changed.
        found: value -> comparison; the rows of all have the same names.
    """

    KIND = COMPARISON

    option: str
    found: Mapping[float, Comparison]

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the models; the first is what the others are held against."""
        return tuple(row.name for row in next(iter(self.found.values())).rows)

    @checked
    def times(self, name: str, side: Natural = 0) -> dict[float, float]:
        """Value -> milliseconds, at the given one of the numbers of threads.

        Raises:
            ValueError: no model of that name, or fewer numbers of threads.
        """
        rows = {value: self._row(name, value) for value in self.found}
        if side >= (count := min(len(row.times) for row in rows.values())):
            raise ValueError(f"times: side must be below {count} (numbers of threads), got {side}")
        return {value: 1e3 * row.times[side][0].median for value, row in rows.items()}

    def _row(self, name: str, value: float) -> ComparisonRow:
        if name not in self.names:
            raise unknown("model", name, self.names, where="times")
        return self.found[value].rows[self.names.index(name)]

    def curves(self) -> Curves:
        """Time of every model over the values, at the first number of threads."""
        lines = {name: sorted(self.times(name).items()) for name in self.names}
        return Curves(lines, self.option, "ms", log=True)

    def table(self) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
        """Header and cells: for every value times and activations, one column a model."""
        rows = []
        for value in self.found:
            times, peaks = [], []
            for name in self.names:
                row = self._row(name, value)
                times.append(f"{self.times(name)[value]:.4g} ms")
                memory = None if row.profile is None else row.profile.memory
                peaks.append("-" if memory is None else size(memory.peak))
            rows.append((f"{value:g}", *times, *peaks))
        return (self.option, *self.names, *(f"{name}, memory" for name in self.names)), rows

    def verdicts(self) -> list[str]:
        """From where on each model is faster than the first."""
        first, *others = self.names
        said = []
        for name in others:
            at = crossover(self.times(first), self.times(name))
            if at is None:
                said.append(
                    f"{name} is not faster than {first} at {self.option}={max(self.found):g}"
                )
            elif at == min(self.found):
                said.append(f"{name} is faster than {first} at all of these")
            else:
                said.append(f"{name} is faster than {first} from {self.option}={at:.3g} on")
        return said

    def __str__(self) -> str:
        how = next(iter(self.found.values())).how
        return "\n".join([table(*self.table()), *self.verdicts(), how])

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "option": self.option,
            "found": [{"value": value, **one.to_dict()} for value, one in self.found.items()],
            "verdicts": self.verdicts(),
        }

    def _rows(self) -> list[dict[str, Any]]:
        """Models at every value."""
        return [
            {self.option: value} | row for value, one in self.found.items() for row in one._rows()
        ]

    def _body(self) -> str:
        words = "".join(f"<p>{escape(line)}</p>" for line in self.verdicts())
        return f'<div class="plot">{self.curves().svg()}</div>{words}'

    def _page(self) -> str:
        title = f"{', '.join(self.names)} over {self.option}"
        sections = [
            comparison_section(one, f"{self.option}={value:g}") for value, one in self.found.items()
        ]
        body = [f"<h1>{escape(title)}</h1>", self._body(), *sections]
        return page(title, "\n".join(body), COMPARISON)
