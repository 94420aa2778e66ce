"""A velocity field that does not compute all of its network at every evaluation."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from effformer.arguments import checked
from effformer.checks import CapabilityError
from effformer.config import Config, Spec, resolve
from effformer.flow import Velocity, VelocityField
from effformer.flow.conventions import Remembering, as_velocity, batch_times
from effformer.profile import profile
from effformer.registry import cache as registry
from effformer.wrapped import bare

from .policies import Evaluation, Policy
from .stack import Branch, Stack

__all__ = ["Cached", "Summary", "cached"]

_FEW = 8
"""Evaluations up to which samplers are too short to skip any."""
_MOST = 8
"""Different conditions within a run: more are no branches of guidance."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """What a run computed.

    Attributes:
        evaluations: of the velocity field.
        computed: share of the samples for which each of them computed what may be skipped.
        dense: multiply-adds of one sample of the whole run without a cache.
        executed: with it, what policies look at included.
    """

    evaluations: int
    computed: tuple[float, ...]
    dense: int
    executed: int

    @property
    def share(self) -> float:
        """Executed over dense work."""
        return self.executed / self.dense

    def __str__(self) -> str:
        full = sum(share == 1 for share in self.computed)
        return (
            f"{full} of {self.evaluations} evaluations computed in full, "
            f"{self.executed / 1e6:,.1f} of {self.dense / 1e6:,.1f} M multiply-adds a sample "
            f"({100 * self.share:.0f} %)"
        )


class Cached(Remembering):
    """A velocity field under a cache; made by `cached`.

    Calls with the conditions of an earlier one belong to its branch of guidance: each remembers for
    itself. A call at the time of the one before, with other conditions, is the same evaluation.

    Attributes:
        network: the model.
        policy: config of the policy.
    """

    @checked
    def __init__(
        self,
        velocity: VelocityField,
        policy: Spec,
        blocks: slice | None = None,
        forced: bool = False,
    ) -> None:
        found = as_velocity(velocity, where="cached")
        network: Any = found.network if isinstance(found, Velocity) else found
        if isinstance(network, Cached):
            raise ValueError("cached: the velocity is cached already")
        if not isinstance(network, nn.Module):
            raise TypeError(
                f"cached: expected a model, or adapt(model, ...), got {type(network).__name__}; guidance "
                "stands around it: guided(cached(model, ...), ...)"
            )
        if bare(network) is not network:
            raise CapabilityError(
                f"cached: a {type(network).__name__} runs its blocks by itself; give the model inside, "
                "whose blocks may be compiled: for block in model.blocks: block.compile()"
            )
        self.network, self.policy = network, resolve("cache", policy, where="cached")
        self._stack = Stack(network, self.policy, blocks)
        self._field: VelocityField = (
            Velocity(self._run, found.convention) if isinstance(found, Velocity) else self._run
        )
        self._blocks, self._forced = blocks, forced
        self._clear(None, None)

    def restart(self, evaluations: int | None = None, samples: int | None = None) -> None:
        """Forget a run; `effformer.flow.sample` calls it.

        Args:
            evaluations: how many the next run has, None if nobody knows.
            samples: how many it draws.

        Raises:
            ValueError: the run is too short, or the policy cannot work with it.
        """
        own, name = self.fresh(), self.policy.entry.name
        if own.ends and evaluations is None:
            raise ValueError(
                f"cached: {name} must know the number of evaluations; choices: euler, midpoint, heun, "
                "rk4, dpm++2m, or restart(evaluations) in a loop of your own"
            )
        if evaluations is not None and (why := own.objection(evaluations)):
            raise ValueError(f"cached: {name} {why}")
        if evaluations is not None and evaluations <= _FEW and not self._forced:
            raise ValueError(
                f"cached: a run of {evaluations} evaluations has none to spare; use a sampler without "
                "a cache, or forced=True"
            )
        self._stack = Stack(self.network, self.policy, self._blocks)
        self._clear(evaluations, samples)

    def fresh(self) -> Policy:
        """The policy of a branch that begins."""
        policy: Policy = self.policy.build()
        return policy

    def _clear(self, evaluations: int | None, samples: int | None) -> None:
        self._total, self._samples = evaluations, samples
        self._index, self._time = -1, torch.empty(0)
        self._served: list[Branch] = []
        self._branches: list[tuple[tuple[int, ...], dict[str, Any], Branch]] = []

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    @checked
    def __call__(self, x: Tensor, t: Tensor | float, /, **cond: Any) -> Tensor:
        """The velocity (B, ...) at x (B, ...) and the time t, a number or (B,), in [0, 1].

        Raises:
            CapabilityError: the network is in training mode, or its blocks change the tokens.
            ValueError: more different conditions than guidance has branches.
        """
        self._now = batch_times(t, x)
        return self._field(x, self._now, **cond)

    def _run(self, x: Tensor, t: Tensor, /, **cond: Any) -> Any:
        if self.network.training:
            raise CapabilityError("cached: the model is in training mode; call model.eval() first")
        if cond.get("skip_layers"):  # another function, which is not worth a memory of its own
            return self.network(x, t, **cond)
        branch = self._branch(x, cond)
        same = torch.equal(self._time, self._now)
        if not same or any(branch is other for other in self._served):
            self._index, self._time, self._served = self._index + 1, self._now, []
        self._served.append(branch)
        branch.evaluations += 1
        now = Evaluation(self._index, self._total, self._now)
        branch.shown = branch.shown or (x.detach(), t, cond)
        if self._stack.place == "network":
            return self._whole(branch, now, x, t, cond)
        return self._stack.run(branch, now, x, t, cond)

    def _branch(self, x: Tensor, cond: Mapping[str, Any]) -> Branch:
        """The branch that has these conditions."""
        given = {name: value for name, value in cond.items() if name not in ("ledger", "tap")}
        for shape, known, branch in self._branches:
            if shape == tuple(x.shape) and _equal(known, given):
                return branch
        if len(self._branches) == _MOST:
            raise ValueError(
                f"cached: {_MOST + 1} different conditions in one run; call restart() before each run, "
                "and leave out the cache where conditions change from step to step"
            )
        kept = {n: v.clone() if isinstance(v, Tensor) else v for n, v in given.items()}
        branch = Branch(self.fresh())
        self._branches.append((tuple(x.shape), kept, branch))
        return branch

    def _whole(
        self, branch: Branch, now: Evaluation, x: Tensor, t: Tensor, cond: dict[str, Any]
    ) -> Tensor:
        """The output of the network, computed or held."""
        now.look, value = lambda: x, branch.value("")
        computes = bool(branch.policy.wants(now)) or not value.ready
        branch.computed[now.index] = float(computes)
        if not computes:
            branch.skipped[""] = branch.skipped.get("", 0) + x.shape[0]
            if cond.get("ledger") is not None:
                cond["ledger"].work("", torch.zeros(x.shape[0], device=x.device))
            return x + value.predict(now.index, now.time).to(x.dtype)
        out = self.network(x, t, **cond)
        if not isinstance(out, Tensor) or out.shape != x.shape:
            got = tuple(out.shape) if isinstance(out, Tensor) else type(out).__name__
            raise CapabilityError(
                f"cached: {self.policy.entry.name} holds output minus input, but the network makes "
                f"{got} of {tuple(x.shape)}; choices: {', '.join(_others(self.policy))}"
            )
        value.learn(out - x, now.index, now.time)
        branch.policy.learn(now, None, out)
        return out

    @property
    def computed(self) -> tuple[float, ...]:
        """Share of the samples for which each evaluation since the last restart computed what may be
        skipped.
        """
        shares: dict[int, list[float]] = {}
        for _, _, branch in self._branches:
            for index, share in branch.computed.items():
                shares.setdefault(index, []).append(share)
        return tuple(sum(s) / len(s) for _, s in sorted(shares.items()))

    def summary(self) -> Summary:
        """What was computed since the last restart; the work of one sample is counted by `profile`.

        Raises:
            ValueError: nothing was evaluated.
        """
        if not self._branches:
            raise ValueError("cached: nothing was evaluated since the last restart")
        dense = executed = 0.0
        for _, _, branch in self._branches:
            assert branch.shown is not None
            x, t, cond = branch.shown
            costs = self._costs(x, t, cond)
            dense += branch.evaluations * costs[""]
            executed += branch.evaluations * (costs[""] + self._looking(branch, costs))
            executed -= sum(n / len(x) * costs.get(path, 0) for path, n in branch.skipped.items())
        samples = self._samples or len(self._branches[0][2].shown[0])  # type: ignore[index]
        return Summary(
            evaluations=self._index + 1,
            computed=self.computed,
            dense=round(dense / samples),
            executed=round(executed / samples),
        )

    def _costs(self, x: Tensor, t: Tensor, cond: Mapping[str, Any]) -> dict[str, int]:
        """Multiply-adds of every module for one evaluation of a batch."""
        first, second = list(inspect.signature(self.network.forward).parameters)[:2]
        own = {name: value for name, value in cond.items() if name not in ("ledger", "tap")}
        inputs = {first: x, second: t, **own}
        return profile(self.network, inputs, memory=False).by_module

    def _looking(self, branch: Branch, costs: Mapping[str, int]) -> int:
        """Multiply-adds of what the policy computes beside the network, in one evaluation."""
        if branch.policy.looks != "entry":
            return 0
        first = f"blocks.{self._stack.start}"
        names = (f"{first}.modulation", f"{first}.x.modulation")
        return next((costs[n] for n in names if n in costs), 0)


@checked
def cached(
    velocity: VelocityField,
    policy: Spec = "newton",
    *,
    blocks: slice | None = None,
    forced: bool = False,
) -> Cached:
    """A velocity field that computes the blocks of its network at some evaluations only, with the same
    weights; elsewhere it carries their change on.

    Guidance goes around it, ``guided(cached(model), ...)`` or ``sample(cached(model), guidance=...)``;
    its branches remember each for itself. Every `effformer.flow.sample` starts anew; loops of your own
    call ``restart()``. Policies that decide by values decide for the whole batch, unless told
    ``per_sample=True``. In training, under ``fullgraph=True`` and with packed rows there is no cache.

    A sampler with fewer steps, or of a higher order, may serve you better at the same work: `compare`
    tells.

    Args:
        velocity: a model that says what it was trained to predict, or ``adapt(model, ...)``.
        policy: name, dict or config: "newton", "forecast", "reuse", "residual", "teacache", ...
        blocks: the range of blocks that is cached; None: all that the policy does not ask for.
        forced: also for runs of 8 evaluations and fewer.

    Raises:
        CapabilityError: the model has no list of blocks, or runs them by itself (compiled, parallel).
        TypeError: no model.
        ValueError: unknown policy or option, or an empty range.

    Example:
        >>> import torch
        >>> from effformer import build_model
        >>> from effformer.cache import cached
        >>> from effformer.flow import adapt, sample
        >>> field = cached(adapt(build_model("sit-nano").eval()), {"name": "newton", "every": 2})
        >>> drawn = sample(field, torch.randn(1, 4, 32, 32), steps=20, y=torch.tensor([3]))
        >>> field.computed[:6]
        (1.0, 1.0, 1.0, 1.0, 0.0, 1.0)
    """
    return Cached(velocity, policy, blocks, forced)


def _equal(known: Mapping[str, Any], given: Mapping[str, Any]) -> bool:
    if known.keys() != given.keys():
        return False
    for name, value in known.items():
        other = given[name]
        if isinstance(value, Tensor) != isinstance(other, Tensor):
            return False
        if isinstance(value, Tensor):
            if value.shape != other.shape or not torch.equal(value, other):
                return False
        elif value is not other and value != other:
            return False
    return True


def _others(policy: Config) -> list[str]:
    return [e.name for e in registry if e.name != policy.entry.name]
