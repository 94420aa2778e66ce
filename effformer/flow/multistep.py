"""Samplers that remember earlier evaluations."""

from __future__ import annotations

import math

from torch import Tensor

from .. import config as _config
from ..registry import sampler as registry
from .samplers import Run, Sampler
from .times import TimeGrid

__all__ = ["DPMSolver2M", "UniPC"]


@registry.register("dpm++2m", paper="2211.01095", aliases=("dpmpp-2m", "dpmpp2m"))
class DPMSolver2M(Sampler):
    """DPM-Solver++(2M) on the straight path: one evaluation per step, order 2.

    With s = 1 - t, the expected data ``D = x + s v``, l = -ln s, h the step of l and r the last step
    over this one::

        x' = (s' / s) x + (1 - s' / s) ((1 + 1 / 2r) D - 1 / 2r D_before)

    The first step, and one that ends at the data, take D alone.

    Differs from the paper: l is -ln s instead of ln((1 - s) / s), as SD3's official code has it.

    Reference: DPM-Solver++: Fast Solver for Guided Sampling of Diffusion Probabilistic Models, 2022,
    arXiv 2211.01095.
    """

    reversible = False

    class Config(_config.Config):
        """No options."""

    def evaluations(self, steps: int) -> int:
        return steps

    def integrate(self, run: Run, x: Tensor, grid: TimeGrid) -> Tensor:
        _check(grid, "dpm++2m")
        before: tuple[Tensor, float] | None = None
        for t, t_next in zip(grid.points, grid.points[1:], strict=False):
            left = (1 - t_next) / (1 - t)
            data = aimed = x + (1 - t) * run.field(x, t)
            if before is not None and left > 0:
                h = -math.log(left)
                aimed = data + (data - before[0]) * (h / (2 * before[1]))
            if left > 0:
                before = data, -math.log(left)
            x = left * x + (1 - left) * aimed
            run.record(x, t_next)
        return x


@registry.register("unipc", paper="2302.04867")
class UniPC(Sampler):
    """UniPC of order 2 on the straight path: one evaluation per step predicts the next state and
    corrects the present one (Wan's sampler).

    With s = 1 - t, the expected data ``D = x + s v``, l = ln(t / s), h the step of l, ``B = exp(-h) - 1``
    and r the step before over h, negative::

        x' = (s' / s) x - t' B (D + (D_before - D) / 2r)                    predicts
        x' = (s' / s) x - t' B (D + a (D_before - D) / r + b (D' - D))      corrects, with D' at x'

    with a and b of the polynomial through all three. The first and the last step take D alone.

    Differs from the paper: its orders above 2 and its other B are left out, as in Wan's official code.

    Reference: UniPC: A Unified Predictor-Corrector Framework for Fast Sampling of Diffusion Models, 2023,
    arXiv 2302.04867.
    """

    reversible = False

    class Config(_config.Config):
        """No options."""

    def evaluations(self, steps: int) -> int:
        return steps

    def integrate(self, run: Run, x: Tensor, grid: TimeGrid) -> Tensor:
        _check(grid, "unipc")
        known: list[tuple[float, Tensor]] = []
        left, order = x, 0
        for i, (t, t_next) in enumerate(zip(grid.points, grid.points[1:], strict=False)):
            data = x + (1 - t) * run.field(x, t)
            if order:
                x = _moved(left, known[-order:], t, data)
            known = [*known[-1:], (t, data)]
            order = min(2, i + 1, len(grid) - i)
            left = x
            x = _moved(x, known[-order:], t_next)
            run.record(x, t_next)
        return x


def _check(grid: TimeGrid, name: str) -> None:
    if grid.widths is not None or not 0 <= grid.start < grid.end <= 1:
        raise ValueError(
            f"sample: {name} steps from point to point of a grid within [0, 1]; "
            "TimeGrid.uniform or TimeGrid.sd3 would do"
        )


def _moved(
    x: Tensor, known: list[tuple[float, Tensor]], t_next: float, reached: Tensor | None = None
) -> Tensor:
    """State x at the last of one or two known times, moved on.

    Args:
        x: the state.
        known: times and expected data, the state's last.
        t_next: where to.
        reached: expected data there, None where nobody knows.
    """
    t, data = known[-1]
    share = (1 - t_next) / (1 - t)
    weight = t_next - t * share  # t' (1 - exp(-h))
    aimed, h = data, _odds(t_next) - _odds(t)
    last = 0.5
    if len(known) == 2:
        before, ratio = known[0], (_odds(known[0][0]) - _odds(t)) / h
        first = 0.5
        if reached is not None:
            grown = math.expm1(-h)
            one = (-grown / h - 1) / grown
            two = 2 * (-one * grown / h - 0.5) / grown
            first = (one - two) / (1 - ratio)
            last = one - first
        aimed = aimed + (before[1] - data) * (first / ratio)
    if reached is not None:
        aimed = aimed + (reached - data) * last
    return share * x + weight * aimed


def _odds(t: float) -> float:
    """ln(t / (1 - t)), without bounds at both ends."""
    if t in (0.0, 1.0):
        return math.inf if t else -math.inf
    return math.log(t / (1 - t))
