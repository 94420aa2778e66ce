"""Turn what a `Counter` saw into sums by module, part, block and operator."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from .counter import Counter
from .operators import Kind
from .parts import PART_LABELS, Parts, block_of

__all__ = ["Costs", "ancestors"]


class Costs:
    """Multiply-adds by (module path, operator), dense, with the sums that a profile shows.

    Args:
        counter: a finished counter.
        dynamic: paths of parts that reported skipped work, with their dense multiply-adds; None:
            their own formulas decide. The operators that ran may be fewer than the dense ones.
    """

    def __init__(self, counter: Counter, dynamic: Mapping[str, int | None] | None = None) -> None:
        self._counter = counter
        self._part = Parts(counter.model)
        self.own = {key: t.macs for key, t in counter.rows.items() if t.kind == "counted"}
        for (path, name), difference in counter.corrections.items():
            self.own[path, f"formula: {name}"] = difference
        known = dynamic or {}
        for path in sorted(known, key=lambda p: -p.count(".")):  # children before parents
            full = self._formula(path) if known[path] is None else known[path]
            missing = 0 if full is None else full - self.by_module().get(path, 0)
            if missing:
                self.own[path, "formula: dense"] = missing

    @property
    def total(self) -> int:
        """All multiply-adds."""
        return sum(self.own.values())

    def by_module(self) -> dict[str, int]:
        """Path -> MACs, children included, for every module that ran."""
        sums = dict.fromkeys(self._counter.paths, 0)
        for (path, _), count in self.own.items():
            for ancestor in ancestors(path):
                sums[ancestor] = sums.get(ancestor, 0) + count
        return sums

    def by_op(self) -> dict[str, int]:
        """Operator -> MACs."""
        return _sorted(_summed((op, count) for (_, op), count in self.own.items()))

    def by_part(self) -> dict[str, int]:
        """Part -> MACs, in the order of a transformer."""
        sums = _summed((self._part(path, op), count) for (path, op), count in self.own.items())
        return {part: sums[part] for part in PART_LABELS if part in sums}

    def by_block(self) -> dict[str, dict[str, int]]:
        """Numbered block -> part -> MACs."""
        blocks: dict[str, dict[str, int]] = {}
        for (path, op), count in self.own.items():
            if (name := block_of(path)) is not None:
                parts = blocks.setdefault(name, {})
                part = self._part(path, op)
                parts[part] = parts.get(part, 0) + count
        return blocks

    def calls(self, kind: Kind) -> dict[str, int]:
        """Operator -> number of calls."""
        rows = self._counter.rows.items()
        return _sorted(_summed((op, t.calls) for (_, op), t in rows if t.kind == kind))

    def elements(self) -> dict[str, int]:
        """Elementwise operator -> elements."""
        rows = self._counter.rows.items()
        return _sorted(_summed((op, t.elements) for (_, op), t in rows if t.kind == "elementwise"))

    def executed(self, fractions: Mapping[str, float]) -> int:
        """MACs when each part does its fraction of the dense work; a part inside another counts by
        its own.
        """
        total = 0.0
        for (path, _), count in self.own.items():
            nearest = next((a for a in ancestors(path) if a in fractions), None)
            total += count * (1.0 if nearest is None else fractions[nearest])
        return round(total)

    def _formula(self, path: str) -> int | None:
        """Dense MACs of a part by its formula, or of the topmost parts inside that have one."""
        formulas = self._counter.formulas
        inside = {p for p in formulas if path in ancestors(p)}
        topmost = [p for p in inside if inside.isdisjoint(ancestors(p)[1:])]
        calls = [call for p in topmost for call in formulas[p]]
        return sum(batch * formula() for batch, formula in calls) if calls else None


def ancestors(path: str) -> list[str]:
    """The path itself, its parents, the root."""
    names = path.split(".") if path else []
    return [".".join(names[:i]) for i in range(len(names), -1, -1)]


def _summed(pairs: Iterable[tuple[str, int]]) -> dict[str, int]:
    sums: dict[str, int] = {}
    for key, value in pairs:
        sums[key] = sums.get(key, 0) + value
    return sums


def _sorted(sums: dict[str, int]) -> dict[str, int]:
    return dict(sorted(sums.items(), key=lambda item: -item[1]))
