"""Which units go: from scores to the units that stay, by shares or under a budget."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from effformer.config import Config
from effformer.values import Count, Portion, checker

from ..plan import KINDS, Group, Kind
from .importance import Importance
from .recover import Recovery

__all__ = ["PruneScheme", "allocate", "budgeted"]

_LEAST = {"heads": 1, "channels": 8, "experts": 1, "blocks": 1, "width": 8}
"""Units that stay of every group."""
_CLOSE, _ROUNDS = 0.02, 4
"""How close to a budget is close enough, and how often a large last step is left out to get there."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PruneScheme(Config):
    """What `prune` takes out, and how it chooses.

    Exactly one of ``keep``, ``macs`` and ``params`` is given.

    Attributes:
        importance: how units are compared, see `importance`.
        units: kinds of units that may go: "heads", "channels" of FFNs, "experts" (parameters go, and
            hardly any work), "blocks", and the "width" of the residual stream. Heads, channels and blocks of no importance go without any change of the
            outputs; narrower norms always change them.
        scope: "uniform" takes the same share out of every part; "global" compares units of one kind in
            the whole model, each score divided by the mean of its part and by its cost in weights.
        keep: share of the units that stays, one number or one per kind ({"heads": 0.5}), which then
            replaces ``units``.
        macs: largest share of the multiply-adds that is left.
        params: largest share of the parameters that is left.
        round_to: channels and width become multiples of this.
        recover: what layers behind lost units are given where there is data: "bias" adds the mean of
            what they lose to their biases, "least-squares" fits their weights anew; "none".

    Example:
        >>> PruneScheme(importance="taylor", macs=0.5).scope
        'uniform'
    """

    importance: Importance = "magnitude"
    units: tuple[Kind, ...] = ("heads", "channels")
    scope: Literal["uniform", "global"] = "uniform"
    keep: Portion | Mapping[str, Any] | None = field(default=None)
    macs: Portion | None = None
    params: Portion | None = None
    round_to: Count = 8
    recover: Recovery = "bias"

    def check(self) -> None:
        given = [n for n in ("keep", "macs", "params") if getattr(self, n) is not None]
        if len(given) != 1:
            raise ValueError(
                f"PruneScheme: give one of keep=, macs= and params=, got {' and '.join(given) or 'none'}; "
                "macs=0.5 halves the work"
            )
        if not self.units:
            raise ValueError(f"PruneScheme: units is empty; choices: {', '.join(KINDS)}")
        if isinstance(self.keep, Mapping):
            if not self.keep or not set(self.keep) <= set(KINDS):
                raise ValueError(
                    f"PruneScheme: keep names {', '.join(self.keep) or 'nothing'}; choices: {', '.join(KINDS)}"
                )
            for kind, share in self.keep.items():
                checker(Portion)(share, f"prune: keep[{kind!r}]")

    @property
    def kinds(self) -> tuple[Kind, ...]:
        """The kinds of units that may go."""
        if isinstance(self.keep, Mapping):
            return tuple(kind for kind in KINDS if kind in self.keep)
        return self.units

    def share(self, kind: str) -> float:
        """The share of units of a kind that stays, where shares are given."""
        share = self.keep[kind] if isinstance(self.keep, Mapping) else self.keep
        assert share is not None
        return float(share)


@dataclass(frozen=True, slots=True)
class _Step:
    """Units of one group that go together, after those of the steps before it.

    Attributes:
        path: of the group.
        units: the units.
        done: share of the group that has gone then.
        score: mean score of these units, over the mean of the group.
    """

    path: str
    units: Tensor
    done: float
    score: float


def allocate(
    scores: Mapping[str, Tensor], groups: Sequence[Group], scheme: PruneScheme
) -> dict[str, Tensor]:
    """The units that stay if shares are given: the same share of every group, or of every kind.

    Args:
        scores: path of a group -> one number per unit.
        groups: the groups.
        scheme: with ``keep``.

    Returns:
        Path -> units that stay, ascending. Of n units ``int(n * keep)`` stay, rounded down to
        ``round_to``, but at least 1 head or block and 8 channels.
    """
    kept = {}
    for kind in dict.fromkeys(g.kind for g in groups):
        same = [g for g in groups if g.kind == kind]
        if scheme.scope == "uniform" or kind in ("blocks", "width"):
            counts = {
                _name(g): _aligned(int(g.units * scheme.share(kind) + 1e-9), g, scheme)
                for g in same
            }
            for group in same:
                order = _order(scores[_name(group)], group)
                gone = order[: group.units - counts[_name(group)]]
                kept[_name(group)] = _without(group.units, gone)
            continue
        total = sum(g.units for g in same)
        steps = _by_rank(same, scores, scheme)
        left = total - int(total * scheme.share(kind) + 1e-9)
        taken = []
        for step in steps:
            if left < len(step.units):
                break
            left -= len(step.units)
            taken.append(step)
        kept |= _after(same, taken)
    return kept


def budgeted(
    scores: Mapping[str, Tensor],
    groups: Sequence[Group],
    scheme: PruneScheme,
    measure: Callable[[Mapping[str, Tensor]], float],
    target: float,
    what: str,
) -> dict[str, Tensor]:
    """The units that stay under a budget: steps are taken in the order of their ranks until it is met.

    Args:
        scores: path of a group -> one number per unit.
        groups: the groups.
        scheme: scope and alignment.
        measure: the share that is left with these units.
        target: the largest share.
        what: the budget in words, "macs".

    Raises:
        ValueError: it cannot be met; the message says what can.
    """
    kinds = dict.fromkeys(g.kind for g in groups)
    ranked: list[tuple[float, int, _Step]] = []
    for number, kind in enumerate(kinds):
        same = [g for g in groups if g.kind == kind]
        steps = _by_rank(same, scores, scheme)
        if scheme.scope == "uniform":
            ranked += [(step.done, number, step) for step in steps]
        else:  # every kind loses its units at the same pace
            ranked += [((i + 1) / len(steps), number, step) for i, step in enumerate(steps)]
    ranked.sort(key=lambda item: item[:2])
    order = [step for _, _, step in ranked]
    least = measure(_after(groups, order))
    if least > target:
        names = ", ".join(kinds)
        raise ValueError(
            f"prune: {what}={target:g} cannot be met by taking out {names}; the least is "
            f"{what}={least + 5e-4:.3f}; more kinds of units= or a wider where= reach further"
        )
    best: dict[str, Tensor] = {}
    reached = -1.0
    for _ in range(_ROUNDS):
        count, share = _fewest(order, lambda taken: measure(_after(groups, taken)), target, least)
        if share > reached:
            best, reached = _after(groups, order[:count]), share
        if reached >= target * (1 - _CLOSE) or not count:
            break
        # the last step was a large one: do without it, and what follows it in its part
        last = order[count - 1]
        order = order[: count - 1] + [s for s in order[count:] if s.path != last.path]
        least = measure(_after(groups, order))
        if least > target:
            break
    return best


def _fewest(
    order: Sequence[_Step], measure: Callable[[Sequence[_Step]], float], target: float, least: float
) -> tuple[int, float]:
    """The smallest number of steps after which no more than the target is left, and what is left then.

    Args:
        order: the steps.
        measure: the share that is left after some of them; each asks for a whole count.
        target: the share to reach.
        least: what is left after all steps.
    """
    low, high = 0, len(order)
    above, below = 1.0, least
    if above <= target:
        return 0, above
    while high - low > 1:
        # work falls almost evenly from step to step; every other guess halves what is left
        even = (
            low + round((high - low) * (above - target) / (above - below)) if above > below else low
        )
        for guess in (even, (low + high) // 2):
            if not low < guess < high:
                continue
            share = measure(order[:guess])
            if share <= target:
                high, below = guess, share
            else:
                low, above = guess, share
    return high, below


def _name(group: Group) -> str:
    return group.path or group.kind


def _order(score: Tensor, group: Group) -> Tensor:
    """The units that may go, the least important first."""
    order = score.argsort(stable=True)
    return order[~torch.isin(order, torch.tensor(group.fixed, dtype=torch.int64))]


def _floor(group: Group, scheme: PruneScheme) -> int:
    least = max(_LEAST[group.kind], group.least)
    if group.kind in ("channels", "width"):
        least = max(least, scheme.round_to) if scheme.round_to > 1 else least
    return min(group.units, max(least, len(group.fixed)))


def _aligned(count: int, group: Group, scheme: PruneScheme) -> int:
    if group.kind in ("channels", "width") and count < group.units:
        count = count // scheme.round_to * scheme.round_to
    return max(count, _floor(group, scheme))


def _steps(group: Group, score: Tensor, scheme: PruneScheme) -> Iterator[_Step]:
    """The units of a group in the order in which they go, as many at once as alignment asks for."""
    order, floor = _order(score, group), _floor(group, scheme)
    mean = float(score.mean())
    relative = score / mean if mean > 0 else score
    size = scheme.round_to if group.kind in ("channels", "width") else 1
    left = group.units
    while left > floor:
        step = min(left % size or size, left - floor)
        units = order[group.units - left : group.units - left + step]
        if not len(units):
            return
        left -= len(units)
        yield _Step(_name(group), units, 1 - left / group.units, float(relative[units].mean()))


def _by_rank(
    groups: Sequence[Group], scores: Mapping[str, Tensor], scheme: PruneScheme
) -> list[_Step]:
    """The steps of groups of one kind, in the order in which they are taken."""
    costs = {_name(g): _cost(g) for g in groups}
    mean = sum(costs.values()) / len(costs)
    steps, keys = [], []
    for group in groups:
        worst = float("-inf")
        for step in _steps(group, scores[_name(group)], scheme):
            # a step never comes before those that it follows
            worst = max(worst, step.score * mean / costs[_name(group)])
            steps.append(step)
            keys.append(step.done if scheme.scope == "uniform" else worst)
    return [step for _, step in sorted(zip(keys, steps, strict=True), key=lambda pair: pair[0])]


def _cost(group: Group) -> float:
    """Slices of tensors that a unit owns, in proportion to its weights in equally wide models."""
    return sum(float((m.owner >= 0).sum()) for m in group.members) / group.units or 1.0


def _after(groups: Sequence[Group], taken: Sequence[_Step]) -> dict[str, Tensor]:
    gone: dict[str, list[Tensor]] = {}
    for step in taken:
        gone.setdefault(step.path, []).append(step.units)
    return {
        _name(g): _without(g.units, torch.cat(gone[_name(g)])) for g in groups if _name(g) in gone
    }


def _without(units: int, gone: Tensor) -> Tensor:
    every = torch.arange(units)
    return every[~torch.isin(every, gone)]
