"""What a cache is worth: beside it what the same work buys without one."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from effformer.arguments import checked
from effformer.config import Spec, resolve
from effformer.flow import Guidance, VelocityField, sample
from effformer.flow.conventions import as_velocity
from effformer.flow.paths import Point
from effformer.flow.times import Steps
from effformer.nn.precision import widened
from effformer.notebook import Shown

from .velocity import cached

__all__ = ["CacheReport", "Contender", "compare"]

_FINER = 2
"""The reference takes so many times the steps, of two evaluations each."""
_SECOND = {"midpoint": 2, "dpm++2m": 1}
"""Samplers of order 2, with their evaluations a step."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Contender:
    """One way to draw the samples.

    Attributes:
        name: in words.
        evaluations: of the velocity field.
        executed: multiply-adds of one sample.
        distance: of the samples from the reference, relative to its size.
    """

    name: str
    evaluations: int
    executed: int
    distance: float


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheReport(Shown):
    """A cache and its rivals.

    Attributes:
        full: the sampler without a cache.
        cached: the same under the cache.
        rivals: without a cache, at the work of the cached one: fewer steps, and samplers of order 2.
        reference: what distances are measured from.
    """

    full: Contender
    cached: Contender
    rivals: tuple[Contender, ...]
    reference: str

    @property
    def loses(self) -> bool:
        """A rival is at least as near."""
        return min(r.distance for r in self.rivals) <= self.cached.distance

    @property
    def verdict(self) -> str:
        """One sentence."""
        best = min(self.rivals, key=lambda r: r.distance)
        if self.loses:
            return (
                f"The cache loses: {best.name} without one is at {best.distance:.4f}, the cache at "
                f"{self.cached.distance:.4f}, at the same work."
            )
        return (
            f"The cache wins: it is at {self.cached.distance:.4f}, the best rival at the same work, "
            f"{best.name}, at {best.distance:.4f}."
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self) | {"loses": self.loses, "verdict": self.verdict}

    def __str__(self) -> str:
        rows = [self.full, self.cached, *self.rivals]
        width = max(len(r.name) for r in rows)
        lines = [
            f"{r.name:<{width}}  {r.evaluations:>4} evaluations  {r.executed / 1e6:>10,.1f} M "
            f"multiply-adds a sample  distance {r.distance:.4f}"
            for r in rows
        ]
        return "\n".join([*lines, f"(distance from {self.reference})", self.verdict])


@checked
def compare(
    velocity: VelocityField,
    policy: Spec,
    x0: Point,
    *,
    sampler: Spec = "euler",
    steps: Steps = 50,
    guidance: Guidance | None = None,
    **cond: Any,
) -> CacheReport:
    """Draw samples with and without a cache, and without one at the work that the cache left: with fewer
    steps of the same sampler, and with samplers of order 2.

    Args:
        velocity: as for `cached`.
        policy: name, dict or config.
        x0: start, (B, ...).
        sampler: as for `effformer.flow.sample`; one without noise.
        steps: number of steps.
        guidance: classifier-free guidance.
        cond: conditions.

    Raises:
        ValueError: as `cached` and `effformer.flow.sample`.
    """
    field = cached(velocity, policy)
    plain = as_velocity(velocity, where="compare")

    def drawn(by: Any, sampler: Spec, steps: int) -> tuple[Tensor, int]:
        made = sample(by, x0, sampler=sampler, steps=steps, guidance=guidance, **cond)
        return widened(made.x), made.nfe

    finest = _FINER * steps
    exact, _ = drawn(plain, "midpoint", finest)

    def far(x: Tensor) -> float:
        return float((x - exact).norm() / exact.norm())

    full, nfe = drawn(plain, sampler, steps)
    near, _ = drawn(field, sampler, steps)
    work = field.summary()
    each = work.dense / nfe
    stages = nfe / steps
    name = resolve("sampler", sampler, where="compare").entry.name
    rivals = []
    for rival, cost in {name: stages, **{n: c for n, c in _SECOND.items() if n != name}}.items():
        count = max(round(work.executed / each / cost), 1)
        x, spent = drawn(plain, sampler if rival == name else rival, count)
        rivals.append(_contender(f"{rival}, {count} steps", spent, spent * each, far(x)))
    return CacheReport(
        full=_contender(f"{name}, {steps} steps", nfe, work.dense, far(full)),
        cached=_contender(f"the same under {_title(field.policy)}", nfe, work.executed, far(near)),
        rivals=tuple(rivals),
        reference=f"midpoint, {finest} steps",
    )


def _contender(name: str, evaluations: int, executed: float, distance: float) -> Contender:
    return Contender(
        name=name, evaluations=evaluations, executed=round(executed), distance=distance
    )


def _title(policy: Any) -> str:
    own = {k: v for k, v in policy.to_dict().items() if k in ("order", "every", "tau", "warm")}
    return " ".join([policy.entry.name, *(f"{k}={v}" for k, v in own.items())])
