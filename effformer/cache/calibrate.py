"""Numbers of policies that belong to a model and a run, from one without a cache."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from effformer.arguments import checked
from effformer.checks import unknown
from effformer.config import Config, Spec, resolve
from effformer.flow import Guidance, VelocityField, sample
from effformer.flow.paths import Point
from effformer.flow.times import Steps, TimeGrid
from effformer.nn.precision import widened

from .adaptive import MagCache, change
from .policies import Evaluation, Policy
from .predict import Predictor
from .velocity import Cached

__all__ = ["calibrate"]

_DEGREE = 4


@checked
def calibrate(
    velocity: VelocityField,
    policy: Spec,
    x0: Point,
    *,
    sampler: Spec = "euler",
    steps: Steps = 10,
    grid: TimeGrid | None = None,
    guidance: Guidance | None = None,
    **cond: Any,
) -> Config:
    """Fit what a policy takes from a run without a cache: the ``ratios`` of "magcache", and the ``poly``
    of "teacache" by least squares of the change of what the blocks add on the change of what enters
    them.

    The numbers belong to the weights, the sampler, its times and the guidance.

    Args:
        velocity: as for `cached`.
        policy: name, dict or config of "magcache" or "teacache"; other knobs are kept.
        x0: start of the run, (B, ...).
        sampler: as for `effformer.flow.sample`, as are the others.
        steps: number of steps.
        grid: the times instead.
        guidance: classifier-free guidance.
        cond: conditions.

    Returns:
        The config with its numbers.

    Raises:
        ValueError: a policy that takes no numbers, or a run too short to fit them.
    """
    config = resolve("cache", policy, where="calibrate")
    name = config.entry.name
    if name not in ("magcache", "teacache"):
        raise unknown(
            "policy with numbers of a model", name, ["magcache", "teacache"], where="calibrate"
        )
    watched = _Watched(velocity, config)
    sample(watched, x0, sampler=sampler, steps=steps, grid=grid, guidance=guidance, **cond)
    logs = [log for log in watched.logs if len(log.changes) > 1]
    if not logs:
        raise ValueError("calibrate: one evaluation has no change; use more steps")
    if isinstance(watched.like, MagCache):
        found = torch.stack(
            [_ratios(log.changes) for log in logs if len(log.changes) == len(logs[0].changes)]
        )
        return config.replace(ratios=tuple(found.mean(dim=0).tolist()))
    x = torch.cat([_changes(log.entries) for log in logs])
    y = torch.cat([_changes(log.changes) for log in logs])
    degree = min(_DEGREE, len(x) - 1)
    powers = torch.stack([x**n for n in range(degree, -1, -1)], dim=1)
    poly = torch.linalg.lstsq(powers, y[:, None], driver="gelsd").solution
    return config.replace(poly=tuple(poly.flatten().tolist()))


def _ratios(changes: list[Tensor]) -> Tensor:
    """Sizes over those of the evaluation before, in the mean over tokens."""
    sizes = torch.stack([c.norm(dim=-1) for c in changes])
    ratios = (sizes[1:] / (sizes[:-1] + 1e-8)).flatten(1).mean(dim=1)
    return torch.cat([ratios.new_ones(1), ratios])


def _changes(values: list[Tensor]) -> Tensor:
    pairs = zip(values[1:], values[:-1], strict=True)
    return torch.stack([change(new, old, per_sample=False) for new, old in pairs]).double()


@dataclass(slots=True)
class _Log:
    """What the policy of one branch would have seen."""

    entries: list[Tensor] = field(default_factory=list)
    changes: list[Tensor] = field(default_factory=list)


class _Watched(Cached):
    """Computes all, and writes down what a policy sees."""

    def __init__(self, velocity: VelocityField, policy: Config) -> None:
        self.logs: list[_Log] = []
        super().__init__(velocity, policy, forced=True)
        self.like: Policy = policy.build()

    def fresh(self) -> Policy:
        self.logs.append(_Log())
        return _Watching(self.policy.build(), self.logs[-1])


class _Watching(Policy):
    def __init__(self, like: Policy, log: _Log) -> None:
        super().__init__(like.config)
        self.looks = like.looks  # type: ignore[misc]
        self._like, self._log = like, log

    def predictor(self) -> Predictor:
        return self._like.predictor()

    def wants(self, now: Evaluation) -> bool:
        if now.look is not None:
            self._log.entries.append(widened(now.look()))
        return True

    def learn(self, now: Evaluation, rows: Tensor | None, value: Tensor) -> None:
        self._log.changes.append(widened(value))
