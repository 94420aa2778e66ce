"""When to compute: schedules that are known before a run."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from effformer import config as _config
from effformer.registry import cache as registry
from effformer.values import Count, Natural, Real

from .predict import Newton, Predictor, Taylor

__all__ = ["Evaluation", "Forecast", "Mask", "NewtonForecast", "Policy", "Pyramid", "Reuse"]

Place = Literal["stack", "attention", "network"]


@dataclass(slots=True)
class Evaluation:
    """One evaluation of the network in a run, as a policy sees it.

    Attributes:
        index: its number, from 0 on.
        total: how many the run has, None if nobody knows.
        time: (B,) the time, 0 = noise, 1 = data.
        look: gives what the policy decides by (`Policy.looks`), None if it looks at nothing.
    """

    index: int
    total: int | None
    time: Tensor
    look: Callable[[], Tensor] | None = None

    @property
    def last(self) -> bool:
        """It ends the run."""
        return self.total is not None and self.index == self.total - 1


class Policy(ABC):
    """Kind "cache": decides for every evaluation whether the cached blocks are computed. An object
    belongs to one run and one branch of guidance.

    Args:
        config: the knobs.

    Attributes:
        looks: what it decides by: nothing, the change that the first blocks make ("residual"), what
            enters the first attention ("entry"), or the input of the network ("input").
        place: what is skipped: a range of blocks, their attentions, or the whole network.
        text: where blocks are skipped, a second stream is carried on as well.
        ends: the number of evaluations must be known.
    """

    looks: ClassVar[Literal["", "residual", "entry", "input"]] = ""
    text: ClassVar[bool] = True
    ends: ClassVar[bool] = False

    def __init__(self, config: Any) -> None:
        self.config = config

    @property
    def place(self) -> Place:
        place: Place = getattr(self.config, "over", "stack")
        return place

    @property
    def front(self) -> int:
        """How many blocks in front always run."""
        return 0

    @property
    def back(self) -> int:
        """How many blocks at the end always run."""
        return 0

    def predictor(self) -> Predictor:
        """What carries one value on."""
        return Newton(0)

    @abstractmethod
    def wants(self, now: Evaluation) -> bool | Tensor:
        """Compute this evaluation; (B,) to decide for every sample."""

    def learn(  # noqa: B027  # schedules learn nothing
        self, now: Evaluation, rows: Tensor | None, value: Tensor
    ) -> None:
        """An evaluation was computed, for some samples (B',) or all (None); ``value`` is the change
        that the cached blocks made to the image, or the output of the network.
        """

    def objection(self, total: int) -> str:
        """What is wrong with it in a run of ``total`` evaluations, empty if nothing is."""
        return ""


class _Schedule(Policy):
    """Policies that know beforehand; ``every=1`` computes all."""

    def objection(self, total: int) -> str:
        time = torch.zeros(1)
        if getattr(self.config, "every", 2) == 1:
            return ""
        if all(self.wants(Evaluation(k, total, time)) for k in range(total)):
            return f"computes all {total} evaluations of this run"
        return ""


@registry.register("reuse", paper="2407.01425", aliases=("fora",))
class Reuse(_Schedule):
    """Compute every n-th evaluation, hold the change that the blocks made in between.

    Args:
        config: the knobs.

    Differs from the paper: one change of all blocks is held, not the outputs of attentions and FFNs
    (``over="attention"`` holds those of the attentions).

    Reference: FORA: Fast-Forward Caching in Diffusion Transformer Acceleration, 2024, arXiv
    2407.01425.
    """

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Config(_config.Config):
        """Knobs of `Reuse`.

        Attributes:
            every: n; 1 computes all evaluations.
            warm: evaluations that are computed at the start.
            over: what is skipped: the blocks, or their attentions.
        """

        every: Count = 2
        warm: Natural = 0
        over: Literal["stack", "attention"] = "stack"

    def wants(self, now: Evaluation) -> bool:
        k, warm = now.index, self.config.warm
        return k < warm or (k - warm) % self.config.every == 0


@registry.register("newton")
class NewtonForecast(Reuse):
    """`Reuse` that carries the change on by the polynomial through the last computed ones, in time.

    Args:
        config: the knobs.

    Reference: From Reusing to Forecasting: Accelerating Diffusion Models with TaylorSeers, 2025,
    arXiv 2503.06923, with interpolation in place of its differences.
    """

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Config(_config.Config):
        """Knobs of `NewtonForecast`.

        Attributes:
            order: degree of the polynomial; 0 is `Reuse`.
            every: every n-th evaluation is computed.
            warm: evaluations that are computed at the start.
            over: what is skipped: the blocks, or their attentions.
        """

        order: Natural = 2
        every: Count = 3
        warm: Natural = 3
        over: Literal["stack", "attention"] = "stack"

    def predictor(self) -> Predictor:
        return Newton(self.config.order)


@registry.register("forecast", paper="2503.06923", aliases=("taylorseer",))
class Forecast(_Schedule):
    """Carry outputs on by a Taylor polynomial whose derivatives are differences of computed ones.

    Computed are the first ``warm`` evaluations, then those k with ``(k - warm - 1) % every == 0``,
    and all from ``until`` on.

    Args:
        config: the knobs.

    Reference: From Reusing to Forecasting: Accelerating Diffusion Models with TaylorSeers, 2025,
    arXiv 2503.06923.
    """

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Config(_config.Config):
        """Knobs of `Forecast`.

        Attributes:
            order: of the polynomial.
            every: every n-th evaluation is computed.
            warm: evaluations that are computed at the start.
            until: number of the evaluation from which on all are computed, None for none.
            over: what is skipped: the blocks, or their attentions, as published.
        """

        order: Natural = 1
        every: Count = 5
        warm: Natural = 3
        until: Natural | None = None
        over: Literal["stack", "attention"] = "stack"

    def predictor(self) -> Predictor:
        return Taylor(self.config.order)

    def wants(self, now: Evaluation) -> bool:
        k, c = now.index, self.config
        late = c.until is not None and k >= c.until
        return k < c.warm or (k - c.warm - 1) % c.every == 0 or late


@registry.register("pyramid", paper="2408.12588", aliases=("pab",))
class Pyramid(Policy):
    """Reuse the outputs of attentions inside an interval of times, outside compute all.

    Args:
        config: the knobs.

    Differs from the paper: attentions over space, time and text share one number.

    Reference: Real-Time Video Generation with Pyramid Attention Broadcast, 2024, arXiv 2408.12588.
    """

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Config(_config.Config):
        """Knobs of `Pyramid`.

        Attributes:
            every: every n-th evaluation is computed inside the interval.
            interval: (low, high) times, t = 0 noise, both ends outside.
        """

        every: Count = 2
        interval: tuple[Real, Real] = (0.15, 0.85)

        def check(self) -> None:
            if not self.interval[0] < self.interval[1]:
                raise ValueError(f"interval: {self.interval} is empty")

    @property
    def place(self) -> Place:
        return "attention"

    def wants(self, now: Evaluation) -> bool:
        low, high = self.config.interval
        inside = bool(((now.time > low) & (now.time < high)).all())
        return not inside or now.index % self.config.every == 0


@registry.register("mask")
class Mask(_Schedule):
    """Compute the evaluations of a list, for instance of a search.

    Args:
        config: the knobs.
    """

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Config(_config.Config):
        """Knobs of `Mask`.

        Attributes:
            skip: numbers of the evaluations that are not computed, from 0 on.
            order: degree of the polynomial that carries the change on; 0 holds it.
        """

        skip: tuple[Count, ...] = ()
        order: Natural = 0

    def predictor(self) -> Predictor:
        return Newton(self.config.order)

    def wants(self, now: Evaluation) -> bool:
        return now.index not in self.config.skip

    def objection(self, total: int) -> str:
        missing = [k for k in self.config.skip if k >= total]
        return f"skips evaluation {missing[0]}, but the run has {total}" if missing else ""
