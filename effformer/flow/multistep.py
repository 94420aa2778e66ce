"""Samplers that remember earlier evaluations."""

from __future__ import annotations

import math

from torch import Tensor

from .. import config as _config
from ..registry import sampler as registry
from .samplers import Run, Sampler
from .times import TimeGrid

__all__ = ["DPMSolver2M"]


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
        if grid.widths is not None or not 0 <= grid.start < grid.end <= 1:
            raise ValueError(
                "sample: dpm++2m steps from point to point of a grid within [0, 1]; "
                "TimeGrid.uniform or TimeGrid.sd3 would do"
            )
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
