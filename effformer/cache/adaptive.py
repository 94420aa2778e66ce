"""When to compute: policies that look at what the run computes."""

from __future__ import annotations

from dataclasses import dataclass
from math import floor

import torch
from torch import Tensor

from effformer import config as _config
from effformer.nn.precision import widened
from effformer.registry import cache as registry
from effformer.values import Chance, Count, Natural, NonNegative, Positive, Real

from .policies import Evaluation, Place, Policy

__all__ = ["EasyCache", "FirstBlocks", "MagCache", "TeaCache"]


def change(new: Tensor, old: Tensor, per_sample: bool) -> Tensor:
    """``mean |new - old| / mean |old|`` over the whole batch, or for every sample (B,)."""
    dims = tuple(range(1, new.dim())) if per_sample else tuple(range(new.dim()))
    new, old = widened(new), widened(old)
    return (new - old).abs().mean(dim=dims) / old.abs().mean(dim=dims)


def merged(old: Tensor | None, new: Tensor, rows: Tensor | None) -> Tensor:
    """The new values at some samples, the old ones elsewhere."""
    return new if old is None or rows is None else old.index_copy(0, rows, new[rows])


@registry.register("residual", aliases=("first-block", "fbcache", "dbcache"))
class FirstBlocks(Policy):
    """The first blocks always run; the others where the change that these make to the image differs
    by more than ``tau`` from that of the last computed evaluation, relative to it.

    Args:
        config: the knobs.

    Reference: first-block cache of ParaAttention; DBCache of cache-dit (``front=8``).
    """

    looks = "residual"

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Config(_config.Config):
        """Knobs of `FirstBlocks`.

        Attributes:
            tau: threshold; below 0 all evaluations are computed.
            front: blocks at the start that always run.
            back: blocks at the end that always run.
            per_sample: every sample decides for itself, so that it does not depend on the batch;
                else all together.
        """

        tau: Real = 0.05
        front: Count = 1
        back: Natural = 0
        per_sample: bool = False

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self._before: Tensor | None = None
        self._now: Tensor | None = None

    @property
    def front(self) -> int:
        return int(self.config.front)

    @property
    def back(self) -> int:
        return int(self.config.back)

    def wants(self, now: Evaluation) -> bool | Tensor:
        assert now.look is not None
        self._now = now.look()
        if self._before is None:
            return True
        # a residual of zero gives no number, which is no reason to skip
        far = change(self._now, self._before, self.config.per_sample)
        return ~(far <= self.config.tau)

    def learn(self, now: Evaluation, rows: Tensor | None, value: Tensor) -> None:
        assert self._now is not None
        self._before = merged(self._before, self._now, rows)


@registry.register("teacache", paper="2411.19108", aliases=("input-change",))
class TeaCache(Policy):
    """Compute when what enters the first attention has changed enough since: the sum of
    ``poly(change from the evaluation before)`` reaches ``tau``.

    The first evaluation and the last, if its number is known, are computed.

    Args:
        config: the knobs.

    Reference: Timestep Embedding Tells: It's Time to Cache for Video Diffusion Model, 2024, arXiv
    2411.19108.
    """

    looks = "entry"

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Config(_config.Config):
        """Knobs of `TeaCache`.

        Attributes:
            tau: threshold; 0 computes all evaluations.
            poly: coefficients, the highest power first; they belong to a model and a number of steps
                (`calibrate` fits them), (1, 0) takes the change as it is.
            per_sample: every sample decides for itself, so that it does not depend on the batch;
                else all together.
        """

        tau: NonNegative = 0.1
        poly: tuple[Real, ...] = (1.0, 0.0)
        per_sample: bool = False

        def check(self) -> None:
            if not self.poly:
                raise ValueError("poly: no coefficients; (1, 0) takes the change as it is")

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self._before: Tensor | None = None
        self._sum: Tensor | None = None

    def wants(self, now: Evaluation) -> bool | Tensor:
        assert now.look is not None
        entry, before = now.look(), self._before
        self._before = entry
        if before is None or now.last:
            return True
        far = change(entry, before, self.config.per_sample)
        added = torch.zeros_like(far)
        for coefficient in self.config.poly:
            added = added * far + coefficient
        self._sum = added if self._sum is None else self._sum + added
        return ~(self._sum < self.config.tau)

    def learn(self, now: Evaluation, rows: Tensor | None, value: Tensor) -> None:
        if self._sum is not None:
            self._sum = None if rows is None else self._sum.index_fill(0, rows, 0.0)


@registry.register("easycache", paper="2507.02860")
class EasyCache(Policy):
    """Skip the whole network: its output is its input and the difference of the last computed
    evaluation.

    The sum of ``K |x - x before| / |output|`` decides, where K is the change of the output over that
    of the input between the last two computed evaluations.

    Args:
        config: the knobs.

    Reference: Less is Enough: Training-Free Video Diffusion Acceleration via Runtime-Adaptive
    Caching, 2025, arXiv 2507.02860.
    """

    looks = "input"

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Config(_config.Config):
        """Knobs of `EasyCache`.

        Attributes:
            tau: threshold; 0 computes all evaluations.
            warm: evaluations that are computed at the start.
        """

        tau: NonNegative = 0.025
        warm: Natural = 5

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self._before: Tensor | None = None
        self._computed: list[tuple[Tensor, Tensor]] = []
        self._sum = 0.0

    @property
    def place(self) -> Place:
        return "network"

    def wants(self, now: Evaluation) -> bool:
        assert now.look is not None
        x, before = widened(now.look()), self._before
        self._before = x
        if now.index < self.config.warm or now.last or len(self._computed) < 2 or before is None:
            return True
        (x2, o2), (x1, o1) = self._computed
        rate = (o1 - o2).abs().mean() / (x1 - x2).abs().mean()
        self._sum += float(rate * (x - before).abs().mean() / o1.abs().mean())
        return not self._sum < self.config.tau

    def learn(self, now: Evaluation, rows: Tensor | None, value: Tensor) -> None:
        assert self._before is not None
        self._computed = [*self._computed, (self._before, widened(value))][-2:]
        self._sum = 0.0


@registry.register("magcache", paper="2506.09045")
class MagCache(Policy):
    """Skip while the change that the blocks make keeps its size: ratios of sizes from one run say
    when it does not.

    A second stream stays as it enters the blocks. Runs of another length take the nearest ratio.

    Args:
        config: the knobs.

    Reference: MagCache: Fast Video Generation with Magnitude-Aware Cache, 2025, arXiv 2506.09045.
    """

    text = False
    ends = True

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Config(_config.Config):
        """Knobs of `MagCache`.

        Attributes:
            ratios: size of the change over that of the evaluation before, one for each evaluation of
                a run (`calibrate` measures them).
            tau: largest sum of errors.
            most: evaluations in a row that may be skipped.
            retention: share of evaluations at the start that are computed.
        """

        ratios: tuple[Positive, ...] = ()
        tau: NonNegative = 0.06
        most: Natural = 3
        retention: Chance = 0.2

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self._clear()

    def objection(self, total: int) -> str:
        return (
            "" if self.config.ratios else "has no ratios; effformer.cache.calibrate measures them"
        )

    def _clear(self) -> None:
        self._ratio, self._error, self._skipped = 1.0, 0.0, 0

    def wants(self, now: Evaluation) -> bool:
        assert now.total is not None
        if now.index < floor(self.config.retention * now.total + 0.5):
            return True
        self._ratio *= self._of(now.index, now.total)
        self._error += abs(1 - self._ratio)
        self._skipped += 1
        return not (self._error <= self.config.tau and self._skipped <= self.config.most)

    def _of(self, index: int, total: int) -> float:
        """The ratio of an evaluation of a run of ``total``."""
        ratios = self.config.ratios
        if len(ratios) == total:
            return float(ratios[index])
        return float(ratios[round(index * (len(ratios) - 1) / max(total - 1, 1))])

    def learn(self, now: Evaluation, rows: Tensor | None, value: Tensor) -> None:
        self._clear()
