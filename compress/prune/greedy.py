"""Accuracy-driven greedy search: what a measured loss does not miss goes.

Reference: AxFormer: Accuracy-driven Approximation of Transformers for Faster, Smaller and more Accurate
NLP Models, 2020, arXiv 2010.03688.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

__all__ = ["Found", "Visit", "greedy"]

Measure = Callable[[Sequence[str], Mapping[str, int]], float]
"""The loss without some elements, and with so many keys a query in some of the others."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Visit:
    """One measurement of the search.

    Attributes:
        element: what was tried: a part ("blocks.1.attn"), a unit of it ("blocks.1.attn/3"), or fewer keys
            ("blocks.1.attn, 16 keys").
        loss: with it and everything that was accepted before.
        accepted: it stays out.
    """

    element: str
    loss: float
    accepted: bool


@dataclass(slots=True, kw_only=True)
class Found:
    """Where the search stands.

    Attributes:
        best: the least loss so far.
        removed: elements that went, in order.
        keys: parts whose queries attend to so many keys.
        visits: all measurements.
    """

    best: float
    removed: list[str] = field(default_factory=list)
    keys: dict[str, int] = field(default_factory=dict)
    visits: list[Visit] = field(default_factory=list)


def greedy(
    parts: Sequence[str],
    units: Mapping[str, Sequence[str]],
    hard: Mapping[str, Sequence[int]],
    measure: Measure,
    *,
    threshold: float,
    slack: float = 0.0,
    most: int | None = None,
) -> Found:
    """Try every element once, and leave it out if the loss is no larger than the least so far.

    First whole parts; then units of the parts that stay and whose loss would rise by at most
    ``threshold``, all but the last one of a part; then fewer and fewer keys in what is left.

    Args:
        parts: in the order in which they are tried, the last block first.
        units: units of a part.
        hard: numbers of keys for a part, descending; the search of a part ends at the first that is
            refused.
        measure: the loss.
        threshold: largest rise of the loss for a part to be looked into.
        slack: by how much the loss may exceed the least so far.
        most: largest number of measurements, that of the whole model included; None: as many as it takes.
    """
    found = Found(best=measure((), {}))
    rises: dict[str, float] = {}

    def tried(name: str, removed: Sequence[str], keys: Mapping[str, int]) -> bool | None:
        """Whether it is accepted, None where no measurement is left."""
        if most is not None and len(found.visits) + 1 >= most:
            return None
        loss = measure(removed, keys)
        accepted = loss <= found.best + slack
        found.visits.append(Visit(element=name, loss=loss, accepted=accepted))
        rises.setdefault(name, loss - found.best)
        if accepted:
            found.best = min(found.best, loss)
        return accepted

    for part in parts:
        if tried(part, [*found.removed, part], found.keys):
            found.removed.append(part)
    near = [p for p in parts if p not in found.removed and rises.get(p, threshold + 1) <= threshold]
    for part in near:
        left = len(units.get(part, ()))
        for unit in units.get(part, ()):
            if left > 1 and tried(unit, [*found.removed, unit], found.keys):
                found.removed.append(unit)
                left -= 1
    for part in (p for p in parts if p not in found.removed):
        for count in hard.get(part, ()):
            fewer = {**found.keys, part: count}
            if not tried(f"{part}, {count} keys", found.removed, fewer):
                break
            found.keys[part] = count
    return found
