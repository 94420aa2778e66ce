"""Accuracy control: put layers back into floating point until a metric keeps its limit."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from effformer.checks import shown
from effformer.notebook import Shown

__all__ = ["ControlReport", "Goal", "PutBack", "Trial", "control", "number"]

_WORSE = 2  # layers in a row that bring nothing until the rest are ranked again


@dataclass(frozen=True, slots=True, kw_only=True)
class Goal:
    """How far a metric may fall.

    Attributes:
        reference: metric of the dense model.
        max_drop: largest drop.
        relative: the drop is a share of the reference.
        best: large values are good, or small ones.
    """

    reference: float
    max_drop: float
    relative: bool
    best: Literal["high", "low"]

    def __post_init__(self) -> None:
        if not math.isfinite(self.reference):
            raise ValueError(
                f"metric: gives {self.reference} for the dense model; a number is needed"
            )
        if self.relative and self.reference == 0:
            raise ValueError(
                "metric: is 0 for the dense model, of which no share can be lost; give an absolute "
                "max_drop with relative=False"
            )

    def drop(self, metric: float) -> float:
        """By how much a metric is worse than the reference, negative if it is better."""
        if not math.isfinite(metric):
            return math.inf
        lost = self.reference - metric if self.best == "high" else metric - self.reference
        return lost / abs(self.reference) if self.relative else lost


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """One measurement on the way.

    Attributes:
        back: what was in floating point, in the order in which it was put back.
        metric: what the metric gave.
        drop: how far that is below the dense model's.
        why: the reason for the trial, or what followed from it.
    """

    back: tuple[str, ...]
    metric: float
    drop: float
    why: str


@dataclass(frozen=True, slots=True, kw_only=True)
class PutBack:
    """Something that is in floating point again.

    Attributes:
        name: path of the layer, or name of the product in a graph.
        gain: by how much its return alone made the drop smaller when it was ranked.
        drop: the drop once it was back, together with those before it.
    """

    name: str
    gain: float
    drop: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ControlReport(Shown):
    """What accuracy control did.

    Attributes:
        goal: the limit, and the metric of the dense model.
        metric: of the result.
        drop: how far that is below the dense model's.
        units: what could be put back.
        back: what was, in order.
        log: every measurement.
        quantized: the report of the quantization itself.
    """

    goal: Goal
    metric: float
    drop: float
    units: tuple[str, ...]
    back: tuple[PutBack, ...]
    log: tuple[Trial, ...]
    quantized: Any = None

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; numbers that are not finite are None."""
        own = asdict(replace(self, quantized=None))
        inner = None if self.quantized is None else self.quantized.to_dict()
        found: dict[str, Any] = _plain(own | {"quantized": inner})
        return found

    def __str__(self) -> str:
        share = " of it" if self.goal.relative else ""
        lines = [
            f"metric of the dense model: {self.goal.reference:.6g}; it may lose "
            f"{self.goal.max_drop:g}{share}",
            f"all of {len(self.units)} quantized: {self.log[0].metric:.6g} (drop {self.log[0].drop:.4g})",
        ]
        lines += [
            f"put back {one.name}: alone it regains {one.gain:.4g}; drop now {one.drop:.4g}"
            for one in self.back
        ]
        lines.append(
            f"result: {self.metric:.6g} (drop {self.drop:.4g}), {len(self.units) - len(self.back)} of "
            f"{len(self.units)} quantized, {len(self.log)} measurements"
        )
        return "\n".join(lines)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


Measure = Callable[[Collection[str]], float]
"""Metric of the model in which some units are in floating point, the others quantized."""


def control(
    units: Sequence[str], measure: Measure, goal: Goal, *, quick: Measure | None = None
) -> ControlReport:
    """Put units back until the drop keeps the limit; all of them back is the dense model, which does.

    Units are ranked by the metric that each regains when it alone goes back; then they go back in this
    order, each measured together with those before it. When two in a row bring nothing, what was put
    back since the best drop is quantized again and the rest is ranked anew.

    Args:
        units: names of what can be put back.
        measure: the metric with some of them in floating point.
        goal: the limit.
        quick: a cheaper metric that ranks; None: the same.

    Differs from NNCF: a metric for which small values are good, and one that is 0, are handled.

    Reference: NNCF's quantization with accuracy control.
    """
    measured = _Measured(measure, goal, frozenset(units))
    kept: list[PutBack] = []
    now = measured.trial((), "everything is quantized")
    while now.drop > goal.max_drop and len(kept) < len(units):
        names = [one.name for one in kept]
        gains = _gains([u for u in units if u not in names], names, measured, quick)
        taken: list[PutBack] = []
        reached, good = now.drop, 0
        for unit in sorted(gains, key=lambda unit: -gains[unit]):
            some = [*names, *(one.name for one in taken), unit]
            after = measured.trial(some, f"{unit} regains most of those that are left")
            taken.append(PutBack(name=unit, gain=gains[unit], drop=after.drop))
            if after.drop < reached:
                reached, good = after.drop, len(taken)
            if after.drop <= goal.max_drop or len(taken) - good == _WORSE:
                break
        kept += taken[: max(good, 1)]  # the best of a ranking stays, so that there is an end
        now = measured.trial([one.name for one in kept], "what has brought something")
    return ControlReport(
        goal=goal, metric=now.metric, drop=now.drop, units=tuple(units), back=tuple(kept),
        log=tuple(measured.log),
    )  # fmt: skip


class _Measured:
    """Measurements, each made once, and the log of them."""

    def __init__(self, measure: Measure, goal: Goal, every: frozenset[str]) -> None:
        self.measure, self.goal, self.every = measure, goal, every
        self.known: dict[frozenset[str], Trial] = {}

    @property
    def log(self) -> list[Trial]:
        return list(self.known.values())

    def trial(self, back: Sequence[str], why: str) -> Trial:
        """The metric with some units back, and why that is measured."""
        key = frozenset(back)
        if key not in self.known:
            dense = key == self.every  # the metric of which is known
            metric = self.goal.reference if dense else number(self.measure(key))
            self.known[key] = Trial(
                back=tuple(back), metric=metric, drop=self.goal.drop(metric), why=why
            )
        return self.known[key]


def _gains(
    left: Sequence[str], back: Sequence[str], measured: _Measured, quick: Measure | None
) -> dict[str, float]:
    """By how much the drop falls when each of the units that are left goes back alone."""
    if quick is None:
        start = measured.trial(back, "start of a ranking").drop
        drops = {u: measured.trial([*back, u], f"{u} is ranked").drop for u in left}
    else:
        start = measured.goal.drop(number(quick(frozenset(back))))
        drops = {u: measured.goal.drop(number(quick(frozenset([*back, u])))) for u in left}
    gains = {u: start - drop for u, drop in drops.items()}
    return {u: 0.0 if math.isnan(gain) else gain for u, gain in gains.items()}


def number(value: Any) -> float:
    """The number that a metric gave.

    Raises:
        TypeError: it is none.
    """
    found = value.item() if getattr(value, "shape", None) == () else value
    if isinstance(found, bool) or not isinstance(found, (int, float)):
        raise TypeError(f"metric: expected a number, got {shown(value)}")
    return float(found)
