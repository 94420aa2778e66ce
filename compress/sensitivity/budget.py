"""One option for every unit under a budget: the multiple-choice knapsack problem."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

__all__ = ["Option", "pick"]


@dataclass(frozen=True, slots=True)
class Option:
    """One way to treat a unit.

    Attributes:
        cost: what the budget limits, at least 0.
        loss: what is to be small, at least 0.
    """

    cost: float
    loss: float


def pick(units: Sequence[Sequence[Option]], limit: float) -> list[int] | None:
    """An option of every unit, whose losses together are small and whose costs together keep the limit.

    ``min sum_i loss_i(s_i)  subject to  sum_i cost_i(s_i) <= limit``. Every unit starts at its cheapest
    option and climbs the lower convex hull of its points (cost, loss); the steps of all units are taken
    in the order of loss saved per cost, and those that no longer fit are passed over. Taken up to the
    first that does not fit, this is the optimum of the relaxed problem. What is left of the budget goes
    to single changes, again by loss saved per cost.

    Args:
        units: the options of each.
        limit: of all costs.

    Returns:
        Indices of the options; None if even the cheapest exceed the limit.

    Reference: Sinha and Zoltners, The Multiple-Choice Knapsack Problem, Operations Research 27, 1979.
    """
    hulls = [_hull(options) for options in units]
    chosen = [hull[0] for hull in hulls]
    spent = sum(options[i].cost for options, i in zip(units, chosen, strict=True))
    if spent > limit:
        return None
    steps = [
        (_gain(units[u][a], units[u][b]), u, b)
        for u, hull in enumerate(hulls)
        for a, b in pairwise(hull)
    ]
    closed = set[int]()
    for _, unit, to in sorted(steps, key=lambda step: -step[0]):
        more = units[unit][to].cost - units[unit][chosen[unit]].cost
        if unit in closed or spent + more > limit:
            closed.add(unit)
            continue
        chosen[unit], spent = to, spent + more
    return _filled(units, chosen, limit - spent)


def _hull(options: Sequence[Option]) -> list[int]:
    """Indices of the lower convex hull, from the cheapest option to that of least loss."""
    order = sorted(range(len(options)), key=lambda i: (options[i].cost, options[i].loss))
    hull: list[int] = []
    for i in order:
        if hull and options[i].loss >= options[hull[-1]].loss:
            continue
        while len(hull) > 1 and _gain(options[hull[-2]], options[hull[-1]]) <= _gain(
            options[hull[-1]], options[i]
        ):
            hull.pop()
        hull.append(i)
    return hull


def _gain(a: Option, b: Option) -> float:
    """Loss saved per cost from one option to a dearer one."""
    return (a.loss - b.loss) / max(b.cost - a.cost, 1e-300)


def _filled(units: Sequence[Sequence[Option]], chosen: list[int], left: float) -> list[int]:
    """Single changes with what is left, the best first."""
    while True:
        changes = [
            (_gain(options[i], option), u, j)
            for u, (options, i) in enumerate(zip(units, chosen, strict=True))
            for j, option in enumerate(options)
            if option.loss < options[i].loss and option.cost - options[i].cost <= left
        ]
        if not changes:
            return chosen
        _, unit, to = max(changes, key=lambda change: change[0])
        left -= units[unit][to].cost - units[unit][chosen[unit]].cost
        chosen[unit] = to
